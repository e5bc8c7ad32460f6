"""NYU Depth v2: the labelled file, the images one by one, GeoNet's; in miniature."""

from __future__ import annotations

import gzip
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.sample import IGNORE
from upbench.datasets.nyu._normals import axis_signs
from upbench.errors import UpbenchError
from upbench.registry import open_dataset
from upbench.testing import assert_close, check_dataset

pytest.importorskip("h5py", reason="extra 'datasets' is not installed")
MAT, BAD = "nyu_depth_v2_labeled.mat", "library_0006_r-1300708259.539496-3335480784"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.nyuv2(tmp_path_factory.mktemp("nyu") / "nyuv2", normals=True)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.nyuv2_splits(tmp_path_factory.mktemp("nyu") / "splits")


@pytest.fixture(scope="module")
def geonet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.geonet(tmp_path_factory.mktemp("nyu") / "geonet")


@pytest.mark.parametrize("name", ["nyuv2", "nyuv2_filled", "nyuv2_39"])
def test_contract_of_the_labelled_file(name: str, labelled: Path) -> None:
    check_dataset(open_dataset(f"{name}:{labelled}"))


@pytest.mark.parametrize("name", ["nyuv2", "nyuv2_39"])
def test_contract_of_single_images(name: str, one_by_one: Path) -> None:
    check_dataset(open_dataset(f"{name}:{one_by_one}"))


def test_contract_of_geonet(geonet: Path) -> None:
    check_dataset(open_dataset(f"nyuv2_geonet:{geonet}"))


def test_the_labelled_file(labelled: Path) -> None:
    """Images, both depths, labels and normals of the official indices, as they were put in."""
    raw, filled = (open_dataset(f"{name}:{labelled}") for name in ("nyuv2", "nyuv2_filled"))
    assert raw.names("train") == ["00000", "00002", "00004"]
    assert raw.names("test") == ["00001", "00003"]
    assert raw.size("test", 0) == (480, 640)
    for index, number in enumerate((1, 3)):
        depth, normal, label = miniatures.room(number)
        sample = raw.read("test", index)
        assert sample.depth is not None
        assert sample.label is not None
        assert np.array_equal(sample.image.numpy(), miniatures.photo(label, number).transpose(2, 0, 1))
        assert np.array_equal(sample.depth.numpy(), miniatures.with_holes(depth))
        assert np.array_equal(filled.read("test", index).depth, depth)
        assert np.array_equal(sample.label.numpy(), label - 1)
        assert_close(sample.normal, torch.from_numpy(normal).permute(2, 0, 1))
        assert sample.camera is not None
        assert_close(sample.camera.intrinsics[0], torch.tensor(miniatures.CAMERA))


def test_class_40_can_be_left_out(labelled: Path) -> None:
    label = miniatures.room(1)[2]
    dataset = open_dataset(f"nyuv2_39:{labelled}")
    assert np.array_equal(dataset.read("test", 0).label, np.where(label == 40, IGNORE, label - 1))
    assert len(dataset.classes) == 39


def test_without_classes_or_normals(tmp_path: Path) -> None:
    """What there is decides on the targets."""
    dataset = open_dataset(f"nyuv2:{miniatures.nyuv2(tmp_path / 'data', classes=False)}")
    assert dataset.targets == {"depth"}
    assert dataset.classes == ()
    check_dataset(dataset)
    miniatures.nyuv2_splits(tmp_path / "other")
    shutil.move(tmp_path / "other/labels40", tmp_path / "data/labels40")
    dataset = open_dataset(f"nyuv2:{tmp_path / 'data'}")
    assert dataset.targets == {"depth", "label"}
    assert np.array_equal(dataset.read("test", 0).label, miniatures.room(1)[2] - 1)
    before = dataset.fingerprint("test")
    Image.new("L", (640, 480), 3).save(tmp_path / "data/labels40/00001.png")
    assert open_dataset(f"nyuv2:{tmp_path / 'data'}").fingerprint("test") != before


