"""Where the frames of each geometry lie."""

from __future__ import annotations

from itertools import pairwise

import pytest
from framing import GEOMETRIES, SOURCES, STRIDE
from hypothesis import given
from hypothesis import strategies as st

from upbench.errors import UpbenchError
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Squash, Windows

sides = st.integers(1, 900)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("source", SOURCES)
def test_frames_lie_in_the_image_and_have_the_size_that_is_said(name: str, source: tuple[int, int]) -> None:
    geometry = GEOMETRIES[name]
    some = geometry.frames(source, STRIDE)
    for frame in some:
        assert frame.source == source
        for axis in (0, 1):
            assert 0 <= frame.offset[axis] <= frame.resized[axis] - frame.size[axis]
        assert geometry.size(STRIDE) in (None, frame.size)
    assert len(some) == 1 or geometry.windows


@given(height=sides, width=sides)
def test_square_crop_rounds_as_torchvision(height: int, width: int) -> None:
    (frame,) = SquareCrop(448, "bilinear", "floor", "round").frames((height, width))
    short, long = sorted((height, width))
    expected = int(448 * long / short)
    assert frame.resized == ((448, expected) if height <= width else (expected, 448))
    assert frame.offset == tuple(round((n - 448) / 2.0) for n in frame.resized)


def test_square_crop_by_default() -> None:
    (frame,) = SquareCrop(224).frames((375, 500))
    assert (frame.resized, frame.offset, frame.filter) == ((224, 299), (0, 37), "bicubic")
    (frame,) = SquareCrop(224).frames((500, 375))
    assert (frame.resized, frame.offset) == ((299, 224), (37, 0))


@given(height=sides, width=sides, stride=st.sampled_from([1, 14, 16, 32]))
def test_native_aspect_is_a_multiple_of_the_backbones_stride(height: int, width: int, stride: int) -> None:
    for geometry in (NativeAspect(), NativeAspect(short=100), NativeAspect(fit="crop")):
        (frame,) = geometry.frames((height, width), stride)
        for axis, side in enumerate((height, width)):
            scaled = side * 100 / min(height, width) if geometry.short else side
            assert frame.size[axis] == max(stride, round(scaled) // stride * stride)


def test_native_aspect_of_480p() -> None:
    for stride, size in ((14, (476, 854)), (16, (480, 848)), (8, (480, 848))):
        (frame,) = NativeAspect().frames((480, 854), stride)
        assert (frame.size, frame.resized, frame.offset) == (size, size, (0, 0))
    (frame,) = NativeAspect(fit="crop").frames((480, 854), 16)
    assert (frame.size, frame.resized, frame.offset) == ((480, 848), (480, 854), (0, 3))
    (frame,) = NativeAspect(short=480, multiple=64).frames((1080, 1920), 14)
    assert frame.size == (448, 832)


@given(height=sides, width=sides)
def test_padding_makes_a_square_of_the_longer_side(height: int, width: int) -> None:
    for place in ("centre", "corner"):
        (frame,) = PaddedSquare(448, place=place).frames((height, width))
        top, left, bottom, right = frame.pad
        assert frame.canvas == (max(height, width),) * 2
        assert min(frame.pad) == 0
        if place == "corner":
            assert (top, left) == (0, 0)
        else:
            assert 0 <= bottom - top <= 1
            assert 0 <= right - left <= 1


@given(height=st.integers(20, 300), width=st.integers(20, 300), step=st.integers(1, 32))
def test_windows_cover_every_pixel(height: int, width: int, step: int) -> None:
    geometry = Windows(32, step)
    some = geometry.frames((height, width))
    assert min(some[0].resized) == 32
    for axis in (0, 1):
        starts = sorted({frame.offset[axis] for frame in some})
        assert starts[0] == 0
        assert starts[-1] == some[0].resized[axis] - 32
        assert all(0 < b - a <= step for a, b in pairwise(starts))
    assert len({frame.offset for frame in some}) == len(some)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SquareCrop(0), "side must be a whole number from 1 to 1000000, got 0"),
        (lambda: SquareCrop(True), "side must be a whole number"),
        (lambda: SquareCrop(224.0), "side must be a whole number"),
        (
            lambda: SquareCrop(224, long_side="flor"),
            "unknown rounding 'long_side' 'flor'; did you mean 'floor'",
        ),
        (lambda: SquareCrop(224, centre="up"), "unknown rounding 'centre' 'up'"),
        (lambda: SquareCrop(224, filter="cubic"), "unknown filter 'cubic'; did you mean 'bicubic'"),
        (lambda: Squash(224, 0), "width must be"),
        (lambda: Squash(224, 4, filter="area"), "unknown filter 'area'"),
        (lambda: NativeAspect(short=-1), "short must be"),
        (lambda: NativeAspect(fit="pad"), "unknown fit 'pad'"),
        (lambda: NativeAspect(filter="x"), "unknown filter 'x'"),
        (lambda: PaddedSquare(224, place="center"), "unknown place 'center'; did you mean 'centre'"),
        (lambda: PaddedSquare(224, fill=(0, 0, 256)), "fill must be three whole numbers from 0 to 255"),
        (lambda: Windows(224, 225), "windows of 224 pixels in steps of 225 leave gaps"),
        (lambda: Windows(224, 112, short=200), "do not fit a shorter side of 200"),
        (lambda: Windows(224, 0), "step must be"),
    ],
)
def test_impossible_geometries_are_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(UpbenchError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
