"""FeatUp's implicit network: a function of position and colour, fitted to many views of each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.operator import SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import MacCount, Upsampler
from upbench.cost.macs import count_macs
from upbench.errors import UpbenchError
from upbench.layers.convolutions import grid_of
from upbench.layers.waves import Waves, places
from upbench.ops.basis import BasisOperator
from upbench.ops.jitter import Jitter
from upbench.ops.resample import interpolation_matrix, resize, resize_guidance
from upbench.system.progress import bar

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

PAD = 30 / 224  # of a side, by reflection
MAX_ZOOM = 1.8
PCA_VIEWS = 50
MAGNITUDE_WEIGHT = 0.001
VARIATION_WEIGHT = 0.05
BLUR_WEIGHT = 0.1
_VIEWS_AT_A_TIME = 8


class FeatUpImplicit(Upsampler):
    """FeatUp's per-image network (see `paper`): test-time optimisation with the backbone.

    The image is padded, zoomed and mirrored `views` times, and the backbone describes every view. A small
    network of position and colour gives the high-resolution features; it is trained, anew for each image,
    until they look as the backbone's do once they are moved like a view and downsampled. The downsampler, a
    saliency times a window, and an uncertainty for each target are learned with it. Features are reduced to
    `dim` principal components, and the result is expanded from them. The backbone's own features of the
    image are one of the views: of those given, only the grid counts.

    The budget is the paper's (2,000 steps, 3,000 views, 10 views a step) unless options say otherwise; the
    released configuration has 1,200 steps. On a CPU that is many minutes an image. Under the quick preset
    the budget is that of `preset_options`, with which the features are far from converged.

    Departures from the official code: the downsampler's window is separable, lies around its patch and is
    cut at the image's border (there, windows of 29 pixels are spaced to fit into the image, 13 pixels apart
    for patches of 14), its saliency is that of the high-resolution pixel and has no dropout, and it needs no
    blur beforehand, which the window can learn. So views are never drawn at high resolution: moving and
    downsampling is a product with one matrix per axis. Components are scaled to a mean variance of 1, so
    that one learning rate serves every backbone. Padding is a share of each side (30 of 224 pixels there).
    The network's random numbers come from `seed`: the same image gives the same features.
    """

    name = "featup_implicit"
    title = "FeatUp (implicit)"
    paper = (
        "Fu et al., FeatUp: A Model-Agnostic Framework for Features at Any Resolution, ICLR 2024, "
        "arXiv 2403.10516"
    )
    year = 2024
    license = "MIT"
    uses_backbone = True
    precise_image = True  # what is fitted hangs on every bit of it
    preset_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {
            "steps": 150,
            "views": 8,
            "batch": 2,
            "dim": 32,
            "frequencies": 8,
            "lr": 0.02,
            "dropout": 0.0,
            "side": 80,
        },
        "contract": {"steps": 3, "views": 4, "batch": 2, "dim": 8, "frequencies": 1},
    }

    def __init__(
        self,
        channels: int = 384,
        *,
        steps: int = 2000,
        views: int = 3000,
        batch: int = 10,
        dim: int = 128,
        frequencies: int = 30,
        lr: float = 0.002,
        dropout: float = 0.2,
        side: int | None = None,
        seed: int = 0,
    ) -> None:
        """Sets the budget of the fit.

        Args:
            channels: C of the features.
            steps: Steps of NAdam per image.
            views: Of the image, the image itself included.
            batch: Views per step.
            dim: Principal components, and width of the network.
            frequencies: Of the waves of each coordinate.
            lr: Learning rate.
            dropout: Share of the network's channels that a step goes without.
            side: Longest side of the map that is fitted, in pixels; a larger output is interpolated from it.
                The output's own by default.
            seed: Of views, initial weights and dropout.
        """
        super().__init__(channels)
        counts = {"steps": steps, "views": views, "batch": batch, "dim": dim, "frequencies": frequencies}
        for name, value in {**counts, "side": 1 if side is None else side}.items():
            if value < 1:
                raise UpbenchError(f"featup_implicit: {name} must be at least 1, got {value}")
        if lr <= 0:
            raise UpbenchError(f"featup_implicit: lr must be above 0, got {lr}")
        if not 0 <= dropout < 1:
            raise UpbenchError(f"featup_implicit: dropout must be in [0, 1), got {dropout}")
        self.dropout = float(dropout)
        self.steps, self.views, self.batch = int(steps), int(views), int(batch)
        self.dim, self.frequencies = min(int(dim), channels), int(frequencies)
        self.lr, self.side, self.seed = float(lr), side, int(seed)

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        backbone: Backbone | None = None,
    ) -> Tensor:
        """See `Upsampler.forward`; of `features` only the grid counts."""
        operator = self.operator(image, features, output_size, backbone=backbone)
        return operator(operator.sources.unsqueeze(1)).to(features.dtype)

    def operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
    ) -> SourcedOperator:
        """See `Upsampler.operator`: the components and, for each pixel, how much of each there is."""
        backbone = self.given(backbone)
        rows, cols = (n * backbone.stride for n in grid_of(features))
        with torch.inference_mode(False), torch.no_grad():  # a fit needs gradients, wherever it is called
            fits = []
            with bar("fitting implicit features", len(image) * self.steps) as progress:
                for one in backbone.resized(self.denormalize(image), (rows, cols)):
                    fitted = fit(self, backbone, one, self._fit_size(output_size), progress.advance)
                    fits.append(fitted)
            dense = [F.pad(f.features.movedim(2, 0), (0,) * 5 + (1,), value=1.0) for f in fits]
            weights = resize(torch.stack(dense), output_size, "bilinear")
            sources = torch.stack([f.components for f in fits]).unsqueeze(2)
        return SourcedOperator(sources, BasisOperator(weights))

    def _fit_size(self, output_size: tuple[int, int]) -> tuple[int, int]:
        longest = max(output_size)
        if self.side is None or self.side >= longest:
            return output_size
        height, width = (max(1, round(n * self.side / longest)) for n in output_size)
        return height, width

    def macs(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        backbone: Backbone | None = None,
    ) -> MacCount:
        """See `Upsampler.macs`; a step's backward pass is taken to be two forward passes."""
        backbone, (h, w) = self.given(backbone), grid_of(features)
        size, fitted = (h * backbone.stride, w * backbone.stride), self._fit_size(output_size)
        seen = torch.zeros(1, 3, *size, device=image.device)
        with torch.inference_mode(False):
            network = Network(self.dim, self.frequencies).eval().to(image.device)
            once = count_macs(network, torch.zeros(*fitted, 3, device=image.device)).total
            view = count_macs(backbone, seen).total
        channels = self.dim + 2
        down = fitted[0] * fitted[1] * h * channels + h * w * fitted[1] * channels
        batch = int(features.shape[0])
        counts = {
            "backbone": batch * self.views * view,
            "fit": batch * self.steps * 3 * (once + self.batch * down),
            "network": batch * once,
            "expansion": batch * (self.dim + 1) * self.channels * output_size[0] * output_size[1],
        }
        note = (
            f"MACs, time and memory include {self.steps} steps of optimisation per image; "
            "a step is counted as three forward passes"
        )
        return MacCount(sum(counts.values()), counts, note=note)


