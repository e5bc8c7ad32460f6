"""The generator: its parts where nothing is installed, a whole tiny scene where Mitsuba and the assets
are."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tools.interiors.__main__ import FIRST_SEEDS, finished, main
from tools.interiors.assets import default_folder, locate
from tools.interiors.catalogue import LIBRARIES, Catalogue
from tools.interiors.mesh import (
    ModelStore,
    box_map,
    crease_normals,
    parse_mtl,
    parse_obj,
    ply_bytes,
)
from tools.interiors.models import (
    GROUPS,
    MAX_TRANSPARENT_SHARE,
    OPAQUE_CLASSES,
    SHARED_CLASSES,
    all_codes,
    class_of,
)
from tools.interiors.pack import dropped_seeds
from upbench.datasets.interiors.classes import RAW_CLASSES
from upbench.datasets.interiors.files import SUFFIXES
from upbench.datasets.interiors.scenes import SceneFolder
from upbench.errors import UpbenchError
from upbench.testing import assert_close

ROOT = Path(__file__).resolve().parents[2]
RENDER = [sys.executable, "-m", "tools.interiors"]
SEED = 2000  # one of the shipped scenes
TINY = ["--split", "val", "--seed", str(SEED), "--size", "64", "--spp", "4", "--threads", "2"]

CUBE = """mtllib cube.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
usemtl white
f 4 3 2 1
f 5 6 7 8
f 1 2 6 5
usemtl black
f -6 -5 -1 -2
f 3/1 4/1 8/1 7/1
f 4 1 5 8
"""


# models


def test_a_model_is_of_one_class_and_on_one_side() -> None:
    classes: dict[str, set[str]] = {}
    sides: dict[str, set[bool]] = {}
    for group in GROUPS.values():
        for codes, held_out in ((group.seen, False), (group.held_out, True)):
            for code in codes:
                classes.setdefault(code, set()).add(group.raw_class)
                sides.setdefault(code, set()).add(held_out)
    assert {code for code, names in classes.items() if len(names) > 1} == set()
    assert {code for code, held_out in sides.items() if len(held_out) > 1} == set()
    assert {code[0] for code in classes} == set(LIBRARIES)
    assert {group.raw_class for group in GROUPS.values()} <= set(RAW_CLASSES)


def test_the_splits_show_what_they_promise() -> None:
    for name, group in GROUPS.items():
        train, val, held_out = (set(group.codes(split)) for split in ("train", "val", "val_heldout"))
        assert train | held_out == val, name
        if group.raw_class in SHARED_CLASSES:
            assert train == held_out == val, name
        else:
            assert not train & held_out, name


def test_each_parted_class_holds_out_about_a_third() -> None:
    seen: Counter[str] = Counter()
    held_out: Counter[str] = Counter()
    for code in all_codes():
        if class_of(code) not in SHARED_CLASSES:
            groups = [g for g in GROUPS.values() if code in g.seen + g.held_out]
            (held_out if code in groups[0].held_out else seen)[class_of(code)] += 1
    for name in seen:
        share = held_out[name] / (seen[name] + held_out[name])
        assert 0.2 <= share <= 0.5, f"{name}: {share:.2f} of its models are held out"
    assert sum(seen.values()) + sum(held_out.values()) > 300


def test_procedural_models_name_their_class() -> None:
    assert class_of("vase:1000.3") == "vase"
    with pytest.raises(KeyError):
        class_of("A9999")


def test_dropped_scenes_have_reasons() -> None:
    for seed, reason in dropped_seeds().items():
        assert seed >= min(FIRST_SEEDS.values())
        assert len(reason) > 10


# meshes


def test_an_obj_file_is_cut_into_triangles() -> None:
    obj = parse_obj(CUBE)
    assert obj.points.shape == (8, 3)
    assert {name: faces.shape for name, faces in obj.faces.items()} == {
        "white": (6, 3, 2),
        "black": (6, 3, 2),
    }
    assert obj.faces["black"][0, :, 0].tolist() == [2, 3, 7]  # negative indices count from the end
    assert obj.faces["black"][0, 0, 1] == -1  # no texture coordinate
    assert obj.material_files == ["cube.mtl"]


def test_a_material_file_survives_its_authors() -> None:
    text = "newmtl old oak\nKd 0.5 0.4 0.3\nNs 12#comment\nd nonsense\nmap_Kd C:\\My Pictures\\oak.jpg\n"
    assert parse_mtl(text) == {
        "old oak": {"kd": [0.5, 0.4, 0.3], "ns": 12.0, "map_kd": "C:\\My Pictures\\oak.jpg"}
    }


def test_sharp_edges_stay_sharp_and_curves_get_smooth() -> None:
    obj = parse_obj(CUBE)
    cube = np.concatenate([obj.points[faces[:, :, 0]] for faces in obj.faces.values()])
    flat = np.cross(cube[:, 1] - cube[:, 0], cube[:, 2] - cube[:, 0])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert_close(crease_normals(cube), np.repeat(flat[:, None], 3, axis=1))

    angle = np.linspace(0, 2 * np.pi, 33)  # a prism of 32 sides: 11 degrees between neighbours
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(33)], axis=-1)
    up = ring + np.array([0, 0, 1])
    side = np.concatenate(
        [np.stack([ring[:-1], ring[1:], up[1:]], 1), np.stack([ring[:-1], up[1:], up[:-1]], 1)]
    )
    outward = side * [1, 1, 0]
    cosine = (crease_normals(side) * outward).sum(-1)
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() < 3, "the normal of the round is that of a circle"


def test_box_mapping_is_in_metres() -> None:
    floor = np.array([[[0.0, 0.0, 0.3], [2.0, 0.0, 0.3], [2.0, 3.0, 0.3]]])
    assert_close(np.ptp(box_map(floor)[0], axis=0), np.array([2.0, 3.0]))


def test_a_ply_file_welds_corners_and_drops_slivers() -> None:
    square = np.array([[[0.0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0.0, 0, 0], [1, 1, 0], [0, 1, 0]]])
    sliver = np.zeros((1, 3, 3))
    uv = np.zeros((2, 3, 2))
    data = ply_bytes(square, crease_normals(square), uv)
    assert data is not None
    assert b"element vertex 4\n" in data
    assert b"element face 2\n" in data
    assert ply_bytes(sliver, np.zeros((1, 3, 3)), uv[:1]) is None


# command line


def test_missing_assets_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "furniture").mkdir()
    (tmp_path / "furniture" / "Scopia.sh3f").touch()
    assert main(["--out", str(tmp_path / "out"), "--assets", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "npm install" in error
    assert "@pmndrs/assets" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpbenchError, match="sweethome3d-furniture"):
        Catalogue(tmp_path)


def test_bad_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--size", "4"]) == 2
    assert "--size must be at least 16" in capsys.readouterr().err


def test_a_scene_is_finished_when_its_line_and_all_its_files_are_there(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    lines = [{"seed": seed, "size": 64, "spp": 4} for seed in (1, 2)] + [{"seed": 3, "size": 448, "spp": 4}]
    (tmp_path / "val.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"seed": 4, "si'
    )
    for seed in (1, 2, 3, 4):
        for suffix in SUFFIXES:
            (tmp_path / "val" / f"{seed}{suffix}").touch()
    (tmp_path / "val" / f"2{SUFFIXES[2]}").unlink()
    assert finished(tmp_path, "val", 64, 4) == {1}
    assert finished(tmp_path, "val", 448, 4) == {3}
    assert finished(tmp_path, "train", 64, 4) == set()


# with Mitsuba and the assets


def _why_not() -> str | None:
    missing = [
        name for name in ("mitsuba", "mitsuba_oidn", "skimage") if importlib.util.find_spec(name) is None
    ]
    if missing:
        return f"the extra 'render' is not installed ({', '.join(missing)})"
    try:
        locate()
    except UpbenchError as error:
        return f"assets are missing: {error}"
    return None


REASON = _why_not()
needs_renderer = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def run(*arguments: str) -> str:
    environment = {**os.environ, "UPBENCH_RENDER_ASSETS": str(default_folder())}
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_renderer
def test_a_scene_is_the_same_again_and_an_interrupted_one_is_redone(tmp_path: Path) -> None:
    run(*RENDER, *TINY, "--out", str(tmp_path / "a"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "val").iterdir()}
    assert sorted(files) == sorted(f"{SEED}{suffix}" for suffix in SUFFIXES)
    line = json.loads((tmp_path / "a" / "val.jsonl").read_text())
    assert line["kind"] == "office"
    assert line["void"] == 0
    assert line["intrinsics"][0] == pytest.approx(32 / math.tan(math.radians(line["fov_deg"] / 2)), abs=1e-4)
    assert {class_of(code) for code in line["models"]} <= set(RAW_CLASSES)

    # The shipped scene is this one: a pixel centre of 64 is that of every seventh pixel of 448.
    shipped = SceneFolder("val")[[entry["seed"] for entry in SceneFolder("val").index].index(SEED)]
    again = SceneFolder("val", tmp_path / "a")[0]
    assert line["models"] == shipped.info["models"]
    assert (again.label == shipped.label[3::7, 3::7]).mean() > 0.998
    assert (np.abs(again.depth - shipped.depth[3::7, 3::7]) < 0.002).mean() > 0.998
    assert (
        np.abs(again.image.astype(int) - shipped.image[3::7, 3::7]).mean() < 12
    )  # another sampling of light

    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as a crash leaves it: a file and half a line missing
    (tmp_path / "b" / "val" / f"{SEED}_depth.png").unlink()
    (tmp_path / "b" / "val.jsonl").write_text(json.dumps(line)[:50])
    assert "already there" not in run(*RENDER, *TINY, "--out", str(tmp_path / "b"))
    assert (tmp_path / "b" / "val.jsonl").read_text() == (tmp_path / "a" / "val.jsonl").read_text()
    assert {path.name: path.read_bytes() for path in (tmp_path / "b" / "val").iterdir()} == files
    assert "already there" in run(*RENDER, *TINY, "--out", str(tmp_path / "a"))


@needs_renderer
def test_rays_of_the_truth_are_those_of_the_image() -> None:
    code = """
