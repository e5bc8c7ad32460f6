"""Splits of any size: nothing that grows with the number of images, and the same results as for a small
one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.operator import FunctionOperator, Operator
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.sample import Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense import view as views
from upbench.dense.method import MethodCall
from upbench.dense.spill import Store, size_of
from upbench.dense.view import Batch, UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate.probe import Head, TrainingSet, View, train_probes
from upbench.features.images import RECENT, SplitImages
from upbench.protocols.geometry import SquareCrop, Windows
from upbench.registry import find_method, find_task
from upbench.testing import assert_close

SIDE, CELLS, CHANNELS, CLASSES = 48, 8, 8, 3
CROPS = [(slice(0, 24), slice(12, 36)), (slice(7, 20), slice(0, 48)), (slice(0, 24), slice(12, 36))]


class Photos(Dataset):
    """Noise with labels; says which images were read."""

    targets = frozenset({"label"})
    classes = tuple("abc")

    def __init__(self, count: int, size: tuple[int, int] = (SIDE, SIDE + 8)) -> None:
        super().__init__()
        self.count, self.shape = count, size
        self.reads: list[int] = []

    def names(self, split: str) -> list[str]:
        return [f"photo {i}" for i in range(self.count)]

    def read(self, split: str, index: int) -> Sample:
        self.reads.append(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, *self.shape), generator=generator, dtype=torch.uint8)
        label = torch.randint(CLASSES, self.shape, generator=generator, dtype=torch.uint8)
        return Sample(f"photo {index}", image, label=label)

    def fingerprint(self, split: str) -> str:
        return "photos"

    def size(self, split: str, index: int) -> tuple[int, int]:
        return self.shape


Photos.name = "photos"  # after the class body, so that the registry does not see it


class Small(Protocol):
    """Not registered, as it has no name."""

    geometry = SquareCrop(SIDE)


class Features:
    """Those of a split, in memory."""

    def __init__(self, count: int) -> None:
        self.all = torch.randn(count, CHANNELS, CELLS, CELLS)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, indices: Sequence[int]) -> Tensor:
        self.asked += indices
        return self.all[list(indices)]


def images_of(count: int, budget: int = 0) -> SplitImages:
    return SplitImages(Photos(count), "train", Small(), stride=SIDE // CELLS, budget=budget)


def built(name: str) -> Upsampler:
    method: Upsampler = find_method(name).build(channels=CHANNELS)
    return method.eval()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """No split's operators have room anywhere."""
    monkeypatch.setattr(views, "SCRATCH_BUDGET", 0)


