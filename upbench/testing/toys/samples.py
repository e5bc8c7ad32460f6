"""Datasets that are made up on the spot: a few small images with every kind of ground truth."""

from __future__ import annotations

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset, Pair, PairDataset, VideoDataset
from upbench.contracts.sample import IGNORE, Camera, Sample

HEIGHT, WIDTH = 24, 32
CLASSES = 4
COUNTS = {"train": 4, "val": 3}
"""Images of each split."""


def toy_sample(seed: int) -> Sample:
    """Four tilted planes, a class and a colour each, with ignored labels, unknown depth and pixels that count
    nowhere; 24x32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    label = (y > HEIGHT // 2 - seed % 5).long() * 2 + (x > WIDTH // 2 + seed % 7).long()
    slopes = torch.rand(CLASSES, 2, generator=generator) * 0.04 - 0.02
    depth = 2.0 + label.float() + slopes[label, 0] * y + slopes[label, 1] * x
    normal = torch.stack([slopes[label, 1] * 20, slopes[label, 0] * 20, -torch.ones_like(depth)])
    normal = normal / normal.norm(dim=0)
    valid = torch.rand(HEIGHT, WIDTH, generator=generator) > 0.1
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
    noise = torch.randint(-50, 50, (3, HEIGHT, WIDTH), generator=generator)
    image = (colours[label].movedim(-1, 0) + noise).to(torch.uint8)
    label[:2] = IGNORE
    depth[~valid] = 0
    normal[:, ~valid] = 0
    camera = Camera(torch.tensor([[WIDTH, HEIGHT, WIDTH / 2, HEIGHT / 2]], dtype=torch.float32))
    return Sample(f"toy {seed}", image, valid, label, depth, normal, camera)


class ToyDataset(Dataset):
    """`toy_sample`s: four to train on, three to evaluate."""

    targets = frozenset({"label", "depth", "normal"})
    classes = tuple(f"class {i}" for i in range(CLASSES))

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [f"toy {seed}" for seed in _seeds(self, split)]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        return toy_sample(_seeds(self, split)[index])

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        return HEIGHT, WIDTH

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        return f"toy-{split}"


class ToyVideo(VideoDataset):
    """Two sequences of four frames; the scene moves by a pixel to the right from one to the next."""

    targets = frozenset({"label"})
    classes = tuple(f"object {i}" for i in range(CLASSES))

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [f"clip {seed}" for seed in _seeds(self, split)[:2]]

    def length(self, split: str, index: int) -> int:
        """See `VideoDataset.length`."""
        return 4

    def frame(self, split: str, index: int, time: int) -> Sample:
        """See `VideoDataset.frame`."""
        still = toy_sample(_seeds(self, split)[index])
        image, label = _moved(still, 0, time)
        return Sample(f"clip {index} frame {time}", image, label=label)

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        return f"toy-video-{split}"


class ToyPairs(PairDataset):
    """Three pairs of a scene and the same scene moved by two pixels down and three to the right."""

    targets = frozenset()
    train_split = "val"
    eval_splits = ("val",)

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [f"pair {seed}" for seed in _seeds(self, split)]

    def pair(self, split: str, index: int) -> Pair:
        """See `PairDataset.pair`."""
        seed = _seeds(self, split)[index]
        source = toy_sample(seed)
        image, _ = _moved(source, 2, 3)
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(6, 2, generator=generator) * torch.tensor([WIDTH - 5.0, HEIGHT - 4.0])
        return Pair(
            name=f"pair {seed}",
            source=Sample(f"pair {seed} source", source.image),
            target=Sample(f"pair {seed} target", image),
            source_points=points,
            target_points=points + torch.tensor([3.0, 2.0]),
            category=("odd", "even")[seed % 2 == 0],
            extent=float(WIDTH),
        )

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        return f"toy-pairs-{split}"


TOYS: dict[str, type[Dataset]] = {"images": ToyDataset, "video": ToyVideo, "pairs": ToyPairs}
"""Content of a dataset -> the toy that has it."""

for _toy, _name in ((ToyDataset, "toy"), (ToyVideo, "toy-video"), (ToyPairs, "toy-pairs")):
    _toy.name = _name  # after the class bodies, so that the registry does not see them


def _seeds(dataset: Dataset, split: str) -> range:
    """What the images of a split are made from; no two splits share one."""
    if split not in COUNTS:
        raise dataset.unknown_split(split, list(COUNTS))
    first = sum(count for name, count in COUNTS.items() if name < split)
    return range(first, first + COUNTS[split])


def _moved(sample: Sample, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Image and labels of a scene that moved; what comes in at one border went out at the other."""
    assert sample.label is not None
    label = sample.label.masked_fill(sample.label == IGNORE, 0)
    shift = {"shifts": (down, right), "dims": (-2, -1)}
    return sample.image.roll(**shift), label.roll(**shift)
