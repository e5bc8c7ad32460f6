"""Frames: images as Pillow makes them, maps and cameras that follow them exactly, and the way back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from framing import (
    GEOMETRIES,
    SOURCES,
    STRIDE,
    frames,
    numbered,
    picture,
    pillow,
    pillow_map,
    plane,
    posed,
    rays,
)
from hypothesis import given
from hypothesis import strategies as st

from upbench.contracts.geometry import Frame, Geometry
from upbench.contracts.sample import IGNORE, Camera, Sample
from upbench.errors import UpbenchError
from upbench.testing import assert_close

FRAMES = dict(frames())
every_frame = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)

HANGING = Frame((20, 30), (10, 15), (18, 12), (-3, 9), fill=(9, 8, 7), filter="bicubic")
"""One that hangs over the border on two sides, as no geometry of the package has it."""


class TestImages:
    @every_frame
    def test_equal_what_pillow_does_step_by_step(self, frame: Frame) -> None:
        image = picture(*frame.source)
        made = frame.image(image)
        assert made.dtype == torch.float32
        assert made.is_contiguous()
        assert torch.equal(made, pillow(image, frame).float() / 255)

    @pytest.mark.parametrize("mirrored", [False, True])
    def test_what_hangs_over_the_border_is_filled(self, mirrored: bool) -> None:
        frame = replace(HANGING, mirrored=mirrored)
        image = picture(20, 30)
        expected = pillow(image, frame)  # Pillow's own fill is black
        outside = ~frame.inside()
        expected[:, outside] = torch.tensor([9, 8, 7], dtype=torch.uint8)[:, None]
        assert int(outside.sum()) > 50
        assert torch.equal(frame.image(image), expected.float() / 255)

    @pytest.mark.parametrize("side", [224, 448])
    def test_equal_torchvisions_resize_and_centre_crop(self, side: int) -> None:
        transforms = pytest.importorskip("torchvision.transforms")
        from PIL import Image

        from upbench.protocols.geometry import SquareCrop

        geometry = SquareCrop(side, filter="bilinear", long_side="floor", centre="round")
        theirs = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
            ]
        )
        label_way = transforms.Compose(
            [transforms.Resize(side, transforms.InterpolationMode.NEAREST), transforms.CenterCrop(side)]
        )
        for height, width in (
            (375, 500),
            (500, 333),
            (281, 500),
            (427, 640),
            (side, side + 1),
            (side + 3, side),
        ):
            image = picture(height, width)
            shown = Image.fromarray(image.permute(1, 2, 0).numpy())
            (frame,) = geometry.frames((height, width))
            assert torch.equal(frame.image(image), theirs(shown))
            label = numbered(height, width)
            expected = torch.tensor(label_way(Image.fromarray(label.numpy())).get_flattened_data()).view(
                side, side
            )
            assert torch.equal(frame.nearest(label, sampling="pillow"), expected.int())


class TestMaps:
    @every_frame
    def test_pillow_sampling_is_pillows_nearest(self, frame: Frame) -> None:
        label = numbered(*frame.source)
        expected = pillow_map(label, frame, fill=-1)
        inside = frame.inside(sampling="pillow")
        assert torch.equal(inside, expected >= 0)
        assert torch.equal(frame.nearest(label, sampling="pillow")[inside], expected[inside])

    @every_frame
    def test_floor_sampling_is_pytorchs_nearest_of_the_frames_map(self, frame: Frame) -> None:
        """Of the mirrored frame's own map where it is mirrored, as a training loop does it."""
        label = numbered(*frame.source)
        own = frame.nearest(label, sampling="pillow").masked_fill(~frame.inside(sampling="pillow"), -1)
        for size in ((16, 16), (9, 31), (120, 77)):
            expected = F.interpolate(own[None, None].float(), size, mode="nearest")[0, 0].int()
            inside = frame.inside(size, "floor")
            assert torch.equal(inside, expected >= 0)
            assert torch.equal(frame.nearest(label, size, "floor")[inside], expected[inside])

    @every_frame
    def test_centre_sampling_takes_the_stored_pixel_under_each_centre(self, frame: Frame) -> None:
        """In whole numbers: where a centre falls on an edge, the pixel after it."""
        label = numbered(*frame.source)
        for size in (frame.size, (16, 16), (2 * frame.size[0] - 1, 3)):
            axes = []
            for axis in (0, 1):
                at = []
                for i in range(size[axis]):
                    place = Fraction(2 * i + 1, 2) * frame.size[axis] / size[axis] + frame.offset[axis]
                    at.append(int(place * frame.canvas[axis] / frame.resized[axis] // 1) - frame.pad[axis])
                axes.append(at[::-1] if axis == 1 and frame.mirrored else at)
            rows, cols = (torch.tensor(at) for at in axes)
            inside = ((rows >= 0) & (rows < frame.source[0]))[:, None] & (
                (cols >= 0) & (cols < frame.source[1])
            )
            assert torch.equal(frame.inside(size), inside)
            found = frame.nearest(label, size)
            expected = label[rows.clamp(0, frame.source[0] - 1)][:, cols.clamp(0, frame.source[1] - 1)]
            assert torch.equal(found[inside], expected[inside])

    @every_frame
    def test_centre_sampling_is_nearest_exact_where_no_centre_is_on_an_edge(self, frame: Frame) -> None:
        label = numbered(*frame.source)
        top, left, bottom, right = frame.pad
        canvas = F.pad(label, (left, right, top, bottom), value=-1)
        whole = F.interpolate(canvas[None, None].double(), frame.resized, mode="nearest-exact")[0, 0].int()
        (h, w), (r, c) = frame.size, frame.offset
        expected, sure = whole[r : r + h, c : c + w], _sure(frame)
        if frame.mirrored:
            expected, sure = expected.flip(1), sure.flip(1)
        inside = frame.inside()
        assert torch.equal(inside[sure], (expected >= 0)[sure])
        assert torch.equal(frame.nearest(label)[inside & sure], expected[inside & sure])
        assert sure.any() or frame.canvas == (2 * frame.resized[0], 2 * frame.resized[1])  # all on edges

    @every_frame
    def test_a_mirrored_map_is_the_map_mirrored(self, frame: Frame) -> None:
        label, other = numbered(*frame.source), frame.mirror()
        for how in ("centre", "pillow"):
            for size in (None, (20, 20), (9, 31)):
                assert torch.equal(other.nearest(label, size, how), frame.nearest(label, size, how).flip(1))
                assert torch.equal(other.inside(size, how), frame.inside(size, how).flip(1))
        assert other.mirror() == frame

    @pytest.mark.parametrize("mirrored", [False, True])
    def test_what_hangs_over_the_border_is_not_inside(self, mirrored: bool) -> None:
        frame = replace(HANGING, mirrored=mirrored)
        expected = torch.zeros(18, 12, dtype=torch.bool)
        expected[3:13, :6] = True
        assert torch.equal(frame.inside(), expected.flip(1) if mirrored else expected)
        assert torch.equal(frame.inside(sampling="pillow"), frame.inside())

    def test_ground_truth_goes_along(self) -> None:
        frame = FRAMES["padded of 61x83, mirrored"]
        height, width = frame.source
        sample = replace(
            plane(height, width),
            label=torch.randint(7, (height, width), dtype=torch.int16),
            valid=torch.rand(height, width) > 0.2,
        )
        for size in (None, (16, 16)):
            framed = frame.of(sample, size)
            inside = frame.inside(size)
            assert framed.name == "plane"
            assert torch.equal(framed.image, frame.image(sample.image))
            assert framed.label.dtype == torch.int64
            assert torch.equal(
                framed.label, frame.nearest(sample.label, size).long().masked_fill(~inside, IGNORE)
            )
            assert torch.equal(framed.valid, frame.nearest(sample.valid, size) & inside)
            assert torch.equal(framed.depth, frame.nearest(sample.depth, size) * inside)
            signs = torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
            assert torch.equal(framed.normal, frame.nearest(sample.normal, size) * signs * inside)
            assert (~inside).any()
            truth = frame.truth(sample, size)
            assert truth.image.numel() == 0
            assert torch.equal(truth.label, framed.label)

    def test_a_sample_without_ground_truth_is_valid_where_there_is_an_image(self) -> None:
        frame = FRAMES["padded of 61x83"]
        framed = frame.of(Sample("bare", picture(61, 83)))
        assert (framed.label, framed.depth, framed.normal, framed.camera) == (None,) * 4
        assert torch.equal(framed.valid, frame.inside())


def _sure(frame: Frame) -> torch.Tensor:
    """Pixels of the (unmirrored) frame whose centre lies on no edge between stored pixels."""
    axes = []
    for axis in (0, 1):
        index = torch.arange(frame.size[axis]) + frame.offset[axis]
        axes.append((2 * index + 1) * frame.canvas[axis] % (2 * frame.resized[axis]) != 0)
    return axes[0][:, None] & axes[1][None, :]


class TestCameras:
    @every_frame
    def test_points_are_seen_where_the_frame_shows_them(self, frame: Frame) -> None:
        """The pixel of the stored image that shows a point goes where the frame's camera sees the point; that
        of a mirrored frame sees the mirrored world."""
        self.reproject(frame, posed(), with_pose=True)
        self.reproject(frame, posed(), with_pose=False)

    def reproject(self, frame: Frame, camera: Camera, with_pose: bool) -> None:
        pose = camera.pose[0] if with_pose else torch.eye(4, dtype=torch.float64)
        camera = camera if with_pose else Camera(camera.intrinsics)
        seen = torch.randn(50, 3, dtype=torch.float64) + torch.tensor([0.0, 0, 6])
        world = seen @ pose[:3, :3].T + pose[:3, 3]
        x, y = _project(world, camera)
        (ch, cw), (rh, rw) = frame.canvas, frame.resized
        x = (x + frame.pad[1]) * rw / cw - frame.offset[1]
        y = (y + frame.pad[0]) * rh / ch - frame.offset[0]
        if frame.mirrored:
            x, world = frame.size[1] - x, world * torch.tensor([-1.0, 1, 1])
        found = _project(world, frame.camera(camera))
        assert_close(torch.stack(found), torch.stack([x, y]), terms=4096)
        assert (frame.camera(camera).pose is None) != with_pose

    def test_a_mirrored_cameras_pose_is_a_rotation_still(self) -> None:
        camera = FRAMES["square of 61x83, mirrored"].camera(posed())
        rotation = camera.pose[0, :3, :3]
        assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64))
        assert_close(torch.linalg.det(rotation), torch.tensor(1.0, dtype=torch.float64))

    def test_precision_is_that_of_the_camera(self) -> None:
        camera = posed(dtype=torch.float32)
        found = FRAMES["square of 61x83"].camera(camera)
        assert found.intrinsics.dtype == torch.float32

    @pytest.mark.parametrize("mirrored", [False, True])
    @pytest.mark.parametrize(
        "frame",
        [
            Frame((48, 66), (48, 66), (48, 66)),
            Frame((48, 66), (48, 66), (20, 31), (7, 13)),
            Frame((48, 66), (16, 22), (16, 22)),  # a third: centres on centres
            Frame((48, 66), (18, 22), (12, 16), (3, 5), pad=(6, 0, 0, 0)),
        ],
    )
    def test_depth_normals_and_camera_tell_of_one_plane(self, frame: Frame, mirrored: bool) -> None:
        frame = replace(frame, mirrored=mirrored)
        framed = frame.of(plane(48, 66))
        directions = rays(framed.camera, *frame.size)
        points = directions * framed.depth
        apart = (framed.normal * points).sum(0)
        assert_close(apart[framed.valid], torch.full_like(apart[framed.valid], -2))
        assert framed.valid.any()
        if mirrored:
            assert float(framed.normal[0].min()) < 0