@dataclass(frozen=True)
class Fit:
    """What became of an image's optimisation.

    Attributes:
        features: `[H, W, dim]` high-resolution components.
        components: `[C, dim + 1]` a component per column, and the mean as the last one.
        low: `[h, w, dim]` components of the backbone's features of the image.
        downsampled: `[h, w, dim]` the fitted features, downsampled: what `low` was to be.
        losses: `[steps]` mean squared error of the components over a step's views.
    """

    features: Tensor
    components: Tensor
    low: Tensor
    downsampled: Tensor
    losses: Tensor


def fit(
    method: FeatUpImplicit,
    backbone: Backbone,
    image: Tensor,
    size: tuple[int, int],
    advance: Any = lambda: None,
) -> Fit:
    """Fits a network to one image.

    Args:
        method: The budget.
        backbone: Of stride s.
        image: `[3, s h, s w]` RGB in 0..1, not an inference tensor.
        size: (H, W) of the high-resolution features.
        advance: Called after each step.
    """
    cuda = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False):
        torch.manual_seed(method.seed)
        views, targets, components = observe(method, backbone, image)
        colours = resize_guidance(image[None], size)[0].movedim(0, 2)
        network = Network(method.dim, method.frequencies, method.dropout).to(image.device)
        downsampler = Downsampler(method.dim, backbone.stride).to(image.device)
        seen_by = Views(views.to(image.device), size)
        uncertainty = Uncertainty(method.dim).to(image.device)
        learned = nn.ModuleList([network, downsampler, uncertainty])
        blur = [blur_matrix(n).to(image) for n in size]
        optimizer = torch.optim.NAdam(learned.parameters(), lr=method.lr)
        losses = []
        for _ in range(method.steps):
            chosen = torch.randint(len(targets), (method.batch,)).to(image.device)
            target = targets[chosen]
            with torch.enable_grad():
                dense = network(colours)
                seen, magnitude = downsampler(dense, *seen_by[chosen])
                loss = uncertainty(seen, target)
                loss = loss + MAGNITUDE_WEIGHT * (magnitude - target.norm(dim=3)).square().mean()
                loss = loss + VARIATION_WEIGHT * variation(dense.norm(dim=2))
                loss = loss + BLUR_WEIGHT * (separable(dense, *blur) - dense).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append((seen.detach() - target).square().mean())
            advance()
        with torch.no_grad():
            dense = network.eval()(colours)
            again, _ = downsampler(dense, *seen_by[torch.zeros(1, dtype=torch.long, device=image.device)])
    return Fit(dense, components, targets[0], again[0], torch.stack(losses))


