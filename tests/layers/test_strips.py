"""Encoders in strips of rows equal the plain ones, and come closer to float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.layers import convolutions, strips
from upbench.layers.convolutions import Branch, Encoder, convolution, residual_encoder
from upbench.layers.strips import can_stream
from upbench.testing import assert_close

KINDS = {
    "1x1": ((1, 1), 2, 1, (0, 0)),
    "1x3": ((1, 3), 1, 1, (0, 1)),
    "3x1": ((3, 1), 1, 1, (1, 0)),
    "corners": ((2, 2), 1, 2, (1, 1)),
    "3x3 twice": ((3, 3), 2, 1, (1, 1)),
    "no blocks": ((3, 3), 0, 1, (1, 1)),
}


def varied(encoder: nn.Module) -> nn.Module:
    """With norms that are not the identity."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return encoder.eval()


def plain(encoder: Encoder, image: Tensor) -> Tensor:
    for layer in encoder:
        image = layer(image)
    return image


def encoders() -> dict[str, Encoder]:
    found: dict[str, Encoder] = {name: Branch(16, *kind) for name, kind in KINDS.items()}
    found["residual"] = residual_encoder(nn.Conv2d(3, 16, 1, bias=False), 16)
    return found


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of eight rows, for any map."""
    monkeypatch.setattr(strips, "_STRIP_BYTES", 1)
    monkeypatch.setattr(strips, "_MIN_PIXELS", 1)


@pytest.mark.parametrize("name", encoders())
@pytest.mark.parametrize("size", [(24, 20), (25, 33), (9, 5), (3, 40)], ids=str)
@pytest.mark.usefixtures("small_strips")
def test_strips_equal_the_whole(name: str, size: tuple[int, int]) -> None:
    encoder = varied(encoders()[name])
    image = torch.randn(2, 3, *size)
    image[1] = 5 + 0.1 * image[1]  # a mean that is large against the spread
    with torch.no_grad():
        assert can_stream(image)
        found = encoder(image)
        exact = plain(copy.deepcopy(encoder).double(), image.double())
        ordinary = plain(encoder, image)
    assert found.shape == exact.shape
    assert_close(found, ordinary, reference=exact)


@pytest.mark.usefixtures("small_strips")
def test_the_image_is_left_alone_and_any_layout_will_do() -> None:
    encoder = varied(encoders()["corners"])
    image = torch.randn(2, 3, 20, 22)
    before = image.clone()
    with torch.inference_mode():
        first = encoder(image)
        second = encoder(image.contiguous(memory_format=torch.channels_last))
        assert_close(encoder(image.expand(2, 3, 20, 22)), first)
    assert torch.equal(image, before)
    assert_close(first, second)


def test_what_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, autocast, other dtypes, traces and small maps take the plain way."""
    image = torch.randn(1, 3, 128, 128)
    assert not can_stream(image), "gradients"
    with torch.no_grad():
        assert can_stream(image)
        assert not can_stream(image.bfloat16())
        assert not can_stream(image[..., :32, :32])
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):  # too thin to be reflected: refused, as ever
            encoders()["3x1"](torch.randn(1, 3, 1, 10_000))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_stream(image)

        def refuse(*args: object) -> None:
            raise AssertionError("streamed in a trace")

        monkeypatch.setattr(convolutions, "stream", refuse)
        count_macs(encoders()["1x1"], image)


def test_a_stem_that_is_no_convolution_takes_the_plain_way() -> None:
    encoder = residual_encoder(nn.Sequential(convolution(3, 16)), 16)
    with torch.no_grad():
        image = torch.randn(1, 3, 128, 128)
        assert_close(encoder(image), plain(encoder, image))