class TestOperatorsThatAreMadeAgain:
    @pytest.mark.parametrize("crops", [None, CROPS], ids=["whole", "crops"])
    @pytest.mark.parametrize("name", ["raysup", "anyup", "jbu", "naf", "featup_jbu", "jafar"])
    def test_give_what_kept_ones_give(self, name: str, crops: Any, no_room: None) -> None:
        images, features, call = images_of(4), Features(4), MethodCall(built(name))
        kept = UpsampledSplit(call, images, features)
        again = UpsampledSplit(call, images, features, budget=0)
        assert (kept.keeps(), again.keeps()) == (True, False)
        weight, bias = torch.randn(5, CHANNELS, requires_grad=True), torch.randn(5, requires_grad=True)
        results = []
        for split in (again, kept):
            batch = split.batch([2, 0, 3], crops)
            outputs = batch.project(weight, bias)
            upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
            results.append([outputs, *torch.autograd.grad(outputs, (weight, bias), upstream), batch.dense()])
        outputs, *_ = results[0]
        # Products of queries and keys with up to 128 terms go through an exponential; then means of windows.
        assert_close(*results, terms=outputs.shape[-1] * outputs.shape[-2] * 3)

    def test_the_user_decides_how_many_files(
        self, no_room: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = (MethodCall(built("raysup")), images_of(4), Features(4))
        assert not UpsampledSplit(*given, budget=0).keeps()
        assert "(UPBENCH_SCRATCH=1 keeps them in files)" in capsys.readouterr().err
        monkeypatch.setenv("UPBENCH_SCRATCH", "1")
        assert UpsampledSplit(*given, budget=0).keeps()
        for wrong in ("much", "-3", "nan", "inf"):
            monkeypatch.setenv("UPBENCH_SCRATCH", wrong)
            with pytest.raises(UpbenchError, match=f"must be a number of GB, got '{wrong}'"):
                UpsampledSplit(*given, budget=0).keeps()

    def test_are_said_to_be_and_leave_nothing_behind(
        self, no_room: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call = MethodCall(built("raysup"))
        made: list[weakref.ref[Operator]] = []
        operator = call.operator

        def noted(*args: Any) -> Operator | None:
            found = operator(*args)
            assert found is not None
            made.append(weakref.ref(found))
            return found

        call.operator = noted  # type: ignore[method-assign]
        split = UpsampledSplit(call, images_of(12), Features(12), budget=0, title="photos/train")
        split.prepare("upsampling")
        said = capsys.readouterr().err
        assert said.count("operators of 12 images of photos/train") == 1
        assert "computed again each time" in said
        weight = torch.randn(CLASSES, CHANNELS, requires_grad=True)
        for start in range(0, 12, 3):
            split.batch([start, start + 1, start + 2], CROPS).project(weight).sum().backward()
        assert len(made) == 1 + 4 * 2  # the first look; then one for each crop of a batch
        assert not any(each() for each in made)
        assert (split.nbytes(), split._store.spilled) == (0, 0)
        assert capsys.readouterr().err == ""

    def test_of_a_small_split_are_kept_without_a_word(self, capsys: pytest.CaptureFixture[str]) -> None:
        split = UpsampledSplit(MethodCall(built("raysup")), images_of(3), Features(3))
        split.prepare("upsampling")
        assert split.nbytes() == 3 * size_of(split._view(0)) > 0
        assert "again" not in capsys.readouterr().err


class TestMethodsThatLookAtSizesAlone:
    @pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
    def test_have_one_operator_and_read_no_image(self, name: str) -> None:
        images, features, call = images_of(30), Features(30), MethodCall(built(name))
        split = UpsampledSplit(call, images, features, budget=0)
        split.prepare("upsampling")
        weight = torch.randn(CLASSES, CHANNELS)
        for start in range(0, 30, 3):
            indices = [start, start + 1, start + 2]
            found = split.batch(indices, CROPS[:1] * 3).project(weight)
            dense = call.forward(torch.zeros(3, 3, SIDE, SIDE), features.batch(indices), (SIDE, SIDE))
            expected = torch.einsum("kc,bchw->bkhw", weight, dense)[..., CROPS[0][0], CROPS[0][1]]
            assert_close(found, expected, terms=CHANNELS * CELLS)
        assert isinstance(images.dataset, Photos)
        assert set(images.dataset.reads) == {0}  # the frame that was looked at first
        assert len(split._by_size) == 1
        assert split.nbytes() == 0

    def test_have_one_for_each_size(self) -> None:
        class Two(Features):
            def batch(self, indices: Sequence[int]) -> Tensor:
                (index,) = indices
                return torch.ones(1, CHANNELS, CELLS + index % 2, CELLS)

        split = UpsampledSplit(MethodCall(built("bilinear")), images_of(6), Two(6))
        for index in range(6):
            batch = split.batch([index])
            assert_close(batch.dense(), torch.ones(1, CHANNELS, SIDE, SIDE))
        assert len(split._by_size) == 2

    @pytest.mark.parametrize("change", [{"guided": True}, {"linear": False}, {"uses_camera": True}])
    def test_are_told_by_what_they_declare(self, change: dict[str, bool]) -> None:
        kind = type("Changed", (find_method("bilinear"),), {**change, "__module__": __name__})
        split = UpsampledSplit(MethodCall(kind().eval()), images_of(3), Features(3))
        split.prepare("upsampling")
        assert split._by_size == {}
        assert split.nbytes() > 0


class TestImagesThatDoNotFit:
    @pytest.mark.parametrize("seeds", [1, 5])
    def test_are_read_once_for_each_step_that_sees_them(self, seeds: int) -> None:
        count, epochs = 50 * RECENT, 1
        images, features = images_of(count), Features(count)
        split = UpsampledSplit(MethodCall(built("nearest")), images, features)
        data = TrainingSet(View(images, split), CHANNELS, moments=lambda: pytest.fail("not asked for"))
        recipe = Recipe(epochs=epochs, shrinkage=None)
        train_probes([Head(find_task("seg")(), CLASSES, recipe)], data, range(seeds))
        assert isinstance(images.dataset, Photos)
        before = 2  # the first frame, for an operator and to tell how large frames are
        assert images.dataset.reads.count(0) <= before + epochs * seeds
        assert len(images.dataset.reads) <= before + count * epochs * seeds
        assert set(images.dataset.reads) == set(range(count))

    def test_are_held_for_as_long_as_what_prefetch_returns(self) -> None:
        images = images_of(40)
        assert isinstance(images.dataset, Photos)
        held = images.prefetch(range(30))
        first = [images.framed(i) for i in range(30)]
        assert images.dataset.reads == list(range(30))
        del held
        again = [images.framed(i) for i in range(30)]
        assert len(images.dataset.reads) > 30
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.image, other.image)
            assert one.label is not None
            assert other.label is not None
            assert torch.equal(one.label, other.label)
        assert len(images._held) <= RECENT

    def test_windows_of_an_image_are_its_own(self) -> None:
        class Sliding(Protocol):
            geometry = Windows(side=16, step=12)

        dataset = Photos(3, (40, 52))
        images = SplitImages(dataset, "train", Sliding(), stride=4)
        parts = [images.windows(image) for image in range(3)]
        assert [index for part in parts for index in part] == list(range(len(images)))
        for image, part in enumerate(parts):
            assert {images.names[index].partition("#")[0] for index in part} == {f"photo {image}"}


class TestOperatorsThatAreFunctions:
    def test_count_what_they_hold(self) -> None:
        class Guided(Upsampler):
            linear = True

            def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
                return torch.nn.functional.interpolate(features, output_size) * image.mean()

        images = images_of(10)
        split = UpsampledSplit(MethodCall(Guided().eval()), images, Features(10), budget=4 * 3 * SIDE**2 * 4)
        split.prepare("upsampling")
        assert split.nbytes() == 4 * 3 * SIDE**2 * 4  # four images of ten
        for index in range(10):
            mean = split.call.guidance(images.framed(index).image[None]).mean()
            expected = torch.nn.functional.interpolate(split.low.batch([index]), (SIDE, SIDE)) * mean
            assert_close(split.batch([index]).dense(), expected)

    def test_are_not_moved_to_files(self) -> None:
        store = Store(budget=0, count=2)
        item = FunctionOperator(lambda values: values, (4, 4), held=100)
        assert store.offer(0, item) is item
        assert 0 not in store
        assert item.crop(slice(0, 2), slice(0, 4)).nbytes() == 100


def test_batches_know_their_sizes(no_room: None) -> None:
    split = UpsampledSplit(MethodCall(built("jbu")), images_of(3), Features(3), budget=0)
    batch = split.batch([0, 1, 2], CROPS)
    assert isinstance(batch, Batch)
    assert batch.sizes == [(24, 24), (13, 48), (24, 24)]
