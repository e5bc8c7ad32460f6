"""A dataset: FOLDER/train/NAME.jpg and FOLDER/val/NAME.jpg, beside each image its label map NAME.png.

Try it with `--plugin examples/minimal_dataset.py --tasks seg --datasets beside:FOLDER`.
"""

from upbench import Dataset, Sample
from upbench.datasets import content_fingerprint, read_image, read_labels


class Beside(Dataset):
    name = "beside"
    targets = frozenset({"label"})
    classes = ("background", "thing")
    needs_root = True

    def files(self, split):
        if split not in self.splits:
            raise self.unknown_split(split, self.splits)
        return [(file, file.with_suffix(".png")) for file in sorted((self.root / split).glob("*.jpg"))]

    def names(self, split):
        return [image.stem for image, _ in self.files(split)]

    def read(self, split, index):
        image, label = self.files(split)[index]
        return Sample(image.stem, read_image(image), label=read_labels(label))

    def fingerprint(self, split):
        return content_fingerprint(f"{self.name}/{split}", self.files(split), self.classes)
