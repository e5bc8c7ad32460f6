"""The packed scenes: exact where they claim to be, split as they claim to be, and clear about damage."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upbench
from tools.interiors.models import SHARED_CLASSES, class_of
from tools.interiors.pack import pack
from upbench.datasets.interiors import Interiors
from upbench.datasets.interiors.classes import CLASSES, MERGED, RAW_CLASSES, merge_table
from upbench.datasets.interiors.files import DATA_DIR, SPLITS
from upbench.datasets.interiors.scenes import Scene, SceneFolder
from upbench.errors import UpbenchError
from upbench.testing import assert_close

EVERY = 8  # of the scenes, where looking at all of them would take a minute


@pytest.fixture(scope="module")
def folders() -> dict[str, SceneFolder]:
    return {split: SceneFolder(split) for split in SPLITS}


@pytest.fixture(scope="module")
def some_scenes(folders: dict[str, SceneFolder]) -> list[Scene]:
    return [folder[i] for folder in folders.values() for i in range(0, len(folder), EVERY)]


def back_project(scene: Scene) -> np.ndarray:
    """Points `[H, W, 3]` in camera space."""
    fx, fy, cx, cy = scene.intrinsics
    height, width = scene.depth.shape
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], -1) * scene.depth[..., None]


def difference_normals(points: np.ndarray, reach: int) -> np.ndarray:
    """Normals from central differences over `2 * reach` pixels, facing the viewer; the border is left out."""
    core = slice(reach, -reach)
    across = points[core, 2 * reach :] - points[core, : -2 * reach]
    down = points[2 * reach :, core] - points[: -2 * reach, core]
    normal = np.cross(down, across)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    away = (normal * points[core, core]).sum(-1, keepdims=True) > 0
    return np.where(away, -normal, normal)


def flat_inside(scene: Scene, reach: int) -> np.ndarray:
    """Pixels whose neighbourhood has one label, normals within 2 degrees and no step in depth."""
    core = slice(reach, -reach)
    size = scene.label.shape[0]
    inverse = 1 / np.maximum(scene.depth, 1e-3)  # linear in the pixel on a plane
    middle = inverse[core, core]
    bend_x = np.abs(inverse[core, 2 * reach :] + inverse[core, : -2 * reach] - 2 * middle)
    bend_y = np.abs(inverse[2 * reach :, core] + inverse[: -2 * reach, core] - 2 * middle)
    inside = np.maximum(bend_x, bend_y) < 0.005 * middle
    for dy in (-reach, 0, reach):
        for dx in (-reach, 0, reach):
            rows, cols = slice(reach + dy, size - reach + dy), slice(reach + dx, size - reach + dx)
            inside &= scene.label[rows, cols] == scene.label[core, core]
            cosine = (scene.normal[rows, cols] * scene.normal[core, core]).sum(-1)
            inside &= cosine > math.cos(math.radians(2))
    return inside


def test_differences_of_the_depth_give_the_stored_normals(some_scenes: list[Scene]) -> None:
    # Depth is stored in millimetres, so differences are taken over eight pixels: some 4 cm.
    reach, angles, covered = 4, [], []
    for scene in some_scenes:
        expected = difference_normals(back_project(scene), reach)
        inside = flat_inside(scene, reach)
        core = slice(reach, -reach)
        cosine = (expected * scene.normal[core, core]).sum(-1)[inside]
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        covered.append(inside.mean())
    angle = np.concatenate(angles)
    assert np.mean(covered) > 0.55, "the flat insides of surfaces are most of an image"
    assert np.median(angle) < 1.0
    assert np.quantile(angle, 0.95) < 3.0
    assert (angle > 10).mean() < 0.01, "two boards one behind the other, of one class and direction"


def test_normals_are_unit_vectors_that_face_the_viewer(some_scenes: list[Scene]) -> None:
    for scene in some_scenes:
        hit = scene.depth > 0
        lengths = np.linalg.norm(scene.normal[hit], axis=-1)
        assert_close(lengths, np.ones_like(lengths))
        facing = (scene.normal * back_project(scene)).sum(-1)[hit] / scene.depth[hit]
        assert (
            facing > 0.02
        ).mean() < 1e-3  # stored with 8 bits: a grazing normal may round to the other side
        assert not scene.normal[~hit].any()


def test_intrinsics_are_those_of_the_field_of_view(folders: dict[str, SceneFolder]) -> None:
    for folder in folders.values():
        for line in folder.index:
            fx, fy, cx, cy = line["intrinsics"]
            half = line["size"] / 2
            assert math.degrees(2 * math.atan(half / fx)) == pytest.approx(line["fov_deg"], abs=1e-4)
            assert (fx, cx, cy) == (fy, half, half)


def framed(sample: upbench.Sample, size: int) -> upbench.Framed:
    """The sample as a protocol of that size shows it."""
    (frame,) = upbench.SquareCrop(size).frames(sample.size)
    return frame.of(sample)


@pytest.mark.parametrize("size", [96, 224, 448, 600])
def test_resized_intrinsics_see_the_same_rays(size: int) -> None:
    full = Interiors().read("val", 0)
    small = framed(full, size)
    assert full.camera is not None
    assert small.camera is not None

    def points(sample: upbench.Sample | upbench.Framed) -> torch.Tensor:
        assert sample.camera is not None
        assert sample.depth is not None
        fx, fy, cx, cy = sample.camera.intrinsics[0]
        side = sample.depth.shape[-1]
        v, u = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        return torch.stack([(u - cx) / fx * sample.depth, (v - cy) / fy * sample.depth, sample.depth])

    corner, opposite = points(small)[:, 0, 0], points(small)[:, -1, -1]
    big = points(full)
    reach = 448 / size / 2 + 0.5  # half a pixel of each image, in pixels of the full one
    spacing = float(full.depth.max() / full.camera.intrinsics[0, 0])  # type: ignore[union-attr]
    assert torch.dist(corner, big[:, 0, 0]) < 2 * reach * spacing + 0.05
    assert torch.dist(opposite, big[:, -1, -1]) < 2 * reach * spacing + 0.05
    # and projecting the points again gives the pixels that they came from
    x, y, z = points(small)
    fx, fy, cx, cy = small.camera.intrinsics[0]
    expected = (torch.arange(size) + 0.5).expand(size, size)
    assert_close(x / z * fx + cx, expected)
    assert_close(y / z * fy + cy, expected.T)


def test_label_boundaries_lie_on_image_edges(some_scenes: list[Scene]) -> None:
    at_boundary, shifted = [], []
    for scene in some_scenes:
        grey = scene.image.astype(np.float32).mean(-1)
        edge = np.abs(np.diff(grey, axis=1))
        boundary = scene.label[:, 1:] != scene.label[:, :-1]
        at_boundary.append(edge[boundary].mean())
        shifted.append(np.mean([edge[np.roll(boundary, s, axis=1)].mean() for s in (-1, 1)]))
    assert np.mean(at_boundary) > 1.7 * np.mean(shifted), "labels are shifted against the image"


def test_labels_are_listed_classes(folders: dict[str, SceneFolder]) -> None:
    for split, folder in folders.items():
        for i, line in enumerate(folder.index):
            with Image.open(io.BytesIO(folder.read_bytes(i, "_label.png"))) as picture:
                values, counts = np.unique(np.array(picture), return_counts=True)
            shares = dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))
            assert shares.pop(255, 0.0) <= 0.001, f"{split} {line['seed']} has pixels without a surface"
            assert max(shares) < len(RAW_CLASSES)
            listed = {RAW_CLASSES.index(name): share for name, share in line["classes"].items()}
            for value, share in shares.items():
                assert share == pytest.approx(listed.get(value, 0.0), abs=1e-4)


def test_the_merge_table_takes_each_raw_class_once() -> None:
    raw = [name for names in MERGED.values() for name in names]
    assert sorted(raw) == sorted(RAW_CLASSES)
    table = merge_table()
    assert 16 <= len(CLASSES) <= 18
    assert CLASSES[table[RAW_CLASSES.index("armchair")]] == "chair"
    assert set(table[len(RAW_CLASSES) :]) == {255}


def test_every_class_is_in_ten_validation_scenes(folders: dict[str, SceneFolder]) -> None:
    merged_of = {raw: merged for merged, names in MERGED.items() for raw in names}
    scenes = Counter(
        merged
        for split in ("val", "val_heldout")
        for line in folders[split].index
        for merged in {merged_of[raw] for raw, share in line["classes"].items() if share > 2e-4}
    )
    assert {name: scenes[name] for name in CLASSES if scenes[name] < 10} == {}


def test_splits_share_no_scene(folders: dict[str, SceneFolder]) -> None:
    seeds = [line["seed"] for folder in folders.values() for line in folder.index]
    hashes = [line["image_sha256"] for folder in folders.values() for line in folder.index]
    assert len(seeds) == len(set(seeds))
    assert len(hashes) == len(set(hashes))


def test_held_out_scenes_show_no_model_of_training(folders: dict[str, SceneFolder]) -> None:
    train = {code for line in folders["train"].index for code in line["models"]}
    held_out = {code for line in folders["val_heldout"].index for code in line["models"]}
    parted = {code for code in train & held_out if class_of(code) not in SHARED_CLASSES}
    assert parted == set()
    assert len(held_out - train) > 50, "or they would show the same few objects again and again"


def test_tabletops_are_two_fifths(folders: dict[str, SceneFolder]) -> None:
    kinds = Counter(line["kind"] for folder in folders.values() for line in folder.index)
    assert kinds["tabletop"] / kinds.total() >= 0.4


def test_the_pack_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA_DIR.iterdir()}
    assert sum(sizes.values()) < 25e6
    assert max(sizes.values()) < 5e6


@pytest.mark.parametrize("split", SPLITS)
def test_samples_are_those_of_the_renderer(split: str, folders: dict[str, SceneFolder]) -> None:
    """Nothing is resized, and every target is that of the same pixel."""
    data = upbench.open_dataset("interiors")
    index = len(data.names(split)) - 1
    sample, scene = data.read(split, index), folders[split][index]
    assert sample.name == data.names(split)[-1] == str(scene.info["seed"])
    assert sample.size == data.size(split, index) == (448, 448)
    assert np.array_equal(sample.image.permute(1, 2, 0), scene.image)
    assert sample.label is not None
    assert sample.depth is not None
    assert sample.normal is not None
    assert sample.valid is not None
    assert np.array_equal(sample.label, scene.label)
    assert np.array_equal(sample.depth, scene.depth)
    assert np.array_equal(sample.normal.permute(1, 2, 0), scene.normal)
    assert sample.valid.float().mean() > 0.99
    assert sample.depth[sample.valid].min() > 0.2
    assert sample.depth.max() < 12
    assert tuple(sample.camera.intrinsics[0].tolist()) == pytest.approx(scene.intrinsics)


def test_the_official_counts_are_those_of_the_package(tmp_path: Path) -> None:
    data = Interiors()
    assert {split: len(data.names(split)) for split in SPLITS} == dict(data.counts)
    assert not Interiors(unpack(tmp_path, 1)).counts, "a folder of other scenes is no part of them"


def test_the_fingerprint_follows_the_scenes(tmp_path: Path) -> None:
    unchanged = unpack(tmp_path / "a", 2)
    changed = unpack(tmp_path / "b", 1)
    prints = {Interiors(unchanged).fingerprint("train"), Interiors(changed).fingerprint("train")}
    prints.add(Interiors().fingerprint("train"))
    assert len(prints) == 3
    assert Interiors(unchanged).fingerprint("train") == Interiors(unchanged).fingerprint("train")


def unpack(folder: Path, count: int) -> Path:
    """The first scenes of each split as the renderer would have written them."""
    for split in SPLITS:
        source = SceneFolder(split)
        (folder / split).mkdir(parents=True)
        with (folder / f"{split}.jsonl").open("w") as index:
            for i in range(count):
                line = dict(source.index[i])
                del line["shard"]
                index.write(json.dumps(line) + "\n")
                for suffix in (".jpg", "_label.png", "_depth.png", "_normal.png"):
                    (folder / split / f"{line['seed']}{suffix}").write_bytes(source.read_bytes(i, suffix))
    return folder


def test_packed_and_rendered_folders_read_the_same(tmp_path: Path) -> None:
    rendered = unpack(tmp_path / "rendered", 2)
    sums = pack(rendered, tmp_path / "packed")
    assert {split: numbers["scenes"] for split, numbers in sums.items()} == dict.fromkeys(SPLITS, 2)
    a, b = Interiors(rendered).read("val", 1), Interiors(tmp_path / "packed").read("val", 1)
    for field in ("image", "label", "depth", "normal", "valid"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    elsewhere = Interiors(shutil.copytree(rendered, tmp_path / "elsewhere"))
    assert elsewhere.fingerprint("val") == Interiors(rendered).fingerprint("val")
    first = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    pack(rendered, tmp_path / "packed")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}


def test_packing_an_incomplete_folder_leaves_the_old_pack(tmp_path: Path) -> None:
    rendered = unpack(tmp_path / "rendered", 1)
    pack(rendered, tmp_path / "packed")
    before = sorted(path.name for path in (tmp_path / "packed").iterdir())
    (rendered / "val_heldout.jsonl").unlink()
    with pytest.raises(UpbenchError, match=r"no rendered split 'val_heldout'"):
        pack(rendered, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "rendered"]


def test_dropped_scenes_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = unpack(tmp_path / "rendered", 2)
    faulty = SceneFolder("val", rendered).index[0]["seed"]
    monkeypatch.setattr("tools.interiors.pack.dropped_seeds", lambda: {faulty: "a hole in the wall"})
    pack(rendered, tmp_path / "packed")
    assert str(faulty) not in Interiors(tmp_path / "packed").names("val")
    assert len(Interiors(tmp_path / "packed").names("train")) == 2


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A packed folder of one scene a split, to be damaged."""
    pack(unpack(tmp_path / "rendered", 1), tmp_path / "packed")
    shutil.rmtree(tmp_path / "rendered")
    return tmp_path / "packed"


