"""The contract of `Dataset`, as checks that run on any dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.errors import UpbenchError, nearest
from upbench.testing.checks import ContractError, require, run_checks

TARGETS = frozenset({"label", "depth", "normal"})


@dataclass
class DatasetCase:
    """A dataset under test.

    Attributes:
        dataset: An instance, with its folder where it needs one.
        size: Side of the samples that are loaded.
    """

    dataset: Dataset
    size: int = 56

    @property
    def splits(self) -> list[str]:
        """The splits that it declares."""
        return list(dict.fromkeys([self.dataset.train_split, *self.dataset.eval_splits]))

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """First and last sample of each split."""
        for split in self.splits:
            names = self.dataset.names(split)
            for index in sorted({0, len(names) - 1}):
                yield f"{split}/{names[index]}", self.dataset.load(split, index, self.size)


def check_dataset(
    dataset: Dataset, *, size: int = 56, skip: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Holds a dataset to the contract of `Dataset`; the first and last image of each split are loaded.

    Args:
        dataset: An instance, with its folder where it needs one.
        size: Side of the samples that are loaded, in pixels.
        skip: Name of a check (a key of `DATASET_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok".

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    title = f"dataset '{dataset.name}'"
    return run_checks(title, DATASET_CHECKS, DatasetCase(dataset, size), skip or {})


def declarations(case: DatasetCase) -> None:
    """Targets and classes are declared and fit one another."""
    dataset = case.dataset
    require(dataset.targets, "has no targets")
    require(dataset.targets <= TARGETS, f"targets {sorted(dataset.targets)} are not among {sorted(TARGETS)}")
    if "label" in dataset.targets:
        require(len(dataset.classes) > 1, "has labels but names no classes")
        require(len(dataset.classes) <= IGNORE, f"more than {IGNORE} classes: {IGNORE} is the ignored one")
        require(len(set(dataset.classes)) == len(dataset.classes), "a class is named twice")


def names(case: DatasetCase) -> None:
    """Every split has names, each once, in a fixed order; an unknown split is refused."""
    for split in case.splits:
        found = case.dataset.names(split)
        require(found, f"split '{split}' is empty")
        require(len(set(found)) == len(found), f"split '{split}' has a name twice")
        require(case.dataset.names(split) == found, f"split '{split}' changes its order")
    wrong = f"{case.splits[0]}x"
    try:
        case.dataset.names(wrong)
    except UpbenchError as error:
        guess = nearest(wrong, case.splits)
        require(guess is None or f"'{guess}'" in str(error), f"does not suggest '{guess}': {error}")
    else:
        raise ContractError(f"takes the split '{wrong}', which it does not have")


def images(case: DatasetCase) -> None:
    """Images and masks of the size asked for, in range."""
    size = case.size
    for where, sample in case.samples():
        image, valid = sample.image, sample.valid
        require(image.shape == (3, size, size), f"{where}: image {list(image.shape)}")
        require(image.dtype == torch.float32, f"{where}: image is {image.dtype}")
        require(float(image.min()) >= 0 and float(image.max()) <= 1, f"{where}: image is not in 0..1")
        require(float(image.std()) > 0, f"{where}: image is of one colour")
        require(valid.shape == (size, size), f"{where}: valid {list(valid.shape)}")
        require(valid.dtype == torch.bool, f"{where}: valid is {valid.dtype}")
        require(bool(valid.any()), f"{where}: no pixel is valid")


def ground_truth(case: DatasetCase) -> None:
    """The targets that are declared, and no others, of the right shape, type and range."""
    for where, sample in case.samples():
        for target in sorted(TARGETS):
            value: Tensor | None = getattr(sample, target)
            require(
                (value is not None) == (target in case.dataset.targets), f"{where}: {target} is {value!r:.40}"
            )
        if sample.label is not None:
            _label(where, sample.label, case)
        if sample.depth is not None:
            _depth(where, sample.depth, sample.valid, case)
        if sample.normal is not None:
            _normal(where, sample.normal, sample.valid, case)


def _label(where: str, label: Tensor, case: DatasetCase) -> None:
    require(label.shape == (case.size, case.size), f"{where}: label {list(label.shape)}")
    require(label.dtype == torch.int64, f"{where}: label is {label.dtype}")
    found = set(label.unique().tolist()) - {IGNORE}
    require(found, f"{where}: every label is ignored")
    count = len(case.dataset.classes)
    require(found <= set(range(count)), f"{where}: labels {sorted(found)} with {count} classes")


def _depth(where: str, depth: Tensor, valid: Tensor, case: DatasetCase) -> None:
    require(depth.shape == (case.size, case.size), f"{where}: depth {list(depth.shape)}")
    require(depth.dtype == torch.float32, f"{where}: depth is {depth.dtype}")
    require(
        bool(depth.isfinite().all()) and float(depth.min()) >= 0, f"{where}: depth is negative or not finite"
    )
    require(float((depth[valid] > 0).float().mean()) > 0.5, f"{where}: most valid pixels have no depth")


def _normal(where: str, normal: Tensor, valid: Tensor, case: DatasetCase) -> None:
    require(normal.shape == (3, case.size, case.size), f"{where}: normal {list(normal.shape)}")
    require(normal.dtype == torch.float32, f"{where}: normal is {normal.dtype}")
    lengths = normal.norm(dim=0)[valid]
    unit = (lengths - 1).abs() < 1e-3
    require(bool((unit | (lengths == 0)).all()), f"{where}: normals are neither of length 1 nor 0")
    require(float(unit.float().mean()) > 0.5, f"{where}: most valid pixels have no normal")


def camera(case: DatasetCase) -> None:
    """Where there is a camera, its intrinsics are those of one image, positive, its centre near the
    image's."""
    for where, sample in case.samples():
        if sample.camera is None:
            continue
        intrinsics = sample.camera.intrinsics
        require(intrinsics.shape == (1, 4), f"{where}: intrinsics {list(intrinsics.shape)}")
        fx, fy, cx, cy = intrinsics[0].tolist()
        require(min(fx, fy) > 0, f"{where}: focal lengths {fx}, {fy}")
        inside = 0 <= cx <= case.size and 0 <= cy <= case.size
        require(inside, f"{where}: principal point ({cx}, {cy}) of a {case.size}-pixel image")


def repeatable(case: DatasetCase) -> None:
    """Loading twice gives the same; another size gives that size."""
    split = case.splits[0]
    first, second = (case.dataset.load(split, 0, case.size) for _ in range(2))
    for name in ("image", "valid", *sorted(case.dataset.targets)):
        require(torch.equal(getattr(first, name), getattr(second, name)), f"{name} changes between loads")
    other = case.dataset.load(split, 0, case.size - 9)
    require(
        other.image.shape[-1] == case.size - 9, f"asked for {case.size - 9}, got {list(other.image.shape)}"
    )


def fingerprints(case: DatasetCase) -> None:
    """A short text for each split, the same every time, different for different splits."""
    found = [case.dataset.fingerprint(split) for split in case.splits]
    require(all(isinstance(f, str) and 0 < len(f) <= 64 for f in found), f"fingerprints {found}")
    require(found == [case.dataset.fingerprint(split) for split in case.splits], "fingerprints change")
    require(len(set(found)) == len(found), "two splits have one fingerprint")


DATASET_CHECKS: dict[str, Callable[[DatasetCase], None]] = {
    "declarations": declarations,
    "names": names,
    "images": images,
    "ground truth": ground_truth,
    "camera": camera,
    "repeatable": repeatable,
    "fingerprints": fingerprints,
}