@torch.no_grad()
def observe(method: FeatUpImplicit, backbone: Backbone, image: Tensor) -> tuple[Jitter, Tensor, Tensor]:
    """Views of an image and what the backbone sees in them.

    Returns:
        The views, `[V, h, w, dim]` principal components of their features, scaled to a mean variance of 1,
        and `[C, dim + 1]` what a unit of each component is in features, with the mean as last column.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    generator = torch.Generator().manual_seed(method.seed)
    pad = min(round(PAD * max(size)), min(size) - 1)
    views = Jitter.sample(method.views, size, pad=pad, max_zoom=MAX_ZOOM, generator=generator)
    order = torch.arange(method.views)
    first = _features(backbone, image, views, order[:PCA_VIEWS])
    mean, axes, scale = principal_axes(first.flatten(0, 2), method.dim)
    targets = [(first - mean) @ axes / scale]
    for start in range(PCA_VIEWS, method.views, _VIEWS_AT_A_TIME):  # thousands: reduced as they come
        part = order[start : start + _VIEWS_AT_A_TIME]
        targets.append((_features(backbone, image, views, part) - mean) @ axes / scale)
    return views, torch.cat(targets), torch.cat([axes * scale, mean[:, None]], 1)


def _features(backbone: Backbone, image: Tensor, views: Jitter, which: Tensor) -> Tensor:
    """`[V, h, w, C]` of some views."""
    parts = [
        backbone(views[part].apply(image).clamp(0, 1)).movedim(1, 3) for part in which.split(_VIEWS_AT_A_TIME)
    ]
    return torch.cat(parts)


def principal_axes(samples: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[C]`, `dim` orthonormal axes `[C, dim]` of most variance first, and the root of the mean
    variance along them, of samples `[N, C]`."""
    mean = samples.mean(0)
    centred = samples - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(samples))
    scale = values[-dim:].clamp(min=0).mean().sqrt().clamp(min=1e-6)
    return mean, vectors[:, -dim:].flip(1), scale


