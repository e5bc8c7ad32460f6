"""The contract of `Dataset`, as checks that run on any dataset."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upbench.contracts.dataset import Archive, Dataset, Pair, PairDataset, VideoDataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.errors import UpbenchError, nearest
from upbench.testing.checks import ContractError, NotApplicable, require, run_checks

TARGETS = frozenset({"label", "depth", "normal"})
PLACES = ("folder", "file", "name")
CONTENTS: dict[str, Any] = {"video": VideoDataset, "pairs": PairDataset, "images": Dataset}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FIELDS = ("image", "valid", "label", "depth", "normal")


@dataclass
class DatasetCase:
    """A dataset under test.

    Attributes:
        dataset: An instance, with its folder where it needs one.
    """

    dataset: Dataset

    @property
    def splits(self) -> list[str]:
        """The splits that it declares."""
        return self.dataset.splits

    def places(self) -> Iterator[tuple[str, int]]:
        """Split and index of the first and the last image of each split."""
        for split in self.splits:
            for index in sorted({0, len(self.dataset.names(split)) - 1}):
                yield split, index

    @cached_property
    def samples(self) -> list[tuple[str, Sample]]:
        """Where, and the sample, at all `places`; of videos also a frame in the middle and the last one."""
        dataset, found = self.dataset, []
        for split, index in self.places():
            where = f"{split}/{dataset.names(split)[index]}"
            if isinstance(dataset, VideoDataset):
                times = _some(dataset.length(split, index))
                found += [(f"{where}@{t}", dataset.frame(split, index, t)) for t in times]
            elif isinstance(dataset, PairDataset):
                pair = dataset.pair(split, index)
                found += [(f"{where}, source", pair.source), (f"{where}, target", pair.target)]
            else:
                found.append((where, dataset.read(split, index)))
        return found


def check_dataset(dataset: Dataset, *, skip: Mapping[str, str] | None = None) -> dict[str, str]:
    """Holds a dataset to the contract of `Dataset`; the first and last image of each split are read.

    Args:
        dataset: An instance, with its folder where it needs one.
        skip: Name of a check (a key of `DATASET_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok", or why it says nothing about this dataset.

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    return run_checks(f"dataset '{dataset.name}'", DATASET_CHECKS, DatasetCase(dataset), skip or {})


def declarations(case: DatasetCase) -> None:
    """Content, targets, classes and splits are declared and fit one another."""
    dataset = case.dataset
    content = next(name for name, cls in CONTENTS.items() if isinstance(dataset, cls))
    require(dataset.content == content, f"content is '{dataset.content}', its class is of {content}")
    odd = set(dataset.targets) - TARGETS
    require(not odd, f"targets {sorted(odd)} are not among {sorted(TARGETS)}")
    require(dataset.targets or content == "pairs", "has no targets")
    require(dataset.eval_splits, "has no split to evaluate on")
    require(not isinstance(dataset.eval_splits, str), "eval_splits is one text, not a sequence of them")
    if "label" in dataset.targets and content == "images":
        require(len(dataset.classes) > 1, "has labels but names no classes")
    require(len(dataset.classes) <= IGNORE, f"more than {IGNORE} classes: {IGNORE} is the ignored one")
    require(len(set(dataset.classes)) == len(dataset.classes), "a class is named twice")
    other, count = dataset.other_class, len(dataset.classes)
    in_range = other is None or (type(other) is int and 0 <= other < count)
    require(in_range, f"other_class is {other!r}, there are {count} classes")
    require(dataset.place in PLACES, f"place {dataset.place!r} is not among {PLACES}")
    require(all(isinstance(each, Archive) for each in dataset.archives), "archives holds other than Archive")
    require(not isinstance(dataset.by_hand, str), "by_hand is one text, not a sequence of steps")
    for name in ("title", "license", "source", "citation"):
        require(isinstance(getattr(dataset, name), str), f"{name} is no text")


def counts(case: DatasetCase) -> None:
    """Official counts are of splits that there are, which hold no more than that."""
    dataset = case.dataset
    for split, count in dataset.counts.items():
        require(type(count) is int and count > 0, f"counts['{split}'] is {count!r}")
        try:
            found = len(dataset.names(split))
        except UpbenchError as error:
            raise ContractError(f"counts names the split '{split}', which is not there: {error}") from error
        require(found <= count, f"split '{split}' has {found} images, counts says {count}")


def names(case: DatasetCase) -> None:
    """Every split has names, each once, in a fixed order; an unknown split is refused."""
    for split in case.splits:
        found = case.dataset.names(split)
        require(found, f"split '{split}' is empty")
        require(all(isinstance(name, str) and name for name in found), f"split '{split}': a name is no text")
        require(len(set(found)) == len(found), f"split '{split}' has a name twice")
        require(case.dataset.names(split) == found, f"split '{split}' changes its order")
    wrong = f"{case.splits[0]}x"
    try:
        case.dataset.names(wrong)
    except UpbenchError as error:
        guess = nearest(wrong, case.splits)
        require(guess is None or f"'{guess}'" in str(error), f"does not suggest '{guess}': {error}")
        require("\n" not in str(error), f"says it in several lines: {error}")
    else:
        raise ContractError(f"takes the split '{wrong}', which it does not have")


def images(case: DatasetCase) -> None:
    """Images of bytes, as they are stored; masks of the same size."""
    for where, sample in case.samples:
        image, valid = sample.image, sample.valid
        require(image.ndim == 3 and image.shape[0] == 3, f"{where}: image {list(image.shape)}, not [3, H, W]")
        require(image.dtype == torch.uint8, f"{where}: image is {image.dtype}, not uint8")
        require(image.device.type == "cpu", f"{where}: image is on {image.device}")
        require(int(image.max()) > int(image.min()), f"{where}: image is of one colour")
        if valid is not None:
            _sized(where, "valid", valid, sample, 2)
            require(valid.dtype == torch.bool, f"{where}: valid is {valid.dtype}")
            require(bool(valid.any()), f"{where}: no pixel is valid")
    if not isinstance(case.dataset, (VideoDataset, PairDataset)):
        for (split, index), (where, sample) in zip(case.places(), case.samples, strict=True):
            name = case.dataset.names(split)[index]
            require(sample.name == name, f"{where}: the sample is called '{sample.name}'")


def ground_truth(case: DatasetCase) -> None:
    """The targets that are declared, and no others, of the right shape, type and range."""
    targets, video = case.dataset.targets, case.dataset.content == "video"
    for where, sample in case.samples:
        for target in sorted(TARGETS):
            has = getattr(sample, target) is not None
            require(has <= (target in targets), f"{where}: has {target}, which is not among its targets")
            later = video and not where.endswith("@0")  # a frame need not be annotated
            require(has >= (target in targets and not later), f"{where}: has no {target}")
        valid = torch.ones(sample.size, dtype=torch.bool) if sample.valid is None else sample.valid
        if sample.label is not None:
            _label(where, sample, case)
        if sample.depth is not None:
            _depth(where, sample, valid)
        if sample.normal is not None:
            _normal(where, sample, valid)


def _sized(where: str, name: str, value: Tensor, sample: Sample, ndim: int) -> None:
    fits = value.ndim == ndim and tuple(value.shape[-2:]) == sample.size
    require(fits, f"{where}: {name} {list(value.shape)} for an image of {list(sample.size)}")


def _label(where: str, sample: Sample, case: DatasetCase) -> None:
    label = sample.label
    assert label is not None
    _sized(where, "label", label, sample, 2)
    require(label.dtype in _INTEGERS, f"{where}: label is {label.dtype}")
    found = sorted(set(label.unique().tolist()) - {IGNORE})
    if case.dataset.content == "video":
        require(found and found[0] >= 0 and found[-1] < IGNORE, f"{where}: ids of objects {found}")
        require(not where.endswith("@0") or found[-1] > 0, f"{where}: there is nothing to follow")
        return
    count = len(case.dataset.classes)
    require(found, f"{where}: every label is ignored")
    require(found[0] >= 0 and found[-1] < count, f"{where}: labels {found} with {count} classes")


def _depth(where: str, sample: Sample, valid: Tensor) -> None:
    depth = sample.depth
    assert depth is not None
    _sized(where, "depth", depth, sample, 2)
    require(depth.dtype == torch.float32, f"{where}: depth is {depth.dtype}")
    sound = bool(depth.isfinite().all()) and float(depth.min()) >= 0
    require(sound, f"{where}: depth is negative or not finite; where it is unknown it is 0")
    require(float((depth[valid] > 0).float().mean()) > 0.5, f"{where}: most valid pixels have no depth")
    require(float(depth.max()) < 1000, f"{where}: depth up to {float(depth.max()):g}: is that metres?")


def _normal(where: str, sample: Sample, valid: Tensor) -> None:
    normal = sample.normal
    assert normal is not None
    _sized(where, "normal", normal, sample, 3)
    require(normal.shape[0] == 3, f"{where}: normal {list(normal.shape)}")
    require(normal.dtype == torch.float32, f"{where}: normal is {normal.dtype}")
    lengths = normal.norm(dim=0)[valid]
    unit = (lengths - 1).abs() < 1e-3
    require(bool((unit | (lengths == 0)).all()), f"{where}: normals are neither of length 1 nor 0")
    require(float(unit.float().mean()) > 0.5, f"{where}: most valid pixels have no normal")
    away = float((normal[2][valid] > 0).float().mean())
    require(away < 0.5, f"{where}: most normals point away from the viewer (z is forward)")


def camera(case: DatasetCase) -> None:
    """Where there is a camera, its intrinsics are those of the image as it is stored, and its pose a
    motion."""
    for where, sample in case.samples:
        if sample.camera is None:
            continue
        intrinsics, pose = sample.camera.intrinsics, sample.camera.pose
        require(intrinsics.shape == (1, 4), f"{where}: intrinsics {list(intrinsics.shape)}")
        fx, fy, cx, cy = intrinsics[0].tolist()
        height, width = sample.size
        require(min(fx, fy) > 0, f"{where}: focal lengths {fx}, {fy}")
        central = abs(cx - width / 2) <= width / 4 and abs(cy - height / 2) <= height / 4
        require(central, f"{where}: principal point ({cx:g}, {cy:g}) of an image of {width}x{height}")
        if pose is not None:
            turn = pose[0, :3, :3].double()
            off = float((turn @ turn.T - torch.eye(3, dtype=torch.float64)).abs().max())
            require(off < 1e-3 and float(turn.det()) > 0, f"{where}: the pose is no rotation and translation")


def sizes(case: DatasetCase) -> None:
    """`size` tells the size that `read` gives; where it is overridden, without reading."""
    dataset: Any = case.dataset
    places = list(case.places())
    expected = [dataset.read(split, index).size for split, index in places]
    own = type(dataset).size is not Dataset.size
    if own:
        dataset.read = _never
    try:
        found = [tuple(dataset.size(split, index)) for split, index in places]
    finally:
        if own:
            del dataset.read
    for (split, index), one, two in zip(places, found, expected, strict=True):
        require(one == two, f"size('{split}', {index}) is {one}, the image {two}")


def _never(split: str, index: int) -> Sample:
    raise ContractError("size() reads the image, as it would if it were not overridden")


def repeatable(case: DatasetCase) -> None:
    """Reading twice gives the same, also after what was read first has been changed."""
    split, dataset = case.splits[0], case.dataset
    first = dataset.read(split, 0)
    kept = _contents(first)
    for value in (getattr(first, name) for name in _FIELDS):
        if value is not None and 0 not in value.stride():  # an expanded one cannot be written to
            value.zero_()
    _same(kept, _contents(dataset.read(split, 0)), "changes between reads")


def threads(case: DatasetCase) -> None:
    """Several threads that read at once get what one gets."""
    places = list(case.places()) * 3
    alone = {place: _contents(case.dataset.read(*place)) for place in set(places)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda place: _contents(case.dataset.read(*place)), places))
    for place, found in zip(places, together, strict=True):
        _same(alone[place], found, "is another when several threads read")


def fingerprints(case: DatasetCase) -> None:
    """A short text for each split, the same every time and for the dataset opened anew, different for
    different splits."""
    dataset = case.dataset
    found = [dataset.fingerprint(split) for split in case.splits]
    require(all(isinstance(f, str) and 0 < len(f) <= 64 for f in found), f"fingerprints {found}")
    require(found == [dataset.fingerprint(split) for split in case.splits], "fingerprints change")
    again = type(dataset)(dataset.root)
    require(found == [again.fingerprint(split) for split in case.splits], "fingerprints are of an instance")
    require(len(set(found)) == len(found), "two splits have one fingerprint")


def pickling(case: DatasetCase) -> None:
    """It travels to another process as its class and its folder, and is the same there."""
    dataset = case.dataset
    for split in case.splits:
        dataset.names(split)  # so that lists are made, which must not travel
    data = pickle.dumps(dataset)
    allowed = 500 + len(str(dataset.root)) + len(type(dataset).__qualname__) + len(type(dataset).__module__)
    require(len(data) <= allowed, f"pickles to {len(data)} bytes: more than its class and its folder")
    again = pickle.loads(data)
    require(type(again) is type(dataset) and again.root == dataset.root, "another class or folder comes back")
    require(again.splits == dataset.splits, "other splits come back")
    for split in case.splits:
        require(again.names(split) == dataset.names(split), f"other names in split '{split}' come back")


def video(case: DatasetCase) -> None:
    """Of sequences: their lengths, and frames that are all of one size, the first being what `read` gives."""
    dataset = case.dataset
    if not isinstance(dataset, VideoDataset):
        raise NotApplicable("no video")
    for split, index in case.places():
        where = f"{split}/{dataset.names(split)[index]}"
        length = dataset.length(split, index)
        require(type(length) is int and length > 0, f"{where}: length {length!r}")
        _same(
            _contents(dataset.frame(split, index, 0)),
            _contents(dataset.read(split, index)),
            f"of {where}: read() is not its first frame",
        )
        found = {dataset.frame(split, index, time).size for time in _some(length)}
        require(len(found) == 1, f"{where}: frames of several sizes: {sorted(found)}")


def pairs(case: DatasetCase) -> None:
    """Of pairs: as many points in one image as in the other, all inside, and a length for thresholds."""
    dataset = case.dataset
    if not isinstance(dataset, PairDataset):
        raise NotApplicable("no pairs")
    for split, index in case.places():
        pair = dataset.pair(split, index)
        where = f"{split}/{dataset.names(split)[index]}"
        require(pair.name == dataset.names(split)[index], f"{where}: the pair is called '{pair.name}'")
        _points(where, pair)
        require(pair.extent > 0, f"{where}: extent {pair.extent}: thresholds are fractions of it")
        require(isinstance(pair.category, str), f"{where}: category {pair.category!r} is no text")
        _same(_contents(pair.source), _contents(dataset.read(split, index)), f"of {where}: not read()'s")


def _points(where: str, pair: Pair) -> None:
    count = len(pair.source_points)
    require(count > 0, f"{where}: no points")
    for side, sample, points in (
        ("source", pair.source, pair.source_points),
        ("target", pair.target, pair.target_points),
    ):
        require(points.shape == (count, 2), f"{where}: {side} points {list(points.shape)}, not [{count}, 2]")
        require(points.dtype == torch.float32, f"{where}: {side} points are {points.dtype}")
        height, width = sample.size
        inside = (points >= 0).all() and (points <= points.new_tensor([width, height])).all()
        require(bool(inside), f"{where}: {side} points outside the image of {width}x{height}")


def _some(count: int) -> list[int]:
    """First, middle and last of so many."""
    return sorted({0, count // 2, count - 1})


def _contents(sample: Sample) -> dict[str, Tensor | None]:
    """Copies of a sample's tensors."""
    values = {name: getattr(sample, name) for name in _FIELDS}
    if sample.camera is not None:
        values["camera"] = sample.camera.intrinsics
    return {name: None if value is None else value.clone() for name, value in values.items()}


def _same(one: Mapping[str, Tensor | None], two: Mapping[str, Tensor | None], what: str) -> None:
    require(set(one) == set(two), f"camera {what}")
    for name, a in one.items():
        b = two[name]
        same = a is b or (a is not None and b is not None and torch.equal(a, b))
        require(same, f"{name} {what}")


DATASET_CHECKS: dict[str, Callable[[DatasetCase], None]] = {
    "declarations": declarations,
    "counts": counts,
    "names": names,
    "images": images,
    "ground truth": ground_truth,
    "camera": camera,
    "sizes": sizes,
    "repeatable": repeatable,
    "threads": threads,
    "fingerprints": fingerprints,
    "pickling": pickling,
    "video": video,
    "pairs": pairs,
}
