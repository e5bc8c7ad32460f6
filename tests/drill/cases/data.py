"""Files of data that are no good: images, label maps, lists, packed scenes, photos."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from drill.case import Case, Promise, done, refused
from drill.imagefiles import (
    HEIGHT,
    NO_FILES,
    WIDTH,
    Change,
    animated,
    bomb,
    content,
    cut,
    filled,
    flipped,
    labelled,
    loop,
    photos,
    png,
    rotated,
    saved,
    scenes,
    with_line,
)

PLAN = ("run", "--dry-run", "--methods", "bilinear", "--tasks", "seg", "--datasets")
"""Whatever is wrong with a file is told when a run is planned."""
TRAIN = ("train", "carafe", "--images", "photos", "--steps", "1", "--device", "cpu", "--out", "x.safetensors")

IMAGE, LABEL = Path("train", "1.png"), Path("trainannot", "1.png")


def image(name: str, change: Change, *words: str, ok: bool = False) -> Case:
    """A case of `folder:data`, an image of which is changed; the line must hold its path."""
    return _changed("images", name, IMAGE, change, words, ok)


def label(name: str, change: Change, *words: str, ok: bool = False) -> Case:
    """The same of a label map."""
    return _changed("label maps", name, LABEL, change, words, ok)


def listed(name: str, change: Change, *words: str, ok: bool = False) -> Case:
    """The same of the list of classes."""
    return _changed("lists", name, "classes.txt", change, words, ok)


def _changed(group: str, name: str, file: Path | str, change: Change, words: Sequence[str], ok: bool) -> Case:
    def given(place: Path) -> None:
        change(labelled(place) / file)

    promise: Promise = done("bilinear") if ok else refused(str(Path("data", file)), *words)
    return Case(group, name, (*PLAN, "folder:data"), promise, given)


def whole_folder(group: str, name: str, change: Callable[[Path], object], promise: Promise) -> Case:
    """A case of `folder:data`, which is changed as a whole."""

    def given(place: Path) -> None:
        change(labelled(place))

    return Case(group, name, (*PLAN, "folder:data"), promise, given)


def packed(
    name: str, file: str, change: Change, *words: str, told: str | None = None, ok: bool = False
) -> Case:
    """A case of `interiors:data`, one file of which is changed; `told` is the file that the line holds."""

    def given(place: Path) -> None:
        change(scenes(place) / file)

    promise: Promise = done("bilinear") if ok else refused(f"data/{told or file}", *words)
    return Case("scenes", name, (*PLAN, "interiors:data"), promise, given)


def photo(name: str, change: Change, *words: str) -> Case:
    """A case of `train`, one photo of which is changed."""

    def given(place: Path) -> None:
        change(photos(place) / "b.png")

    return Case("photos", name, TRAIN, refused("photos/b.png", *words), given)


def tiff(bits: int, photometric: int) -> Change:
    """A grey TIFF with these tags."""
    tags = ImageFileDirectory_v2()
    tags[262] = photometric
    picture = Image.new("1" if bits == 1 else "L", (WIDTH, HEIGHT))
    return saved(picture, "TIFF", tiffinfo=tags)


def value(number: int, dtype: type = np.uint8) -> Change:
    """A label map with one pixel of another value."""
    values = np.zeros((HEIGHT, WIDTH), dtype)
    values[5, 7] = number
    return saved(Image.fromarray(values))


def levels(number: int, bits: int, palette: bool = False) -> Change:
    """A label map of one value, in few bits."""
    return content(png(np.full((HEIGHT, WIDTH), number, np.uint8), bits, palette))


def renamed(name: bytes) -> Callable[[Path], object]:
    """An image gets another name."""
    return lambda root: (root / IMAGE).rename(root / "train" / os.fsdecode(name))


def other_split(make: Change) -> Callable[[Path], object]:
    """Something else in the place of the folder `val`."""

    def change(root: Path) -> None:
        (root / "val").rename(root / "old")
        make(root / "val")

    return change


GREY = Image.new("L", (WIDTH, HEIGHT))
FLOATS = Image.new("F", (WIDTH, HEIGHT))

LYING = Image.new("L", (HEIGHT, WIDTH))

IMAGES = [
    *[image(name, change, word) for name, (change, word) in NO_FILES.items()],
    image("text", content("hello"), "not an image"),
    image("a page", content("<html><body>404</body></html>"), "not an image"),
    image("a drawing that starts a program", saved(GREY, "EPS"), "not an image"),
    image("cut to its head", cut(0.3), "cannot read image"),
    image("cut to a byte", content(b"\x89"), "not an image"),
    image("a damaged middle", flipped, "cannot read image"),
    image("a bomb", bomb(60_000, 60_000), "too many"),
    image("the widest number", bomb(2**31 - 1, 2**31 - 1), "cannot read image"),
    image("no width", bomb(0, 10), "cannot read image"),
    image("a strip", filled("RGB", size=(1, 60_000)), "1 x 60000", "strip"),
    image("a lying strip", filled("RGB", size=(60_000, 2)), "strip"),
    image("floats", saved(FLOATS, "TIFF"), "floats", "8 or 16 bits"),
    image("32 bits", filled("I", 100_000, "TIFF"), "32 bits"),
    *[image(f"two pictures in a {kind}", animated(kind), "2 pictures") for kind in ("PNG", "GIF", "TIFF")],
    image("two pictures in a WebP", animated("WEBP"), "2 pictures"),
    image("16 bits", filled("I;16", 40_000), ok=True),
    image("a palette", filled("P", 3), ok=True),
    image("alpha", filled("RGBA", (1, 2, 3, 0)), ok=True),
    image("CMYK", filled("CMYK", (1, 2, 3, 4), "JPEG"), ok=True),
    image("two bits", levels(1, 2), ok=True),
]

LABELS = [
    *[label(name, change, word) for name, (change, word) in NO_FILES.items()],
    label("text", content("0 1 0 1"), "not an image"),
    label("colours", filled("RGB", (1, 1, 1)), "one channel", "rgb", "store the class of each pixel"),
    label("alpha", filled("LA", (1, 1)), "one channel", "LA"),
    label("floats", saved(FLOATS, "TIFF"), "one channel"),
    label("32 bits", filled("I", 1, "TIFF"), "one channel"),
    label("a JPEG", filled("L", 1, "JPEG"), "JPEG", "need not keep numbers"),
    label("a PGM", filled("L", 1, "PPM"), "need not keep numbers"),
    label("0 is white", tiff(8, 0), "white"),
    label("two pictures", animated("GIF"), "2 pictures"),
    label("another size", filled("L", size=(WIDTH, 10)), f"{WIDTH}x10", f"{WIDTH}x{HEIGHT}"),
    label("upright beside an image on its side", saved(LYING), "rotate"),
    label("a class too many", value(2), "value 2", "2 classes", "0 to 1"),
    label("16 bits", value(1, np.uint16), ok=True),
    label("16 bits out of range", value(300, np.uint16), "value 300", "2 classes"),
    label("16 bits of white", value(65535, np.uint16), "value 65535"),
    label("a bit", levels(1, 1), ok=True),
    label("two bits", levels(1, 2), ok=True),
    label("two bits out of range", levels(3, 2), "value 3"),
    label("four bits out of range", levels(9, 4), "value 9"),
    label("a palette of four bits", levels(1, 4, True), ok=True),
    label("a palette out of range", levels(14, 4, True), "value 14"),
    label("ignored", filled("L", 255), ok=True),
    label("a bomb", bomb(60_000, 60_000), "too many"),
    whole_folder(
        "label maps",
        "on its side as its image is",
        lambda root: [rotated(6)(root / IMAGE), rotated(6, GREY)(root / LABEL)],
        done("bilinear"),
    ),
    whole_folder(
        "label maps",
        "on its side as its image is not any more",
        lambda root: rotated(6)(root / IMAGE),
        refused("data/trainannot/1.png", "rotate"),
    ),
]

LISTS = [
    *[listed(name, change, word) for name, (change, word) in NO_FILES.items()],
    listed("latin-1", content(b"caf\xe9\nroad\n"), "UTF-8"),
    listed("UTF-16", content("dark\nbright\n".encode("utf-16")), "UTF-8"),
    listed("a byte order mark", content(b"\xef\xbb\xbfdark\nbright\n"), ok=True),
    listed("nothing but void", content("void\n"), "1 to 255"),
    listed("300 classes", content("\n".join(map(str, range(300)))), "300"),
    listed("an escape", content("dark\n\x1b[31mbright\n"), "control"),
    *[
        whole_folder("lists", name, change, refused(*words))
        for name, change, words in (
            ("a name that is not UTF-8", renamed(b"caf\xe9.png"), ("caf\\xe9.png", "rename")),
            ("a name of two lines", renamed(b"two\nlines.png"), ("two\\nlines.png", "rename")),
            ("a name that is an escape", renamed(b"\x1b[31m.png"), ("\\x1b", "rename")),
            ("no label map", lambda root: (root / LABEL).unlink(), ("1 of 3 images", str(LABEL))),
            ("no images", lambda root: [file.unlink() for file in (root / "val").iterdir()], ("data/val",)),
            ("a file instead of a split", other_split(Path.touch), ("data", "'val'")),
            ("a split that links to itself", other_split(loop), ("data", "'val'")),
            (
                "two images of one name",
                lambda root: saved(GREY)(root / "train" / "1.jpg"),
                ("data/train", "1.jpg"),
            ),
            ("a file instead of the folder", lambda root: [shutil.rmtree(root), root.touch()], ("data",)),
        )
    ],
]

INDEX, SHARD = "train.jsonl", "train-00.zip"
SCENES = [
    packed("as they should be", INDEX, with_line(), ok=True),
    *[packed(f"an index that is {name}", INDEX, *NO_FILES[name]) for name in ("empty", "a link to itself")],
    *[packed(f"a shard that is {name}", SHARD, change, word) for name, (change, word) in NO_FILES.items()],
    packed("an index that is not UTF-8", INDEX, content(b'{"seed": "\xff"}'), "UTF-8"),
    packed("half a line", INDEX, cut(0.7), "line 2", "JSON"),
    packed("a list", INDEX, content("[1, 2]\n"), "line 1", "object"),
    packed("nesting", INDEX, content("[" * 100_000), "line 1", "JSON"),
    packed("no scenes", INDEX, content("\n\n"), "no scenes"),
    packed("a seed twice", INDEX, with_line(seed=1), "seed 1", "twice"),
    packed("a shard above", INDEX, with_line(shard="../train-00.zip"), "line 1", "shard"),
    packed("a shard anywhere", INDEX, with_line(shard="/etc/passwd"), "line 1", "shard"),
    packed("a shard of another kind", INDEX, with_line(shard="val.jsonl"), "line 1", "shard"),
    packed("a shard of a number", INDEX, with_line(shard=3), "line 1", "shard"),
    packed("a shard that is not there", INDEX, with_line(shard="other.zip"), told="other.zip"),
    packed("a seed that is a path", INDEX, with_line(seed="../../x"), "line 1", "seed"),
    packed("a seed below 0", INDEX, with_line(seed=-1), "line 1", "seed"),
    packed("no seed", INDEX, with_line(seed=None), "line 1", "seed"),
    packed("a size of half a pixel", INDEX, with_line(size=0.5), "line 1", "size"),
    packed("a size of everything", INDEX, with_line(size=10**9), "line 1", "size"),
    packed("no focal length", INDEX, with_line(intrinsics=[0.0, 40.0, 16.0, 16.0]), "line 1", "intrinsics"),
    packed("a focal length that is no number", INDEX, with_line(intrinsics=[float("nan")] * 4), "intrinsics"),
    packed("an endless one", INDEX, with_line(intrinsics=[float("inf"), 40.0, 1.0, 1.0]), "intrinsics"),
    packed("three numbers", INDEX, with_line(intrinsics=[40.0, 40.0, 16.0]), "intrinsics"),
    packed("no camera", INDEX, with_line(intrinsics=None), "line 1", "intrinsics"),
    packed("a shard of text", SHARD, content("PK but no zip"), "copy it again"),
    packed("half a shard", SHARD, cut(0.5), "copy it again"),
    packed("a scene that the shard lacks", INDEX, with_line(seed=77), "77.jpg", told=SHARD),
]

PHOTOS = [
    *[photo(name, change, word) for name, (change, word) in NO_FILES.items() if name != "a folder"],
    photo("text", content("hello"), "not an image"),
    photo("a bomb", bomb(60_000, 60_000), "too many"),
    photo("a strip", filled("RGB", size=(1, 60_000)), "strip"),
    photo("two pictures", animated("GIF"), "2 pictures"),
    Case(
        "photos", "no images", TRAIN, refused("photos", "no images"), lambda place: (place / "photos").mkdir()
    ),
    Case(
        "photos",
        "a file instead of the folder",
        TRAIN,
        refused("photos", "not a folder"),
        lambda place: (place / "photos").write_text(""),
    ),
]

CASES = [*IMAGES, *LABELS, *LISTS, *SCENES, *PHOTOS]