def test_single_images(one_by_one: Path) -> None:
    dataset = open_dataset(f"nyuv2:{one_by_one}")
    assert dataset.names("test") == ["00003", "00004"]
    depth, _, label = miniatures.room(3)
    sample = dataset.read("test", 0)
    assert sample.depth is not None
    millimetres = (miniatures.with_holes(depth) * 1000).round()
    assert_close(sample.depth, torch.from_numpy(millimetres) / 1000)
    assert np.array_equal(sample.label, label - 1)
    with pytest.raises(UpbenchError, match="no other copy says which depth it has"):
        open_dataset(f"nyuv2_filled:{one_by_one}")


def test_geonet(geonet: Path) -> None:
    """481 rows are cut to 480, the mean is added twice, and what Probe3D leaves out is left out."""
    dataset = open_dataset(f"nyuv2_geonet:{geonet}")
    assert len(dataset.names("train")) == 3
    assert BAD not in dataset.names("train")
    assert dataset.names("test") == ["00001", "00003"]
    depth, normal, label = miniatures.room(1, (481, 641))
    sample = dataset.read("train", 1)
    photo = torch.from_numpy(miniatures.photo(label, 1)[:480, :640]).permute(2, 0, 1).int()
    assert int((sample.image.int() - photo).abs().max()) <= 1, "rounded down, as there"
    assert np.array_equal(sample.depth, depth[:480, :640])
    assert_close(sample.normal, torch.from_numpy(normal[:480, :640]).permute(2, 0, 1))
    assert dataset.read("test", 0).normal is not None


def test_it_travels(labelled: Path) -> None:
    dataset = open_dataset(f"nyuv2:{labelled}")
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.read("test", 1).image, dataset.read("test", 1).image)


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
def test_which_way_axes_point(signs: tuple[int, int, int]) -> None:
    depth, normal, _ = miniatures.room(0)
    found = axis_signs([(normal * np.float32(signs), depth)], miniatures.CAMERA, "here")
    assert found.tolist() == list(signs)


def test_normals_of_other_images_are_refused() -> None:
    depth, normal, _ = miniatures.room(0)
    shuffled = np.random.default_rng(0).permuted(normal.reshape(-1, 3), axis=0).reshape(normal.shape)
    with pytest.raises(UpbenchError, match="here: normals do not fit the depth"):
        axis_signs([(shuffled, depth)], miniatures.CAMERA, "here")


# -------------------- broken ones --------------------


def mat(**changes: np.ndarray | None) -> Callable[[Path], None]:
    """Replaces arrays of the labelled file, or removes them."""

    def do(root: Path) -> None:
        import h5py

        with h5py.File(root / MAT, "r+") as file:
            for key, value in changes.items():
                del file[key]
                if value is not None:
                    file[key] = value

    return do


def cut(root: Path) -> None:
    content = (root / MAT).read_bytes()
    (root / MAT).write_bytes(content[: len(content) // 2])


def packed(content: object) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        with gzip.open(root / "all_normals.pklz", "wb") as stream:
            pickle.dump(content, stream)

    return do


def savemat(name: str, content: dict[str, np.ndarray]) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        from scipy import io

        io.savemat(root / name, content)

    return do


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "nothing there",
        lambda root: (root / MAT).unlink(),
        f"has no {MAT} .found: classMapping40.mat, splits.mat",
    ),
    ("no splits", lambda root: (root / "splits.mat").unlink(), "but no splits.mat .`upbench download nyuv2`"),
    ("cut short", cut, f"cannot read .*{MAT}: it is cut short"),
    (
        "a web page",
        lambda root: (root / MAT).write_text("<html>not found") and None,
        "no .mat file of version 7.3",
    ),
    ("no raw depth", mat(rawDepths=None), "has no array 'rawDepths'"),
    ("depth of others", mat(rawDepths=np.zeros((3, 640, 480), np.float32)), "rawDepths .* do not fit"),
    ("no labels", mat(labels=None), "has no array 'labels', which classMapping40.mat is for"),
    (
        "splits without test",
        savemat("splits.mat", {"trainNdxs": np.ones((1, 1))}),
        "splits.mat has no 'testNdxs'",
    ),
    (
        "splits that overlap",
        savemat("splits.mat", {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[2]])}),
        "indices of its splits are not distinct",
    ),
    ("splits that are none", lambda root: (root / "splits.mat").write_text("x") and None, "no .mat file"),
    (
        "13 classes",
        savemat("classMapping40.mat", {"mapClass": np.full((1, 894), 41)}),
        "must hold classes 1 to 40",
    ),
    (
        "a short mapping",
        savemat("classMapping40.mat", {"mapClass": np.ones((1, 9))}),
        "has label .* maps 1 to 9",
    ),
    ("a pickle that runs", packed(print), "cannot read .*all_normals.pklz: it holds 'builtins.print'"),
    ("another pickle", packed({"normals": 1}), "no mapping with 'all_normals'"),
    (
        "normals of others",
        packed({"all_normals": np.zeros((2, 3, 4, 3))}),
        r"has normals \[2, 3, 4, 3\], the images",
    ),
]