def test_a_corrupt_zip_is_named(copied: Path) -> None:
    shard = copied / "train-00.zip"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UpbenchError, match=r"cannot read scene \d+ in .*train-00\.zip") as error:
        Interiors(copied).read("train", 0)
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_noticed(copied: Path) -> None:
    shard = copied / "train-00.zip"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UpbenchError, match="cannot read scene"):
        Interiors(copied).read("train", 0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, packed: bool) -> None:
    folder = unpack(tmp_path / "rendered", 1)
    file = next((folder / "train").glob("*.jpg"))
    if packed:
        pack(folder, tmp_path / "packed")
        folder, file = tmp_path / "packed", tmp_path / "packed" / "train-00.zip"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UpbenchError, match="not a regular file"):
        Interiors(folder).read("train", 0)


def test_a_missing_zip_is_named(copied: Path) -> None:
    (copied / "val-00.zip").unlink()
    with pytest.raises(UpbenchError, match=r"val-00\.zip"):
        Interiors(copied).read("val", 0)


def test_a_missing_or_damaged_index_is_named(copied: Path) -> None:
    with pytest.raises(UpbenchError, match=r"train\.jsonl is missing"):
        Interiors(copied / "nowhere")
    (copied / "train.jsonl").write_text('{"seed": 1')
    with pytest.raises(UpbenchError, match=r"train\.jsonl is damaged"):
        Interiors(copied)


def test_an_unknown_split_is_answered_with_the_nearest() -> None:
    with pytest.raises(UpbenchError, match="did you mean 'val_heldout'"):
        Interiors().names("val_held_out")
