"""The frames of a split: what is read, what is kept, and what labels become."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from probing import Gallery, protocol

from upbench.contracts.geometry import Frame
from upbench.contracts.protocol import Output
from upbench.contracts.sample import IGNORE, Camera, Framed, Sample
from upbench.errors import UpbenchError
from upbench.features import images as images_module
from upbench.features.arena import Arena
from upbench.features.images import SplitImages, _Compact
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Windows
from upbench.testing import assert_close

SIZES = [(30, 40), (50, 33), (24, 70)]
FIELDS = ("image", "valid", "label", "depth", "normal")


def gallery(classes: int = 4, other: int | None = None, sizes=SIZES) -> Gallery:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (h, w) in enumerate(sizes):
        label = torch.randint(classes, (h, w), generator=generator).to(torch.int16)
        label[0] = IGNORE
        found.append(
            Sample(
                f"scene {number}",
                torch.randint(256, (3, h, w), generator=generator, dtype=torch.uint8),
                valid=torch.rand(h, w, generator=generator) > 0.1,
                label=label,
                depth=torch.rand(h, w, generator=generator),
                normal=F.normalize(torch.randn(3, h, w, generator=generator), dim=0),
                camera=Camera(torch.tensor([[30.0, 30.0, w / 2, h / 2]])),
            )
        )
    return Gallery(found, [f"class {i}" for i in range(classes)], other)


def nbytes(dataset: Gallery, index: int = 0) -> float:
    """What a frame takes in memory."""
    arena = Arena(10**9)
    images = SplitImages(
        dataset, "train", protocol(geometry=NativeAspect() if index else SquareCrop(24)), stride=4
    )
    assert _Compact.of(images.framed(index)).within(arena) is not None
    return 10**9 - arena.budget


def same(one: Framed | Sample, two: Framed | Sample) -> None:
    """To the bit."""
    assert one.name == two.name
    for name in FIELDS:
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    assert torch.equal(one.camera.intrinsics, two.camera.intrinsics)


GEOMETRIES = [SquareCrop(24), NativeAspect(), PaddedSquare(28), Windows(20, 12)]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: type(g).__name__)


class TestFrames:
    @every_geometry
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_are_those_of_the_geometry(self, geometry, mirrored):
        dataset, rules = gallery(), protocol(geometry=geometry)
        images = SplitImages(dataset, "train", rules, stride=4, mirrored=mirrored)
        index = 0
        for number, sample in enumerate(dataset.samples):
            frames = geometry.frames(sample.size, 4)
            assert images.windows(number) == list(range(index, index + len(frames)))
            for part, frame in enumerate(frames):
                frame = frame.mirror() if mirrored else frame
                name = f"scene {number}#{part}" if geometry.windows else f"scene {number}"
                expected = replace(frame.of(sample), name=name)
                same(images.framed(index), expected)
                assert images.names[index] == images.name(index) == name
                assert torch.equal(images.image(index), expected.image)
                assert images.frame(index) == frame
                same(images.stored(index), sample)
                assert images.output_size(index) == frame.size
                index += 1
        assert len(images) == len(images.names) == index
        assert images.count == 3
        assert (len(images) > 3) == geometry.windows

    def test_of_the_first_images_only(self):
        for geometry in (SquareCrop(24), Windows(20, 12)):
            images = SplitImages(gallery(), "train", protocol(geometry=geometry), limit=2)
            assert images.count == 2
            assert images.windows(1)[-1] == len(images) - 1
            whole = SplitImages(gallery(), "train", protocol(geometry=geometry))
            assert images.names == whole.names[: len(images)]
            assert images.key == whole.key  # a prefix of the same features

    def test_titles_tell_splits_apart(self):
        assert SplitImages(gallery(), "val", protocol()).title == "gallery/val"
        assert SplitImages(gallery(), "val", protocol(), mirrored=True).title == "gallery/val (mirrored)"

    def test_the_key_tells_what_is_seen_and_nothing_else(self):
        def key(dataset=None, geometry=None, **options) -> str:
            rules = protocol(geometry=geometry or SquareCrop(24))
            return SplitImages(dataset or gallery(), "train", rules, **options).key

        changed = gallery()
        changed.samples[1].image[0, 3, 3] += 1
        keys = [
            key(),
            key(changed),
            key(geometry=SquareCrop(25)),
            key(geometry=SquareCrop(24, filter="bilinear")),
            key(geometry=NativeAspect()),
            key(mirrored=True),
            key(stride=14),
        ]
        assert len(set(keys)) == len(keys)
        assert key(budget=0) == key(limit=1) == keys[0]
        labels = SplitImages(gallery(other=0), "train", protocol(labels="without_other"))
        assert labels.key == keys[0]

    def test_sizes_of_outputs(self):
        for output, expected in (
            (Output(), (28, 40)),
            (Output("image", 0.5), (14, 20)),
            (Output("features", 2.0), (14, 20)),
            (Output("fixed", side=19), (19, 19)),
        ):
            images = SplitImages(
                gallery(), "train", protocol(geometry=NativeAspect(), output=output), stride=4
            )
            assert images.output_size(0) == expected
            framed = images.framed(0)
            assert framed.valid.shape == framed.label.shape == expected
            assert framed.image.shape == (3, 28, 40)

    def test_truth_is_stacked_and_padded(self):
        images = SplitImages(gallery(), "train", protocol(geometry=NativeAspect()), stride=4)
        truth = images.truth([0, 2])
        assert truth.names == ("scene 0", "scene 2")
        assert truth.valid.shape == (2, 28, 68)
        for row, index in enumerate((0, 2)):
            framed = images.framed(index)
            h, w = framed.valid.shape
            for name in FIELDS[1:]:
                assert torch.equal(getattr(truth, name)[row, ..., :h, :w], getattr(framed, name))
        assert not truth.valid[0, :, 40:].any()
        assert (truth.label[0, :, 40:] == IGNORE).all()

    def test_truth_of_rectangles(self):
        images = SplitImages(gallery(), "train", protocol(geometry=NativeAspect()), stride=4)
        crops = [(slice(0, 8), slice(32, 40)), (slice(16, 24), slice(0, 8))]
        truth = images.truth([0, 2], crops=crops)
        assert truth.label.dtype == torch.int64
        for row, (index, (rows, cols)) in enumerate(zip((0, 2), crops, strict=True)):
            for name in FIELDS[1:]:
                wanted = getattr(images.framed(index), name)[..., rows, cols]
                assert torch.equal(getattr(truth, name)[row], wanted)
        with pytest.raises(UpbenchError, match=r"image 'scene 0' is \[28, 40\], less than"):
            images.truth([0], crops=[(slice(0, 8), slice(33, 41))])

    def test_stored_ground_truth(self):
        dataset = gallery(other=1)
        for mirrored in (False, True):
            rules = protocol(geometry=Windows(20, 12), labels="without_other")
            images = SplitImages(dataset, "val", rules, mirrored=mirrored)
            for number, sample in enumerate(dataset.samples):
                found = images.original(images.windows(number)[-1])
                assert found.name == sample.name
                assert torch.equal(found.depth, sample.depth)
                assert torch.equal(found.valid, sample.valid)
                assert set(found.label.unique().tolist()) == {0, 1, 2, IGNORE}
                assert torch.equal(found.label == IGNORE, (sample.label == 1) | (sample.label == IGNORE))


class TestKeeping:
    @every_geometry
    def test_what_is_kept_is_what_is_read(self, geometry):
        rules = protocol(geometry=geometry)
        kept, read = (SplitImages(gallery(), "train", rules, stride=4, budget=b) for b in (10**9, 0))
        assert not kept.reads, "all of it will fit"
        assert read.reads
        for _, index in itertools.product(range(2), range(len(kept))):
            same(kept.framed(index), read.framed(index))
            assert torch.equal(kept.image(index), read.image(index))
        assert not kept.reads
        assert read.reads

    def test_frames_are_read_once_while_they_fit(self):
        dataset = gallery()
        images = SplitImages(dataset, "train", protocol(), budget=2 * nbytes(dataset))
        dataset.asked.clear()
        for _, index in itertools.product(range(3), range(3)):
            images.framed(index)
        assert images.reads
        assert dataset.asked == {0: 1, 1: 1, 2: 1}  # the third is recent
        images._recent.clear()
        images.framed(2)
        assert dataset.asked == {0: 1, 1: 1, 2: 2}
        for _ in range(2):
            images.framed(0, (5, 5))
        assert dataset.asked[0] == 3  # of a size that is not the usual one
        images.framed(0, (24, 24))
        assert dataset.asked[0] == 3

    def test_what_is_read_ahead_is_there_while_somebody_holds_it(self):
        dataset = gallery(sizes=[(24, 24)] * 40)
        images = SplitImages(dataset, "train", protocol(), budget=0)
        ahead = images.prefetch(range(30))
        for _, index in itertools.product(range(2), range(30)):
            same(
                images.framed(index),
                SplitImages(gallery(sizes=[(24, 24)] * 40), "train", protocol()).framed(index),
            )
        assert dataset.asked == dict.fromkeys(range(30), 1)
        images.prefetch([3, 4])
        assert dataset.asked[3] == 1
        del ahead
        images.prefetch(range(30, 30 + images_module.RECENT))
        images.framed(3)
        assert dataset.asked[3] == 2

    def test_every_byte_survives(self):
        values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
        frame = Frame((16, 16), (16, 16), (16, 16))
        sample = Sample("one", values, label=torch.arange(256).view(16, 16))
        framed = frame.of(sample)
        compact = _Compact.of(framed)
        back = compact.restore()
        assert torch.equal(back.image, framed.image)
        assert torch.equal(back.image, values.float() / 255)
        assert torch.equal(back.label, sample.label)
        assert (back.depth, back.normal, back.camera) == (None, None, None)
        arena = Arena(5 * 256)
        kept = compact.within(arena)  # a byte a number
        assert arena.budget == 0
        assert compact.within(arena) is None
        for one, two in ((kept.restore(), back), (kept.restore(), framed)):
            for name in ("image", "valid", "label"):
                assert torch.equal(getattr(one, name), getattr(two, name))
        assert compact.truth_size == (16, 16)

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_several_threads_may_ask_at_once(self, share):
        sizes = [(24 + i, 30) for i in range(12)]
        expected = SplitImages(gallery(sizes=sizes), "train", protocol(geometry=NativeAspect()), stride=4)
        budget = int(share * sum(nbytes(expected.dataset, i) for i in range(12)))
        images = SplitImages(
            gallery(sizes=sizes), "train", protocol(geometry=NativeAspect()), stride=4, budget=budget
        )
        wrong: list[object] = []

        def ask(seed: int) -> None:
            try:
                order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
                for index in order * 3:
                    held = images.prefetch([index, (index + seed) % 12])
                    same(images.framed(index), expected.framed(index))
                    del held
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert images._arena.budget >= 0
        assert bool(images._kept) == bool(share)
        assert not set(images._kept) & set(images._held)


class TestLabels:
    def test_all_count_as_they_are(self):
        dataset = gallery(other=1)
        images = SplitImages(dataset, "train", protocol(geometry=NativeAspect()))
        assert torch.equal(images.framed(0).label, dataset.samples[0].label.long())

    @pytest.mark.parametrize("other", [0, 70, 150])
    def test_without_other_there_are_150_of_151(self, other):
        dataset = gallery(classes=151, other=other, sizes=[(40, 40)] * 3)
        images = SplitImages(dataset, "train", protocol(geometry=NativeAspect(), labels="without_other"))
        stored = torch.stack([s.label for s in dataset.samples]).long()
        found = torch.stack([images.framed(i).label for i in range(3)])
        assert torch.equal(found == IGNORE, (stored == other) | (stored == IGNORE))
        names = [name for i, name in enumerate(dataset.classes) if i != other]
        for before in {*stored.unique().tolist()} - {other, IGNORE}:
            after = found[stored == before].unique().tolist()
            assert [names[i] for i in after] == [dataset.classes[before]]

    def test_a_dataset_without_other_is_as_it_is(self):
        dataset = gallery()
        images = SplitImages(dataset, "train", protocol(geometry=NativeAspect(), labels="without_other"))
        assert torch.equal(images.framed(1).label, dataset.samples[1].label.long())

    @pytest.mark.parametrize(("value", "named"), [(4, "0 to 4"), (-1, "-1 to 3"), (254, "0 to 254")])
    def test_labels_that_are_no_class_are_named(self, value, named):
        dataset = gallery()
        dataset.samples[1].label[25, 12] = value
        images = SplitImages(dataset, "train", protocol(geometry=NativeAspect()))
        images.framed(0)
        message = f"labels {named} of image 'scene 1' are out of range: "
        message += "dataset 'gallery' names 4 classes (0 to 3; 255 is ignored)"
        for ask in (images.framed, images.original):
            with pytest.raises(UpbenchError) as error:
                ask(1)
            assert str(error.value) == message

    def test_more_classes_than_labels_have_numbers_are_refused(self):
        SplitImages(Gallery([], [str(i) for i in range(255)]), "train", protocol())
        with pytest.raises(
            UpbenchError, match="names 256 classes, but labels go from 0 to 254: 255 is ignored"
        ):
            SplitImages(Gallery([], [str(i) for i in range(256)]), "train", protocol())

    def test_samples_without_labels(self):
        dataset = gallery()
        bare = Gallery([replace(s, label=None, depth=None) for s in dataset.samples])
        images = SplitImages(bare, "train", protocol())
        for _ in range(2):
            framed = images.framed(0)
            assert framed.label is None
            assert framed.depth is None
            assert_close(framed.normal, SplitImages(dataset, "train", protocol()).framed(0).normal)
        assert images.truth([0, 1]).label is None