def _project(world: torch.Tensor, camera: Camera) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels at which a camera sees points of the world."""
    points = world
    if camera.pose is not None:
        pose = camera.pose[0]
        points = (world - pose[:3, 3]) @ pose[:3, :3]
    fx, fy, cx, cy = camera.intrinsics[0]
    return points[:, 0] / points[:, 2] * fx + cx, points[:, 1] / points[:, 2] * fy + cy


class TestAssembly:
    @pytest.mark.parametrize("name", GEOMETRIES)
    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_constants_stay_constant_and_seen_pixels_are_marked(self, name, source, mirrored) -> None:
        geometry = GEOMETRIES[name]
        some = [f.mirror() if mirrored else f for f in geometry.frames(source, STRIDE)]
        values = torch.tensor([3.0, -0.7])[:, None, None]
        marked = _seen(some)
        for grid in (None, (9, 9), (50, 31)):
            whole, seen = geometry.assemble(some, [values.expand(2, *(grid or f.size)) for f in some])
            assert whole.shape == (2, *source)
            assert torch.equal(seen, marked)
            assert_close(whole[:, seen], values[:, 0].expand(2, int(seen.sum())))
            assert not whole[:, ~(seen | _near(seen))].any()

    def test_windows_are_averaged_where_they_overlap(self) -> None:
        geometry = GEOMETRIES["windows"]
        source = (28, 64)  # no resize
        some = geometry.frames(source)
        assert [f.offset for f in some] == [(0, 0), (0, 20), (0, 36)]
        predictions = [torch.randn(2, 28, 28) for _ in some]
        whole, seen = geometry.assemble(some, predictions)
        assert seen.all()
        first, second, third = predictions
        assert_close(whole[..., :20], first[..., :20])
        assert_close(whole[..., 20:28], (first[..., 20:] + second[..., :8]) / 2)
        assert_close(whole[..., 28:36], second[..., 8:16])
        assert_close(whole[..., 36:48], (second[..., 16:] + third[..., :12]) / 2)
        assert_close(whole[..., 48:], third[..., 12:])

    @pytest.mark.parametrize("name", ["native", "squash", "native, short"])
    def test_a_whole_image_is_resized_back_bilinearly(self, name: str) -> None:
        geometry = GEOMETRIES[name]
        (frame,) = geometry.frames((61, 83), STRIDE)
        prediction = torch.randn(3, *frame.size)
        whole, seen = geometry.assemble([frame], [prediction])
        assert_close(whole, F.interpolate(prediction[None], (61, 83), mode="bilinear")[0])
        assert seen.all()
        flipped, _ = geometry.assemble([frame.mirror()], [prediction.flip(-1)])
        assert torch.equal(flipped, whole)
        coarse = torch.randn(3, 5, 6)
        whole, _ = geometry.assemble([frame], [coarse])
        onto = F.interpolate(coarse[None], frame.size, mode="bilinear")
        assert_close(whole, F.interpolate(onto, (61, 83), mode="bilinear")[0])

    def test_a_padded_image_loses_its_border(self) -> None:
        geometry = GEOMETRIES["padded"]
        (frame,) = geometry.frames((61, 83))
        assert frame.pad == (11, 0, 11, 0)
        prediction = torch.randn(3, 56, 56)
        whole, seen = geometry.assemble([frame], [prediction])
        expected = F.interpolate(prediction[None], (83, 83), mode="bilinear")[0]
        assert_close(whole, expected[:, 11:72])
        assert seen.all()

    def test_what_was_cut_off_does_not_bleed_into_what_was_seen(self) -> None:
        """A crop in the middle of an image that is made twice as large again: its border keeps its values."""
        frame = Frame((20, 40), (10, 20), (10, 10), (0, 5))
        prediction = torch.full((1, 10, 10), 5.0)
        whole, seen = GEOMETRIES["square"].assemble([frame], [prediction])
        expected = torch.zeros(20, 40, dtype=torch.bool)
        expected[:, 10:30] = True
        assert torch.equal(seen, expected)
        assert_close(whole[0][seen], torch.full((400,), 5.0))

    def test_labels_can_be_enlarged_by_nearest(self) -> None:
        """The largest of the result is the enlarged map of the largest."""
        for name in ("square", "native", "windows", "padded"):
            geometry = GEOMETRIES[name]
            some = geometry.frames((61, 83), STRIDE)
            predictions = [torch.randn(4, 9, 9) for _ in some]
            whole, seen = geometry.assemble(some, predictions, nearest=True)
            if len(some) > 1:
                continue  # averages of several have no map of labels before
            (frame,) = some
            label = F.interpolate(
                predictions[0].argmax(0)[None, None].float(), frame.size, mode="nearest-exact"
            )
            canvas = torch.full(frame.resized, -1.0)
            (h, w), (top, left) = frame.size, frame.offset
            canvas[top : top + h, left : left + w] = label[0, 0]
            expected = F.interpolate(canvas[None, None], frame.canvas, mode="nearest-exact")[0, 0]
            rows = slice(frame.pad[0], frame.pad[0] + 61)
            assert torch.equal(
                whole.argmax(0)[seen].float(), expected[rows, frame.pad[1] : frame.pad[1] + 83][seen]
            )


def _seen(some: list[Frame]) -> torch.Tensor:
    """Stored pixels whose centre some frame shows."""
    marked = torch.zeros(some[0].source, dtype=torch.bool)
    for frame in some:
        axes = []
        for axis in (0, 1):
            inside = []
            for i in range(frame.source[axis]):
                place = Fraction(2 * (i + frame.pad[axis]) + 1, 2) * frame.resized[axis] / frame.canvas[axis]
                inside.append(0 <= place // 1 - frame.offset[axis] < frame.size[axis])
            axes.append(torch.tensor(inside))
        marked |= axes[0][:, None] & axes[1][None, :]
    return marked


def _near(seen: torch.Tensor) -> torch.Tensor:
    """Pixels within reach of a bilinear resize of those that were seen."""
    return F.max_pool2d(seen[None].float(), 9, 1, 4)[0] > 0


class TestFrames:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"filter": "bilinaer"}, "unknown filter 'bilinaer'; did you mean 'bilinear'"),
            ({"size": (0, 4)}, "is empty"),
            ({"pad": (-1, 0, 0, 0)}, "is empty"),
        ],
    )
    def test_impossible_frames_are_refused(self, values: dict, message: str) -> None:
        with pytest.raises(UpbenchError, match=message):
            replace(Frame((9, 9), (9, 9), (9, 9)), **values)

    def test_an_unknown_sampling_is_named(self) -> None:
        with pytest.raises(UpbenchError, match="unknown sampling 'center'; did you mean 'centre'"):
            HANGING.nearest(numbered(20, 30), sampling="center")

    @given(height=st.integers(1, 70), width=st.integers(1, 70), out=st.integers(1, 40))
    def test_any_size_is_sampled_within_the_image(self, height: int, width: int, out: int) -> None:
        frame = Frame((height, width), (out, out + 3), (out, out + 3))
        label = numbered(height, width)
        for sampling in ("centre", "pillow", "floor"):
            found = frame.nearest(label, (7, 11), sampling)
            assert int(found.min()) >= 0
            assert int(found.max()) < height * width
            assert frame.inside((7, 11), sampling).all()
            assert (found.diff(dim=0) >= 0).all()
            assert (found.diff(dim=1) >= 0).all()

    @pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
    def test_the_key_says_all_that_moves_a_pixel(self, geometry: Geometry) -> None:
        given = geometry.describe()
        assert geometry.key.startswith(type(geometry).__name__ + "(")
        for name, value in given.items():
            assert f"{name}={value!r}" in geometry.key
        assert len({g.key for g in GEOMETRIES.values()}) == len(GEOMETRIES)
