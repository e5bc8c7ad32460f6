"""`check_dataset` finds what it is there to find: each broken dataset fails the check it should."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from upbench.contracts.dataset import Dataset, Pair, PairDataset, VideoDataset
from upbench.contracts.sample import IGNORE, Camera, Sample
from upbench.testing import DATASET_CHECKS, ContractError, check_dataset

HEIGHT, WIDTH = 20, 30


def sample(name: str, seed: int = 0) -> Sample:
    """Noise with every kind of ground truth."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    label[0] = IGNORE
    normal = torch.zeros(3, HEIGHT, WIDTH)
    normal[2] = -1
    return Sample(
        name,
        torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8),
        torch.rand(HEIGHT, WIDTH, generator=generator) > 0.2,
        label,
        1 + torch.rand(HEIGHT, WIDTH, generator=generator),
        normal,
        Camera(torch.tensor([[30.0, 30.0, WIDTH / 2, HEIGHT / 2]]), torch.eye(4)[None]),
    )


class Good(Dataset):
    """Sound, to be broken; unregistered, for its name comes after the class body."""

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c")
    counts = {"train": 3, "val": 5}

    def names(self, split: str) -> list[str]:
        if split not in ("train", "val"):
            raise self.unknown_split(split, ("train", "val"))
        return [f"{split}{i}" for i in range(2)]

    def read(self, split: str, index: int) -> Sample:
        return sample(self.names(split)[index], index)

    def fingerprint(self, split: str) -> str:
        return f"good-{split}"

    def size(self, split: str, index: int) -> tuple[int, int]:
        return HEIGHT, WIDTH


class Changed(Good):
    """Its samples have other fields."""

    def change(self, sample: Sample) -> dict[str, Any]:
        return {}

    def read(self, split: str, index: int) -> Sample:
        found = super().read(split, index)
        return replace(found, **self.change(found))


class FloatImage(Changed):
    def change(self, sample):
        return {"image": sample.image / 255}


class OneColour(Changed):
    def change(self, sample):
        return {"image": torch.full_like(sample.image, 7)}


class ByteMask(Changed):
    def change(self, sample):
        return {"valid": sample.valid.to(torch.uint8)}


class OtherName(Changed):
    def change(self, sample):
        return {"name": "x"}


class LabelBeyond(Changed):
    def change(self, sample):
        return {"label": torch.where(sample.label == IGNORE, IGNORE, sample.label + 1)}


class LabelOfAnotherSize(Changed):
    def change(self, sample):
        return {"label": sample.label[1:]}


class Millimetres(Changed):
    def change(self, sample):
        return {"depth": sample.depth * 1000}


class UnknownDepthIsMinusOne(Changed):
    def change(self, sample):
        return {"depth": torch.where(sample.valid, sample.depth, -1.0)}


class LongNormals(Changed):
    def change(self, sample):
        return {"normal": sample.normal * 127}


class NormalsOfOpenGL(Changed):
    def change(self, sample):
        return {"normal": -sample.normal}


class Undeclared(Good):
    targets = frozenset({"label", "depth"})


class Missing(Changed):
    def change(self, sample):
        return {"depth": None}


class CameraOfAnotherSize(Changed):
    def change(self, sample):
        return {"camera": Camera(sample.camera.intrinsics * 4)}


class ScaledPose(Changed):
    def change(self, sample):
        return {"camera": replace(sample.camera, pose=2 * sample.camera.pose)}


class Noise(Changed):
    def change(self, sample):
        return {"image": torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)}


class Hoards(Good):
    """Gives away the tensors that it keeps."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self.kept: dict[tuple[str, int], Sample] = {}

    def read(self, split: str, index: int) -> Sample:
        return self.kept.setdefault((split, index), super().read(split, index))


class OneAtATime(Good):
    """Reads into one buffer."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self.meeting = threading.Barrier(2)

    def read(self, split: str, index: int) -> Sample:
        self.index = index
        if threading.current_thread() is not threading.main_thread():
            self.meeting.wait(60)
        return sample(self.names(split)[index], self.index)


class WrongSize(Good):
    def size(self, split: str, index: int) -> tuple[int, int]:
        return WIDTH, HEIGHT


class ReadsForASize(Good):
    def size(self, split: str, index: int) -> tuple[int, int]:
        return self.read(split, index).size


class AnySplit(Good):
    def names(self, split: str) -> list[str]:
        return ["a", "b"]


class Twice(Good):
    def names(self, split: str) -> list[str]:
        return super().names(split)[:1] * 2


class OneFingerprint(Good):
    def fingerprint(self, split: str) -> str:
        return "same"


class FingerprintOfAnInstance(Good):
    def fingerprint(self, split: str) -> str:
        return f"{id(self)}-{split}"


class CountsAnotherSplit(Good):
    counts = {"training": 3}


class CountsLess(Good):
    counts = {"train": 1}


class OtherBeyond(Good):
    other_class = 3


class EvalSplitIsText(Good):
    eval_splits = "val"


class TravelsWithItsLists(Good):
    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self.files = [f"a/long/folder/{i}" for i in range(1000)]

    def __reduce__(self) -> Any:
        return object.__reduce_ex__(self, 2)


class ForgetsItsFolder(Good):
    def __reduce__(self) -> Any:
        return type(self), ()


