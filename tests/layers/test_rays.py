"""Rays and their angles: what holds at any resolution, of crops, and of batches with different cameras.

Two forms of one function are held apart throughout: "image" takes the size that intrinsics refer to from the
image, "principal_point" (released) from twice the largest principal point.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.layers.rays import (
    ORIGINAL_SIZES,
    default_intrinsics,
    ray_angles,
    ray_directions,
    ray_moments,
    rotation,
)
from upbench.testing import assert_close
from upbench.testing.closeness import allowed, relative_error

CELL = 4  # pixels of a grid cell

sides = st.integers(3, 9)
focals = st.floats(20, 200)
shares = st.floats(0.2, 0.8)


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.zeros(batch, 3, height, width)


def camera(fx: float, fy: float, cx: float, cy: float) -> Camera:
    return Camera(torch.tensor([[fx, fy, cx, cy]]))


def scaled(view: Camera, factor: float) -> Camera:
    return Camera(view.intrinsics * factor)


def same(a: Tensor, b: Tensor) -> bool:
    return relative_error(a, b) <= allowed(torch.float32)


@given(sides, sides, focals, focals, shares, shares, st.integers(2, 6))
@settings(max_examples=40)
def test_directions_do_not_depend_on_the_resolution_of_the_image(h, w, fx, fy, x, y, factor) -> None:
    """An image of another size with its intrinsics scaled along: the same rays through the same cells."""
    height, width = CELL * h, CELL * w
    view = camera(fx, fy, x * width, y * height)
    small = ray_directions(image(height, width), (h, w), view, "image")
    large = ray_directions(image(factor * height, factor * width), (h, w), scaled(view, factor), "image")
    assert same(small, large)


@given(sides, sides, focals, focals, st.integers(1, 40), st.integers(1, 40), st.integers(2, 6))
@settings(max_examples=40)
def test_the_released_form_keeps_them_where_twice_the_principal_point_is_whole(
    h, w, fx, fy, x2, y2, factor
) -> None:
    view = camera(fx, fy, x2 / 2, y2 / 2)
    small = ray_directions(image(CELL * h, CELL * w), (h, w), view)
    large = ray_directions(image(factor * CELL * h, factor * CELL * w), (h, w), scaled(view, factor))
    assert same(small, large)


def test_the_released_form_rounds_other_principal_points_down() -> None:
    view = camera(30, 30, 10.3, 10)
    small, large = (ray_directions(image(20, 21), (5, 5), scaled(view, s)) for s in (1.0, 2.0))
    assert (small - large).abs().max() > 1e-3  # 20.6 became 20, 41.2 became 41


@pytest.mark.parametrize("form", ORIGINAL_SIZES)
@given(h=sides, w=sides, fx=focals, fy=focals)
@settings(max_examples=20)
def test_the_same_viewing_direction_has_the_same_phase_in_any_grid(form, h, w, fx, fy) -> None:
    """Cells of a grid and of one three times as fine that share their centre: queries meet their keys."""
    view = camera(fx, fy, CELL * w / 2, CELL * h / 2)
    coarse, fine = (
        rotation(ray_directions(image(CELL * h, CELL * w), (s * h, s * w), view, form), 64) for s in (1, 3)
    )
    for few, many in zip(coarse, fine, strict=True):
        assert_close(few, many[:, :, 1::3, 1::3], terms=16, scale=64)  # angles of up to 2 pi 3^4 / 8


@st.composite
def crops(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """(cells of an image), (top, left, rows, columns of a crop in cells)."""
    h, w = draw(st.integers(4, 10)), draw(st.integers(4, 10))
    rows, cols = draw(st.integers(2, h - 1)), draw(st.integers(2, w - 1))
    return (h, w), (draw(st.integers(0, h - rows)), draw(st.integers(0, w - cols)), rows, cols)


def cropped(view: Camera, top: int, left: int) -> Camera:
    """The true camera of a crop: its principal point moves."""
    return Camera(view.intrinsics - torch.tensor([[0.0, 0, CELL * left, CELL * top]]))


@given(crops(), focals, focals, shares, shares)
@settings(max_examples=60)
def test_a_crop_with_its_true_principal_point_keeps_its_rays(crop, fx, fy, x, y) -> None:
    (h, w), (top, left, rows, cols) = crop
    view = camera(fx, fy, x * CELL * w, y * CELL * h)
    whole = ray_directions(image(CELL * h, CELL * w), (h, w), view, "image")
    part = image(CELL * rows, CELL * cols)
    assert same(
        ray_directions(part, (rows, cols), cropped(view, top, left), "image"),
        whole[:, :, top : top + rows, left : left + cols],
    )


@given(crops(), focals, focals)
@settings(max_examples=60)
def test_the_released_form_keeps_them_for_crops_around_the_centre_only(crop, fx, fy) -> None:
    """It takes the principal point for the middle of the image, so of other crops it sees another place."""
    (h, w), (top, left, rows, cols) = crop
    view = camera(fx, fy, CELL * w / 2, CELL * h / 2)
    whole = ray_directions(image(CELL * h, CELL * w), (h, w), view)
    true = cropped(view, top, left)
    if float(true.intrinsics[0, 2:].min()) < 1:
        return  # without a principal point inside the crop that form has no size at all
    seen = ray_directions(image(CELL * rows, CELL * cols), (rows, cols), true)
    expected = whole[:, :, top : top + rows, left : left + cols]
    centred = 2 * top + rows == h and 2 * left + cols == w
    assert same(seen, expected) == centred


@pytest.mark.parametrize("form", ORIGINAL_SIZES)
@given(crop=crops())
@settings(max_examples=30)
def test_a_crop_taken_for_a_full_image_does_not_keep_its_rays(form, crop) -> None:
    (h, w), (top, left, rows, cols) = crop
    view = Camera(default_intrinsics(image(CELL * h, CELL * w)))
    whole = ray_directions(image(CELL * h, CELL * w), (h, w), view, form)
    alone = ray_directions(image(CELL * rows, CELL * cols), (rows, cols), None, form)
    assert (alone - whole[:, :, top : top + rows, left : left + cols]).abs().max() > 1e-2


@given(st.lists(st.tuples(focals, focals, shares, shares), min_size=2, max_size=4))
@settings(max_examples=30)
def test_images_of_a_batch_have_cameras_of_their_own(views) -> None:
    """In the form "image"; in the released one a neighbour's principal point moves an image's rays."""
    many = Camera(torch.tensor([(fx, fy, 60 * x, 40 * y) for fx, fy, x, y in views]))
    together = ray_directions(image(40, 60, len(views)), (4, 6), many, "image")
    for i in range(len(views)):
        alone = ray_directions(image(40, 60), (4, 6), Camera(many.intrinsics[i : i + 1]), "image")
        assert same(together[i : i + 1], alone)


@given(st.tuples(focals, focals), st.tuples(*[st.floats(-3, 3)] * 3), st.integers(1, 3))
@settings(max_examples=20)
def test_angles_of_one_camera_differ_by_directions_alone(focal, place, factor) -> None:
    """With origins, a pinhole camera's angles are a constant plus those of directions: nothing of q.k is
    left of them. Moments are a linear function of the direction, another one for another place."""
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor(place)
    view = Camera(torch.tensor([[*focal, 12.0, 10.0]]), pose)
    rays = ray_directions(image(20, 24), (5 * factor, 6), view)
    origins = view.pose[:, :3, 3, None, None]
    with_origin, without = ray_angles(rays, 64, origins), ray_angles(rays, 64)
    rest = with_origin - without
    assert_close(rest, rest[:, :1, :1].expand_as(rest), scale=with_origin)
    moments = ray_moments(rays, view)
    x, y, z = place
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float32)
    assert same(moments, torch.einsum("ij,bjhw->bihw", cross, rays))
