"""Losses and metrics of published benchmarks as they are described, an image and a pixel row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def depth_of(z: Tensor) -> Tensor:
    """`[B, 256, H, W]` to `[B, H, W]`: bins from 1 mm to 10 m, both included."""
    bins = torch.linspace(1e-3, 10, z.shape[1], dtype=z.dtype)
    share = torch.relu(z) + 0.1
    share = share / share.sum(1, keepdim=True)
    return torch.einsum("bkhw,k->bhw", share, bins)


def counted(target: Tensor, valid: Tensor) -> Tensor:
    return valid & (target > 0) & (target <= 10)


def logs(depth: Tensor, target: Tensor) -> Tensor:
    return torch.log(depth + 0.001) - torch.log(target + 0.001)


def within_images(g: Tensor, mask: Tensor) -> Tensor:
    """Of `[B, H, W]`: differences over two pixels at four strides, each over the batch's valid pixels."""
    total = torch.zeros((), dtype=g.dtype)
    for stride in (1, 2, 4, 6):
        sums, count = torch.zeros((), dtype=g.dtype), 0.0
        for one, valid in zip(g, mask, strict=True):
            d, m = one[::stride, ::stride], valid[::stride, ::stride].to(g.dtype)
            down = (d[2:] - d[:-2]).nan_to_num().abs() * m[2:] * m[:-2]
            right = (d[:, 2:] - d[:, :-2]).nan_to_num().abs() * m[:, 2:] * m[:, :-2]
            sums, count = sums + down.sum() + right.sum(), count + float(m.sum())
        total = total + sums / max(1.0, count)
    return total


def along_the_batch(g: Tensor, mask: Tensor) -> Tensor:
    """Of `[B, H, W]`: what slicing the first axes gives, image b beside image b + 2."""
    total = torch.zeros((), dtype=g.dtype)
    for stride in (1, 2, 4, 6):
        images = list(range(0, len(g), stride))
        weights = [mask[i].to(g.dtype) for i in images]
        pairs = list(zip(images, images[2:], strict=False))
        apart = [((g[a] - g[b]).abs() * mask[a] * mask[b]).sum() for a, b in pairs]
        total = total + sum(apart, torch.zeros((), dtype=g.dtype)) / max(
            1.0, float(sum(w.sum() for w in weights))
        )
    return total


def probe3d_of(g: Tensor, mask: Tensor, batched: bool = False) -> Tensor:
    """10 times the scale-invariant loss, half the gradient loss; from logarithms."""
    seen = g[mask]
    scale = torch.sqrt((seen**2).mean() - 0.85 * seen.mean() ** 2)
    return 10 * scale + 0.5 * (along_the_batch if batched else within_images)(g, mask)


def probe3d(z: Tensor, target: Tensor, valid: Tensor, step: int, batched: bool = False) -> Tensor:
    mask = counted(target, valid)
    return probe3d_of(logs(depth_of(z), target), mask, batched)


def probe3d_2025(z: Tensor, target: Tensor, valid: Tensor, step: int) -> Tensor:
    return probe3d(z, target, valid, step, batched=True)


def jafar(z: Tensor, target: Tensor, valid: Tensor, step: int) -> Tensor:
    """The unbiased variance, after a hundred steps; the gradient loss of two images is 0."""
    seen = logs(depth_of(z), target)[counted(target, valid)]
    inside = 0.15 * seen.mean() ** 2
    if step >= 100:
        inside = inside + seen.var()
    assert len(z) <= 2
    return torch.sqrt(inside)


def likelihood(z: Tensor, target: Tensor, valid: Tensor, step: int) -> Tensor:
    """Of normals, pixel by pixel."""
    total, count = torch.zeros((), dtype=z.dtype), 0
    for made, truth, mask in zip(z, target, valid, strict=True):
        direction, spread = made[:3], made[3]
        kappa = torch.where(spread > 0, spread, torch.exp(spread) - 1) + 1.01
        length = direction.square().sum(0).sqrt() * truth.square().sum(0).sqrt()
        cosine = ((direction * truth).sum(0) / length).clamp(-1 + 1e-4, 1 - 1e-4)
        loss = (
            torch.log(1 + torch.exp(-math.pi * kappa)) - torch.log(kappa**2 + 1) + kappa * torch.acos(cosine)
        )
        total, count = total + loss[mask].sum(), count + int(mask.sum())
    return total / count


LOSSES = {"probe3d": probe3d, "probe3d_2025": probe3d_2025, "jafar": jafar}


def aligned_depth(prediction: Tensor, target: Tensor) -> tuple[float, list[float]]:
    """RMSE and fractions within 1.25, 1.25^2, 1.25^3 of pixels `[N]`, scale and shift by least squares."""
    system = torch.stack([prediction.double(), torch.ones_like(prediction).double()], 1)
    fitted = torch.linalg.lstsq(system, target.double()[:, None]).solution
    p = (system @ fitted)[:, 0].clamp(min=1e-3)
    t = target.double()
    ratio = torch.maximum(p / t, t / p)
    within = [float((ratio < 1.25**n).double().mean()) for n in (1, 2, 3)]
    return float((p - t).square().mean().sqrt()), within


def angles(prediction: Tensor, target: Tensor) -> Tensor:
    """Degrees between `[3, N]` and `[3, N]`."""
    p, t = (x.double() / x.double().norm(dim=0) for x in (prediction, target))
    return torch.rad2deg(2 * torch.asin(((p - t).norm(dim=0) / 2).clamp(max=1)))


def named_iou(matrix: Tensor, other: int) -> float:
    """Mean over the classes but one of a confusion matrix (rows: truth), absent ones left out."""
    found = []
    for label in range(len(matrix)):
        union = int(matrix[label].sum() + matrix[:, label].sum() - matrix[label, label])
        if label != other and union:
            found.append(int(matrix[label, label]) / union)
    return sum(found) / len(found)
