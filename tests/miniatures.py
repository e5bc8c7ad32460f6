"""The official layouts of the papers' datasets in miniature: a few images, the real names and formats.

Each function fills a folder and returns it; the folder is what stands behind the colon (`voc2012:FOLDER`).
Colours tell classes, so that a probe can learn them. Nothing is taken from any dataset.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)
"""(H, W) of most pictures; every third one stands upright."""


def drawing(number: int, values: Sequence[int], border: int | None = None) -> np.ndarray:
    """`[H, W]` uint8: the first value, and rectangles of others; `border` is drawn around each of these."""
    random = np.random.default_rng(number)
    height, width = SIZE if number % 3 else SIZE[::-1]
    label = np.full((height, width), values[0], np.uint8)
    for k in range(4):
        top, left = random.integers(0, height - 20), random.integers(0, width - 20)
        bottom, right = top + random.integers(8, 20), left + random.integers(8, 20)
        if border is not None:
            label[top : bottom + 1, left : right + 1] = border
            top, left = top + 1, left + 1
        label[top:bottom, left:right] = values[(3 * number + 5 * k + 7) % len(values)]
    return label


def photo(label: np.ndarray, number: int = 0) -> np.ndarray:
    """`[H, W, 3]` uint8: a colour for each value, with some noise."""
    random = np.random.default_rng(1000 + number)
    colours = np.random.default_rng(7).integers(20, 236, (256, 3))
    return (colours[label] + random.normal(0, 6, (*label.shape, 3))).clip(0, 255).astype(np.uint8)


def save(file: Path, pixels: np.ndarray, palette: bool = False) -> None:
    """Writes an image, and the folders that it is in; with a palette as VOC's label maps have one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette:
        picture.putpalette(np.random.default_rng(3).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(file)


def text(file: Path, lines: Sequence[str]) -> None:
    """Writes a list."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def voc2012(root: Path, train: int = 4, val: int = 3) -> Path:
    """VOCdevkit/VOC2012, with pictures besides that no list names, as in the real one."""
    base = root / "VOCdevkit" / "VOC2012"
    names = [f"{2007 + i % 5}_{i:06d}" for i in range(train + val + 1)]
    for i, name in enumerate(names):
        label = drawing(i, range(21), border=255)
        save(base / "JPEGImages" / f"{name}.jpg", photo(label, i))
        if i < train + val:
            save(base / "SegmentationClass" / f"{name}.png", label, palette=True)
    text(base / "ImageSets/Segmentation/train.txt", names[:train])
    text(base / "ImageSets/Segmentation/val.txt", names[train : train + val])
    return root


def sbd(root: Path, extra: int = 3, png: bool = False) -> Path:
    """`voc2012`, with annotations of more images: SBD's own files, or PNGs and a list."""
    from scipy.io import savemat

    voc2012(root)
    base = root / "VOCdevkit" / "VOC2012"
    names = [f"2008_{100 + i:06d}" for i in range(extra)]
    train = (base / "ImageSets/Segmentation/train.txt").read_text().split()
    val = (base / "ImageSets/Segmentation/val.txt").read_text().split()
    drawn = [*names, train[0], val[0]]  # SBD has images of both
    for i, name in enumerate(drawn):
        label = drawing(50 + i, range(21))
        if name in names:
            save(base / "JPEGImages" / f"{name}.jpg", photo(label, i))
        if png:
            save(base / "SegmentationClassAug" / f"{name}.png", label)
        else:
            file = root / "benchmark_RELEASE/dataset/cls" / f"{name}.mat"
            file.parent.mkdir(parents=True, exist_ok=True)
            savemat(file, {"GTcls": {"Segmentation": label, "Boundaries": np.zeros((20, 1))}})
    if png:
        text(base / "ImageSets/Segmentation/trainaug.txt", [*train, *names])
    return root


def ade20k(root: Path, train: int = 4, val: int = 3) -> Path:
    """ADEChallengeData2016; 0 is other."""
    base = root / "ADEChallengeData2016"
    for split, count, word in (("training", train, "train"), ("validation", val, "val")):
        for i in range(count):
            label = drawing(i, range(0, 151, 7))
            save(base / "images" / split / f"ADE_{word}_{i + 1:08d}.jpg", photo(label, i))
            save(base / "annotations" / split / f"ADE_{word}_{i + 1:08d}.png", label)
    return root


def cityscapes(root: Path, train_ids: bool = False) -> Path:
    """leftImg8bit and gtFine, with the archive's other files; labels by id, or by train id only."""
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",))):
        for city in cities:
            for i in range(2):
                stem = f"{city}_{i:06d}_000019"
                label = drawing(i, range(34))
                save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", photo(label, i))
                folder = root / "gtFine" / split / city
                if train_ids:
                    save(folder / f"{stem}_gtFine_labelTrainIds.png", drawing(i, [255, *range(19)]))
                else:
                    save(folder / f"{stem}_gtFine_labelIds.png", label)
                    save(folder / f"{stem}_gtFine_instanceIds.png", label.astype(np.uint16) * 1000)
                    save(folder / f"{stem}_gtFine_color.png", photo(label))
                    text(folder / f"{stem}_gtFine_polygons.json", ["{}"])
    return root


def coco_stuff(root: Path, lists: bool = True) -> Path:
    """dataset/{images,annotations} of COCO 2017; the lists name some of the images."""
    for split, count in (("train2017", 4), ("val2017", 3)):
        names = [f"{139 + 13 * i:012d}" for i in range(count)]
        for i, name in enumerate(names):
            label = drawing(i, [*range(0, 182, 9), 255])
            save(root / "dataset/images" / split / f"{name}.jpg", photo(label, i))
            save(root / "dataset/annotations" / split / f"{name}.png", label)
        if lists:
            text(root / "curated" / split / "Coco164kFull_Stuff_Coarse.txt", names[:-1])
            text(root / "curated" / split / "Coco164kFull_Stuff_Coarse_7.txt", names[:1])
    return root


def pascal_context(root: Path, folder: str = "SegmentationClassContext") -> Path:
    """VOCdevkit/VOC2010."""
    base = root / "VOCdevkit" / "VOC2010"
    for split, count in (("train", 3), ("val", 2)):
        names = [f"2008_{(100 if split == 'val' else 0) + i:06d}" for i in range(count)]
        for i, name in enumerate(names):
            label = drawing(i, range(0, 60, 4))
            save(base / "JPEGImages" / f"{name}.jpg", photo(label, i))
            save(base / folder / f"{name}.png", label, palette=True)
        text(base / "ImageSets/SegmentationContext" / f"{split}.txt", names)
    return root


def kitti_semantics(root: Path, count: int = 6) -> Path:
    """training/{image_2,semantic,semantic_rgb,instance} and testing/image_2, which has no labels."""
    for i in range(count):
        label = drawing(i, range(34))
        save(root / "training/image_2" / f"{i:06d}_10.png", photo(label, i))
        save(root / "training/semantic" / f"{i:06d}_10.png", label)
        save(root / "training/semantic_rgb" / f"{i:06d}_10.png", photo(label))
        save(root / "training/instance" / f"{i:06d}_10.png", label.astype(np.uint16) * 256)
        save(root / "testing/image_2" / f"{i:06d}_10.png", photo(label, i))
    return root


CAMERA = (518.8579, 519.4696, 325.0824, 253.2362)
"""fx, fy, cx, cy of NYU Depth v2, pixel (0, 0) having its centre at (0.5, 0.5)."""


def room(number: int, size: tuple[int, int] = (480, 640)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An empty room: depth `[H, W]` in metres, normals `[H, W, 3]` (x right, y down, z forward) and NYU-40
    labels `[H, W]`."""
    fx, fy, cx, cy = CAMERA
    x = (np.arange(size[1]) + 0.5 - cx) / fx + 0 * (np.arange(size[0])[:, None])
    y = ((np.arange(size[0]) + 0.5 - cy) / fy)[:, None] + 0 * x
    with np.errstate(divide="ignore"):
        planes = [
            (np.full_like(x, 3.0 + 0.2 * number), (0, 0, -1), 1),
            (np.where(y > 0, 1.0 / y, np.inf), (0, -1, 0), 2),
            (np.where(y < 0, -0.9 / y, np.inf), (0, 1, 0), 22),
            (np.where(x > 0, 1.3 / x, np.inf), (-1, 0, 0), 16),
            (np.where(x < 0, -1.1 / x, np.inf), (1, 0, 0), 40),
        ]
    nearest = np.argmin([depth for depth, _, _ in planes], axis=0)
    depth = np.min([depth for depth, _, _ in planes], axis=0).astype(np.float32)
    normal = np.array([normal for _, normal, _ in planes], np.float32)[nearest]
    return depth, normal, np.array([label for _, _, label in planes], np.uint8)[nearest]


def with_holes(depth: np.ndarray) -> np.ndarray:
    """Raw depth: 0 in a block, and along an edge, as the sensor leaves them."""
    raw = depth.copy()
    raw[:20], raw[100:130, 200:240] = 0, 0
    return raw


def nyuv2(root: Path, train: int = 3, test: int = 2, classes: bool = True, normals: bool = False) -> Path:
    """nyu_depth_v2_labeled.mat (MATLAB 7.3) and splits.mat; images of both splits take turns."""
    import h5py
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    count = train + test
    rooms = [room(i) for i in range(count)]
    fine = np.stack([20 * label.astype(np.uint16) for _, _, label in rooms])  # 20, 40, ... of 894 names
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:

        def put(key: str, value: np.ndarray) -> None:  # MATLAB stores columns first
            file.create_dataset(key, data=value.swapaxes(-1, -2), compression="gzip", compression_opts=1)

        put("images", np.stack([photo(label, i).transpose(2, 0, 1) for i, (_, _, label) in enumerate(rooms)]))
        put("depths", np.stack([depth for depth, _, _ in rooms]))
        put("rawDepths", np.stack([with_holes(depth) for depth, _, _ in rooms]))
        put("labels", fine)
    numbers = np.arange(count)
    chosen = numbers[numbers % 2 == 1][:test]
    rest = np.setdiff1d(numbers, chosen)
    savemat(root / "splits.mat", {"trainNdxs": rest[:, None] + 1, "testNdxs": chosen[:, None] + 1})
    if classes:
        mapped = np.full(894, 40, np.uint8)
        mapped[[20 * value - 1 for value in range(1, 41)]] = range(1, 41)
        savemat(root / "classMapping40.mat", {"mapClass": mapped[None]})
    if normals:  # x right, y up, z towards the viewer
        packed = np.stack([normal * np.float32([1, -1, -1]) for _, normal, _ in rooms])
        folder = root / "surfacenormal_metadata"
        folder.mkdir(exist_ok=True)
        with gzip.open(folder / "all_normals.pklz", "wb", compresslevel=1) as stream:
            pickle.dump(
                {"all_normals": packed, "all_filenames": [f"{n + 1:06d}" for n in numbers]}, stream, 2
            )
    return root


def nyuv2_splits(root: Path, train: int = 3, test: int = 2, labels: bool = True) -> Path:
    """official_splits/{train,test}/SCENE with 16-bit depth in millimetres, and labels40."""
    for split, numbers in (("train", range(train)), ("test", range(train, train + test))):
        for number in numbers:
            depth, _, label = room(number)
            folder = root / "official_splits" / split / ("kitchen" if number % 2 else "bedroom")
            save(folder / f"rgb_{number:05d}.jpg", photo(label, number))
            save(
                folder / f"sync_depth_{number:05d}.png", (with_holes(depth) * 1000).round().astype(np.uint16)
            )
            if labels:
                save(root / "labels40" / f"{number:05d}.png", label)
    return root


def geonet(root: Path, train: int = 3) -> Path:
    """nyu_geonet/*.mat as GeoNet's authors store them (481 rows), and nyuv2 with normals for the test."""
    from scipy.io import savemat

    (root / "nyu_geonet").mkdir(parents=True)
    names = [f"kitchen_0003_r-{1300708259 + i}.5-{i}" for i in range(train)]
    for i, name in enumerate([*names, "library_0006_r-1300708259.539496-3335480784"]):
        depth, normal, label = room(i, (481, 641))
        twice = photo(label, i).astype(np.float32) - 2 * np.float32([122.175, 116.169, 103.508])
        stored = {"img": twice, "depth": depth, "norm": normal * np.float32([1, -1, -1])}
        savemat(root / "nyu_geonet" / f"{name}.mat", stored, do_compression=True)
    nyuv2(root / "nyuv2", classes=False, normals=True)
    return root
