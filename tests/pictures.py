"""A small segmentation dataset in a folder, for tests that need files of images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

SIZE = (40, 48)


def folder_dataset(place: Path, shade: int = 200, count: int = 3) -> Path:
    """Pictures of a bright square on black, for `folder:PLACE`: so many for training and for evaluation."""
    height, width = SIZE
    place.mkdir()
    (place / "classes.txt").write_text("dark\nbright\n")
    for split in ("train", "val"):
        (place / split).mkdir()
        (place / f"{split}annot").mkdir()
        for number in range(count):
            label = torch.zeros(height, width, dtype=torch.uint8)
            label[10:30, 10 + number : 30 + number] = 1
            image = (label * shade).expand(3, height, width).permute(1, 2, 0)
            Image.fromarray(image.numpy()).save(place / split / f"{number}.png")
            Image.fromarray(label.numpy()).save(place / f"{split}annot" / f"{number}.png")
    return place