from tools.interiors.__main__ import start_mitsuba
start_mitsuba("llvm_ad_rgb", 1)
import drjit as dr, mitsuba as mi, numpy as np
from tools.interiors.camera import View
view = View(np.array([0.4, -2.5, 1.5]), np.array([-0.3, 1.0, 0.7]), 57.0)
n = 32
i = dr.arange(mi.UInt32, n * n)
spot = mi.Point2f((mi.Float(i % n) + 0.5) / n, (mi.Float(i // n) + 0.5) / n)
ray, _ = view.sensor(n, 1).sample_ray(0.0, 0.5, spot, mi.Point2f(0.5, 0.5))
print(np.abs(np.array(ray.d).T.reshape(n, n, 3) - view.directions(n)).max())
"""
    assert float(run(sys.executable, "-c", code)) < 1e-6


@needs_renderer
def test_listed_models_are_not_made_of_glass() -> None:
    assets = locate()
    store = ModelStore(Catalogue(assets.furniture), assets.cache)
    for code in all_codes()[:: 1 if (assets.cache / "models").is_dir() else 10]:  # conversion takes a minute
        model = store.load(code)
        assert model.parts, code
        assert all(0.002 < size < 4 for size in model.size), (code, model.size)
        if class_of(code) not in OPAQUE_CLASSES:
            assert model.transparent_share <= MAX_TRANSPARENT_SHARE, (code, model.transparent_share)
