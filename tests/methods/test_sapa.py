"""SAPA against its definition, written out; what it looks at, cost, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.sapa import SAPA
from upbench.testing import assert_close
from upbench.weights.load import load_method


def one_stage(state: dict[str, Tensor], x: Tensor, y: Tensor, side: int, gated: bool) -> Tensor:
    """Pixel by pixel, for x `[B, C, h, w]` and y `[B, D, 2 h, 2 w]`."""

    def linear(name: str, vector: Tensor) -> Tensor:
        return vector @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, vector: Tensor) -> Tensor:
        centred = vector - vector.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    b, c, h, w = x.shape
    out = torch.zeros(b, c, 2 * h, 2 * w)
    for i in range(2 * h):
        for j in range(2 * w):
            query = linear("query", norm("norm_guide", y[:, :, i, j]))
            if gated:
                cell = norm("norm_features", x[:, :, i // 2, j // 2])
                gate = linear("gate", cell).sigmoid()
                query = gate * query + (1 - gate) * linear("own", cell)
            logits, cells = [], []
            for tap in range(side * side):
                u, v = i // 2 + tap // side - side // 2, j // 2 + tap % side - side // 2
                if 0 <= u < h and 0 <= v < w:
                    cell = x[:, :, u, v]
                    product = (query * linear("key", norm("norm_features", cell))).sum(1)
                else:
                    cell, product = torch.zeros(b, c), torch.zeros(b)
                if "positions" in state:
                    product = product + state["positions"][tap, i % 2, j % 2]
                logits.append(product)
                cells.append(cell)
            weights = torch.stack(logits).softmax(0)
            out[:, :, i, j] = (weights.unsqueeze(2) * torch.stack(cells)).sum(0)
    return out


def randomised(**options: Any) -> SAPA:
    method = SAPA(channels=6, embedding=5, guide_dim=8, **options).eval()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.5)
    return method


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": 3, "positions": False}, {"similarity": "gated"}, {"share_stages": False}],
)
def test_against_loops(options: dict[str, Any]) -> None:
    method, image, features = randomised(**options), torch.randn(2, 3, 24, 32), torch.randn(2, 6, 3, 4)
    expected = features
    with torch.no_grad():
        for step in range(2):
            stage = method.stack.stages[0 if options.get("share_stages", True) else step]
            guide = F.adaptive_avg_pool2d(method.encoder(image), (6 * 2**step, 8 * 2**step))
            gated = options.get("similarity") == "gated"
            expected = one_stage(stage.state_dict(), expected, guide, options.get("kernel", 5), gated)
        dense = method(image, features, (12, 16))
    assert_close(dense, expected)


def test_it_begins_close_to_bilinear_interpolation() -> None:
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, 32, 8, 8)
    bilinear = F.interpolate(features, (32, 32), mode="bilinear")[..., 4:-4, 4:-4]
    nearness = [
        F.cosine_similarity(
            load_method("sapa", "none", channels=32, positions=positions)(image, features, (32, 32))[
                ..., 4:-4, 4:-4
            ],
            bilinear,
            dim=1,
        ).mean()
        for positions in (True, False)
    ]
    assert nearness[0] > 0.97
    assert nearness[1] < 0.7  # a box of 5 x 5 cells


def test_a_pixel_takes_the_features_that_its_guide_is_similar_to() -> None:
    """Two halves of an image, with features to match: the edge stays where the image has it."""
    method = SAPA(channels=2, embedding=2, guide_dim=8, positions=False).eval()
    stage = method.stack.stages[0]
    with torch.no_grad():
        for layer in (stage.query, stage.key):
            layer.weight.zero_()
        stage.query.weight[0, 0], stage.query.weight[1, 1] = 9.0, 9.0
        stage.key.weight.copy_(9 * torch.eye(2))
    edge = torch.zeros(1, 8, 12, 12)
    edge[:, 0, :, :7], edge[:, 1, :, 7:] = 1, 1  # not at a border of cells
    features = torch.zeros(1, 2, 6, 6)
    features[:, 0, :, :3], features[:, 1, :, 4:] = 1, 1
    features[:, :, :, 3] = 0.5
    dense = stage(features, edge)(features)
    assert dense[0, 0, 6, 4:7].min() > 0.95
    assert dense[0, 1, 6, 7:9].min() > 0.95


@pytest.mark.parametrize(("size", "steps"), [((12, 10), 1), ((24, 20), 2)])
@pytest.mark.parametrize("gated", [False, True])
def test_macs_equal_a_hand_count(size: tuple[int, int], steps: int, gated: bool) -> None:
    cells, c, d, e, pixels = 6 * 5, 12, 32, 64, 28 * 28
    expected = pixels * (27 * d + 2 * (2 * d * d + 2 * 5 * d))  # stem, two blocks with their norms
    for _ in range(steps):
        expected += 5 * cells * c + cells * c * e  # norm and key
        expected += d * max(pixels, 4 * cells)  # pooled guide
        expected += 4 * cells * (5 * d + d * e + 25 * e + 25 * c)  # norm, query, similarities, values
        if gated:
            expected += cells * c * (e + 1) + 4 * cells * (e + 1 + e)  # own, gate; nearest; mixture
        cells *= 4
    method = SAPA(c, similarity="gated" if gated else "bilinear")
    counted = count_macs(_Bound(method, size), torch.randn(1, 3, 28, 28), torch.randn(1, c, 6, 5))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "kernel 4 is not odd"),
        ({"embedding": 0}, "embedding 0"),
        ({"guide_dim": 12}, "guide_dim 12 is not a multiple of 8"),
        ({"similarity": "gate"}, "did you mean 'gated'"),
        ({"padding": "zero"}, "did you mean 'zeros'"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        SAPA.build(**options)