@pytest.mark.parametrize(("break_it", "words"), [e[1:] for e in BROKEN], ids=[e[0] for e in BROKEN])
def test_broken_ones_are_refused_in_one_line(
    break_it: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = miniatures.nyuv2(tmp_path / "data", train=1, test=1)
    break_it(folder)
    with pytest.raises(UpbenchError, match=words) as refused:
        open_dataset(f"nyuv2:{folder}").read("test", 0)
    assert "\n" not in str(refused.value)


def grey(place: str, dtype: type, value: int) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(np.full((480, 640), value, dtype)).save(root / place)


SINGLE: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "depth of 8 bits",
        grey("official_splits/test/kitchen/sync_depth_00001.png", np.uint8, 9),
        "16 bits, in milli",
    ),
    (
        "no depth",
        lambda root: (root / "official_splits/test/kitchen/sync_depth_00001.png").unlink(),
        "rgb_00001.jpg has no kitchen/sync_depth_00001.png",
    ),
    ("class 41", grey("labels40/00001.png", np.uint8, 41), "value 41, there are classes 1 to 40"),
    (
        "no test split",
        lambda root: shutil.rmtree(root / "official_splits/test"),
        "split 'test' .* has no images",
    ),
]


@pytest.mark.parametrize(("break_it", "words"), [e[1:] for e in SINGLE], ids=[e[0] for e in SINGLE])
def test_broken_single_images(break_it: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = miniatures.nyuv2_splits(tmp_path / "data", train=1, test=1)
    break_it(folder)
    dataset = open_dataset(f"nyuv2:{folder}")
    with pytest.raises(UpbenchError, match=words):
        [(dataset.names(split), dataset.fingerprint(split)) for split in dataset.splits]


def test_broken_geonet(tmp_path: Path) -> None:
    from scipy import io

    miniatures.geonet(tmp_path, train=1)
    (file,) = [f for f in (tmp_path / "nyu_geonet").iterdir() if f.stem != BAD]
    io.savemat(
        file, {"img": np.zeros((100, 100, 3)), "depth": np.zeros((100, 100)), "norm": np.zeros((100, 100, 3))}
    )
    with pytest.raises(UpbenchError, match=r"'img' is \(100, 100, 3\), at least \(480, 640, 3\) is expected"):
        open_dataset(f"nyuv2_geonet:{tmp_path}").fingerprint("train")
    shutil.rmtree(tmp_path / "nyuv2/surfacenormal_metadata")
    with pytest.raises(UpbenchError, match=r"but no all_normals\.pklz"):
        open_dataset(f"nyuv2_geonet:{tmp_path}")
    shutil.rmtree(tmp_path / "nyu_geonet")
    with pytest.raises(UpbenchError, match="has no nyu_geonet"):
        open_dataset(f"nyuv2_geonet:{tmp_path}")