BROKEN: dict[type[Dataset], set[Any]] = {  # with "..." where more follows from it
    FloatImage: {"images"},
    OneColour: {"images"},
    ByteMask: {"images", ...},
    OtherName: {"images"},
    LabelBeyond: {"ground truth"},
    LabelOfAnotherSize: {"ground truth"},
    Millimetres: {"ground truth"},
    UnknownDepthIsMinusOne: {"ground truth"},
    LongNormals: {"ground truth"},
    NormalsOfOpenGL: {"ground truth"},
    Undeclared: {"ground truth"},
    Missing: {"ground truth"},
    CameraOfAnotherSize: {"camera"},
    ScaledPose: {"camera"},
    Noise: {"repeatable", "threads"},
    Hoards: {"repeatable"},
    OneAtATime: {"threads"},
    WrongSize: {"sizes"},
    ReadsForASize: {"sizes"},
    AnySplit: {"names", ...},
    Twice: {"names"},
    OneFingerprint: {"fingerprints"},
    FingerprintOfAnInstance: {"fingerprints"},
    CountsAnotherSplit: {"counts"},
    CountsLess: {"counts"},
    OtherBeyond: {"declarations"},
    EvalSplitIsText: {"declarations", ...},
    TravelsWithItsLists: {"pickling"},
    ForgetsItsFolder: {"pickling"},
}


class Film(VideoDataset):
    """Sound, of two sequences; only every second frame is annotated."""

    targets = frozenset({"label"})

    def names(self, split: str) -> list[str]:
        if split != "val":
            raise self.unknown_split(split, ("val",))
        return ["one", "two"]

    def length(self, split: str, index: int) -> int:
        return 5 + index

    def frame(self, split: str, index: int, time: int) -> Sample:
        found = sample(f"{index}/{time}", 10 * index + time)
        label = None if time % 2 else found.label
        return replace(found, label=label, depth=None, normal=None)

    def fingerprint(self, split: str) -> str:
        return "film"


class NothingToFollow(Film):
    def frame(self, split: str, index: int, time: int) -> Sample:
        found = super().frame(split, index, time)
        return replace(found, label=None if found.label is None else found.label * 0)


class NotAnnotated(Film):
    def frame(self, split: str, index: int, time: int) -> Sample:
        return replace(super().frame(split, index, time), label=None)


class Rotates(Film):
    def frame(self, split: str, index: int, time: int) -> Sample:
        found = super().frame(split, index, time)
        if time < 2:
            return found
        label = None if found.label is None else found.label.T
        return replace(found, image=found.image.mT, valid=found.valid.T, label=label, camera=None)


class ReadsTheLast(Film):
    def read(self, split: str, index: int) -> Sample:
        return self.frame(split, index, 4)


class NoLength(Film):
    def length(self, split: str, index: int) -> int:
        return len(self.names(split)) / 2  # type: ignore[return-value]


class Matches(PairDataset):
    """Sound, of two pairs."""

    targets = frozenset()

    def names(self, split: str) -> list[str]:
        if split != "test":
            raise self.unknown_split(split, ("test",))
        return ["one", "two"]

    def pair(self, split: str, index: int) -> Pair:
        one, two = (
            replace(sample(f"{index}", seed), label=None, depth=None, normal=None) for seed in (index, 9)
        )
        points = torch.tensor([[3.0, 4.0], [WIDTH - 0.5, HEIGHT - 0.5]])
        return Pair(self.names(split)[index], one, two, points, points / 2, "cat", 20.0)

    def fingerprint(self, split: str) -> str:
        return "matches"


class RowsFirst(Matches):
    def pair(self, split: str, index: int) -> Pair:
        found = super().pair(split, index)
        return replace(found, source_points=found.source_points.flip(1))


class LosesAPoint(Matches):
    def pair(self, split: str, index: int) -> Pair:
        found = super().pair(split, index)
        return replace(found, target_points=found.target_points[:1])


class NoExtent(Matches):
    def pair(self, split: str, index: int) -> Pair:
        return replace(super().pair(split, index), extent=0.0)


class SaysImages(Matches):
    content = "images"


BROKEN |= {
    NothingToFollow: {"ground truth"},
    NotAnnotated: {"ground truth"},
    Rotates: {"video"},
    ReadsTheLast: {"video"},
    NoLength: {"video"},
    RowsFirst: {"pairs"},
    LosesAPoint: {"pairs"},
    NoExtent: {"pairs"},
    SaysImages: {"declarations"},
}
SOUND: list[type[Dataset]] = [Good, Film, Matches]
for _cls in (*SOUND, Changed, *BROKEN):
    _cls.name = "broken"


def failed(error: ContractError) -> set[str]:
    """Names of the checks that a message lists."""
    return set(re.findall(r"^  ([a-z ]+): ", str(error), flags=re.MULTILINE))


@pytest.mark.parametrize("cls", SOUND, ids=lambda cls: cls.__name__)
def test_sound_datasets_pass(cls: type[Dataset], tmp_path: Path) -> None:
    outcome = check_dataset(cls(tmp_path))
    skipped = {name for name, text in outcome.items() if text != "ok"}
    assert skipped == {"video", "pairs"} - {{"Film": "video", "Matches": "pairs"}.get(cls.__name__, "")}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_broken_datasets_are_found(cls: type[Dataset], tmp_path: Path) -> None:
    with pytest.raises(ContractError) as caught:
        check_dataset(cls(tmp_path))
    expected = BROKEN[cls] - {...}
    assert failed(caught.value) >= expected, str(caught.value)
    assert failed(caught.value) == expected or ... in BROKEN[cls], str(caught.value)


def test_a_check_is_skipped_with_a_reason(tmp_path: Path) -> None:
    outcome = check_dataset(FloatImage(tmp_path), skip={"images": "for a try"})
    assert outcome["images"] == "skipped: for a try"
    assert set(outcome) == set(DATASET_CHECKS)