class Views:
    """How rows and columns of views follow from those of a high-resolution map; kept where there are few."""

    def __init__(self, views: Jitter, size: tuple[int, int]) -> None:
        """Args: views: Of the image; size: (H, W) of the map, which covers the whole image."""
        self._views = views
        device = views.zoom.device
        self._spread = [
            interpolation_matrix(cells, pixels, "bilinear", device)
            for cells, pixels in zip(size, views.size, strict=True)
        ]
        few = len(views.zoom) <= PCA_VIEWS
        self._kept = self._moved(views) if few else None

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`[V, h_img, H]` and `[V, w_img, W]` of some views."""
        if self._kept is None:
            return self._moved(self._views[index])
        return self._kept[0][index], self._kept[1][index]

    def _moved(self, views: Jitter) -> tuple[Tensor, Tensor]:
        return views.rows() @ self._spread[0], views.cols() @ self._spread[1]


class Network(nn.Module):
    """The implicit function: waves of position and colour through three layers."""

    def __init__(self, dim: int, frequencies: int, dropout: float = 0.0) -> None:
        """Args: dim: Outputs and width; frequencies: Of each coordinate; dropout: In training."""
        super().__init__()
        self.dropout = dropout
        described = 5 * frequencies * 2 + 3
        self.waves = Waves(5, frequencies)
        self.first = nn.Linear(described, dim)
        self.second = nn.Linear(dim, dim)
        self.third = nn.Linear(dim, dim)
        self.norms = nn.ModuleList([nn.LayerNorm(described), nn.LayerNorm(dim)])

    def forward(self, image: Tensor) -> Tensor:
        """`[H, W, 3]` RGB to `[H, W, dim]`; colours are stretched to -0.5 .. 0.5, each by itself."""
        low, high = image.amin((0, 1)), image.amax((0, 1))
        colour = (image - low) / (high - low).clamp(min=1e-4) - 0.5
        points = torch.cat([places((int(image.shape[0]), int(image.shape[1])), image), colour], 2)
        x = torch.cat([self.waves(points), colour], 2)
        x = self.first(self._drop(self.norms[0](x))).relu()
        x = self.second(self.norms[1](self._drop(x))).relu()
        out: Tensor = self.third(x)
        return out

    def _drop(self, x: Tensor) -> Tensor:
        """Whole channels at a time."""
        if not (self.training and self.dropout):
            return x
        return x * F.dropout(x.new_ones(x.shape[2]), self.dropout)


class Downsampler(nn.Module):
    """What a backbone's cell sees of high-resolution features: a saliency times a window around the cell."""

    def __init__(self, dim: int, stride: int) -> None:
        """Args: dim: Components; stride: Pixels per cell."""
        super().__init__()
        self.stride = stride
        self.taps = 2 * stride + stride % 2
        self.saliency = nn.Linear(dim + 1, 1)
        self.windows = nn.Parameter(torch.zeros(2, self.taps))  # of rows and columns; logarithms

    def forward(self, features: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Moves features like V views, then downsamples.

        Args:
            features: `[H, W, dim]` of the image as it is.
            rows: `[V, h_img, H]` what each row of a view is made of.
            cols: `[V, w_img, W]`, the same for columns.

        Returns:
            `[V, h, w, dim]` features and `[V, h, w]` the mean of their magnitudes.
        """
        magnitude = features.norm(dim=2, keepdim=True)
        salience = self.saliency(torch.cat([magnitude, features], 2))
        salience = (salience - salience.detach().amax()).exp()
        weighted = torch.cat([salience, salience * magnitude, salience * features], 2)
        rows, cols = (
            self.windows_along(axis, int(moved.shape[1])) @ moved for axis, moved in enumerate((rows, cols))
        )
        total, magnitude, dense = separable(weighted, rows, cols).split([1, 1, int(features.shape[2])], 3)
        return dense / total, (magnitude / total)[..., 0]

    def windows_along(self, axis: int, pixels: int) -> Tensor:
        """`[cells, pixels]` a view's window of each cell along an axis, cut at the border."""
        start = (self.stride - self.taps) // 2
        first = torch.arange(start, pixels + start, self.stride, device=self.windows.device)
        tap = torch.arange(pixels, device=self.windows.device) - first[:, None]
        inside = (tap >= 0) & (tap < self.taps)
        return torch.where(inside, self.windows[axis].exp()[tap.clamp(0, self.taps - 1)], 0.0)


class Uncertainty(nn.Module):
    """Gaussian negative log-likelihood with a scale that is learned from the target."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Linear(dim, 1)
        with torch.no_grad():
            self.scale.weight.mul_(0.1)
            self.scale.bias.mul_(0.1)

    def forward(self, seen: Tensor, target: Tensor) -> Tensor:
        """Scalar, of `[..., dim]` each."""
        scale = (self.scale(target) + 0.1).exp().clamp(min=1e-4)
        loss: Tensor = ((seen - target).square() / (2 * scale.square()) + scale.log()).mean()
        return loss


def separable(features: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """`[H, W, D]` by matrices `[V, h, H]` and `[V, w, W]`, to `[V, h, w, D]`; without V, by one of each."""
    height, width, dim = (int(n) for n in features.shape)
    by_rows = (rows @ features.reshape(height, width * dim)).unflatten(-1, (width, dim))
    product: Tensor = cols.unsqueeze(-3) @ by_rows
    return product


def blur_matrix(size: int, sigma: float = 1.0, reach: int = 2) -> Tensor:
    """`[size, size]` a Gaussian of 2 reach + 1 taps along an axis that is continued by reflection."""
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    place = torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)
    period = max(1, 2 * (size - 1))
    place = place.abs() % period
    place = torch.minimum(place, period - place).clamp(max=size - 1)
    return torch.zeros(size, size).scatter_add_(1, place, (taps / taps.sum()).expand_as(place).contiguous())


def variation(values: Tensor) -> Tensor:
    """Squared differences of neighbours in `[H, W]`, per pixel."""
    down, right = values.diff(dim=0), values.diff(dim=1)
    return (down.square().sum() + right.square().sum()) / values.numel()
