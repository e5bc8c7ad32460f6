"""The benchmark scripts run, and say what went wrong; what they measure is not judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from upbench.contracts.sample import IGNORE
from upbench.contracts.task import Truth
from upbench.testing import assert_close
from upbench.testing.closeness import allowed


def run(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, root / "benchmarks" / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The table and the JSON of `gpu.py`'s smallest run, with a checkout that is not there."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run(
        root, "gpu.py", "--device", "cpu", "--smoke", "--out", str(out), "--official-raysup", "/nowhere"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_gpu_measures_and_outlives_failures(smoke: tuple[str, dict[str, Any]]) -> None:
    table, result = smoke
    raysup, anyup, official = result["rows"]
    for row in (raysup, anyup):
        assert row["latency_q25_ms"] <= row["latency_ms"] <= row["latency_q75_ms"]
        assert row["relative_error"] <= allowed(torch.float32)
        assert row["output_bytes"] == 16 * 56 * 56 * 4
        assert row["least_bytes"] == row["output_bytes"] + (3 * 56 * 56 + 16 * 4 * 4) * 4
        assert 0 < row["roofline_share"] < 1
        assert {"encoder", "positions", "pooling", "attention", "other"} <= row["stages_ms"].keys()
        assert min(row["stages_ms"][stage] for stage in ("encoder", "attention")) > 0
    assert "no checkout of the official code in /nowhere" in official["error"]
    assert result["copy_bytes_per_s"] > 0
    assert result["environment"]["packages"]["torch"]
    assert table.count("\n| ") == 4


def test_gpu_says_what_is_wrong(root: Path, tmp_path: Path) -> None:
    done = run(root, "gpu.py", "--device", "cpu", "--dtypes", "float31", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert "did you mean 'float32'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_attention(root: Path, tmp_path: Path) -> None:
    """The three take turns; that the gather gives the same result is checked by the script itself."""
    out = tmp_path / "attention.json"
    options = ("--sizes", "84", "--channels", "8", "--repeats", "2")
    done = run(root, "attention.py", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["raysup", "anyup"]
    assert rows[0]["gflop"] == pytest.approx(2 * 84 * 84 * 36 * (256 + 8) / 1e9)
    assert all(low <= median <= high for row in rows for low, median, high in row["ms"].values())


def load(root: Path, script: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", root / f"benchmarks/{script}.py")
    assert spec
    assert spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_closed_form_probe_is_linear_discriminant_analysis(root: Path) -> None:
    """Scores are log posteriors of Gaussians of one covariance, up to what all classes share."""
    module = load(root, "closed_form_probe")
    generator = torch.Generator().manual_seed(0)
    classes, channels = 3, 5
    mixing = torch.randn(channels, channels, generator=generator)
    label = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 2 * 40 * 40, True, generator=generator)
    label = label.reshape(2, 40, 40)
    means = torch.randn(classes, channels, generator=generator) + 30  # far from zero, as a backbone's are
    x = torch.einsum("nhwc,dc->ndhw", torch.randn(2, 40, 40, channels, generator=generator), mixing)
    x = x + means[label].permute(0, 3, 1, 2)
    ignored = label.clone()
    ignored[:, :4] = IGNORE
    valid = torch.ones(40, 40, dtype=torch.bool)
    valid[:, -3:] = False
    statistics = module.Statistics(channels, classes)
    for features, target in zip(x, ignored, strict=True):
        statistics.add(features, Truth(("",), valid[None], label=target[None]))
    scores = statistics.classifier()(x[0]).flatten(1)

    kept = torch.zeros_like(valid)
    kept[4:, :-3] = True
    points, of = x.permute(1, 0, 2, 3)[:, :, kept].flatten(1).T.double(), label[:, kept].flatten()
    own = torch.stack([points[of == k].mean(0) for k in range(classes)])
    centred = points - own[of]
    within = centred.T @ centred / len(points)
    within += 1e-3 * within.diagonal().mean() * torch.eye(channels)
    prior = torch.bincount(of) / len(of)
    gaussians = [torch.distributions.MultivariateNormal(mean, within) for mean in own]
    expected = torch.stack([g.log_prob(x[0].flatten(1).T.double()) for g in gaussians])
    expected = expected + prior.log()[:, None]
    differences = scores - scores[:1], expected - expected[:1]
    assert_close(*differences, terms=4096)  # a covariance, inverted


class TestClosedFormProbe:
    def test_runs_and_gives_the_numbers_of_its_own_classifier(self, root: Path, tmp_path: Path) -> None:
        out = tmp_path / "scores.json"
        options = ("--methods", "nearest,bilinear", "--backbone", "efficientnet_lite0", "--limit", "2")
        done = run(root, "closed_form_probe.py", *options, "--out", str(out))
        assert done.returncode == 0, done.stderr
        splits = json.loads(out.read_text())["splits"]
        assert list(splits) == ["nearest", "bilinear"]
        for scores in splits.values():
            assert list(scores) == ["val", "val_heldout"]
            assert all(0 < of_split["miou"] < 100 for of_split in scores.values())
        assert done.stdout.count("\n| `") == 2

    def test_says_what_is_wrong(self, root: Path) -> None:
        done = run(root, "closed_form_probe.py", "--methods", "bilinear", "--protocol", "quik")
        assert done.returncode == 2
        assert "did you mean 'quick'" in done.stderr


def test_probe_convergence(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    scale = load(root, "scale")
    for split in ("train", "val"):
        scale.draw(data, split, 3)
    (data / "classes.txt").write_text("\n".join(scale.CLASSES))
    options = ("--tasks", "seg", "--backbone", "efficientnet_lite0", "--dataset", f"folder:{data}")
    done = run(root, "probe_convergence.py", *options, "--factors", "1,2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "| task | split | metric | x1 | x2 | largest change |" in done.stdout
    assert done.stdout.count("\n| seg | val |") == 4  # mIoU, the same without "other", accuracy, boundaries
    epochs = []
    for factor in (1, 2):
        (record,) = (tmp_path / "out" / f"x{factor}" / "records").iterdir()
        epochs.append(json.loads(record.read_text())["protocol"]["recipe"]["epochs"])
    assert epochs[1] == 2 * epochs[0]


def test_papers(root: Path, tmp_path: Path) -> None:
    """Both ways take the same steps; what is met is judged by whoever reads the table."""
    out = tmp_path / "papers.json"
    sizes = ("--side", "56", "--channels", "8", "--classes", "5", "--steps", "2", "--repeats", "2")
    done = run(root, "papers.py", "--methods", "bilinear,raysup", *sizes, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["bilinear", "raysup"]
    for row in rows:
        assert row["loss_difference"] <= allowed(torch.float32)
        assert {len(seconds) for seconds in row["seconds"].values()} == {2}
    assert done.stdout.count("| at least") == 4
    unknown = run(root, "papers.py", "--methods", "bilinaer", *sizes)
    assert unknown.returncode == 2
    assert "did you mean 'bilinear'" in unknown.stderr


@pytest.fixture(scope="module")
def scaled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    work = tmp_path_factory.mktemp("scale")
    out = work / "scale.json"
    options = ("--images", "8,24", "--validation", "3", "--work", str(work), "--out", str(out))
    done = run(root, "scale.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in work.iterdir()) == ["photos", "scale.json"]
    return done.stdout, json.loads(out.read_text())


class TestScale:
    def test_measures_time_and_memory_of_each_size(self, scaled: tuple[str, dict[str, Any]]) -> None:
        table, result = scaled
        assert result["environment"]["packages"]["torch"]
        assert [row["images"] for row in result["rows"]] == [8, 24]
        for row in result["rows"]:
            stages = row["stages"]
            assert sum(stages.values()) == pytest.approx(row["seconds"])
            assert min(stages[stage] for stage in ("start", "check", "features", "training")) > 0
            if sys.platform == "linux":
                seen = row["memory"]  # a stage of less than a tenth of a second may not be looked at
                assert all(0 < part["anonymous"] <= seen["all"]["anonymous"] for part in seen.values())
                assert row["second"]["read_bytes"] > row["features_bytes"] * row["images"] / 27
            assert row["second"]["seconds"] > 0
            assert row["second"]["stages"]["features"] == row["second"]["stages"]["check"] == 0
            assert row["peak"] > 0
        small, large = (row["features_bytes"] for row in result["rows"])
        assert large > small > 320 * 7 * 7 * 4 * (8 + 3)  # 320 channels, a stride of 32 pixels
        assert table.count("\n| ") == 2
        assert "bilinear, 8 to 24 images: anonymous memory x" in table

    def test_photos_are_the_same_each_time_and_drawn_once(self, root: Path, tmp_path: Path) -> None:
        module = load(root, "scale")
        module.draw(tmp_path, "train", 2)
        files = {path: path.read_bytes() for path in tmp_path.rglob("0*")}
        assert len(files) == 4
        first, *_ = (path for path in files if path.suffix == ".jpg")
        first.unlink()
        before = {path: path.stat().st_mtime_ns for path in files if path.stem != first.stem}
        module.draw(tmp_path, "train", 3)
        assert {path: path.read_bytes() for path in files} == files
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert len(list(tmp_path.rglob("0*"))) == 6
        assert len({path.read_bytes() for path in tmp_path.rglob("*.jpg")}) == 3

    def test_stages_are_told_apart_by_their_marks(self, root: Path) -> None:
        module = load(root, "scale")
        events = [
            *(("open", "features", 3), ("first", "features", 4), ("close", "features", 6)),
            *(("open", "training", 7), ("first", "training", 8), ("trained", "training", 9)),
            ("close", "training", 11),
        ]
        marks = [{"event": event, "stage": stage, "time": time} for event, stage, time in events]
        samples = [(1, 10, 1), (4, 50, 2), (6.5, 20, 9), (8.5, 30, 3), (10, 40, 4), (11.5, 5, 5)]
        watched = module.Watched(started=0, seconds=12, marks=marks, samples=samples)
        stages = {stage: seconds for stage, seconds in watched.stages().items() if seconds}
        assert stages == {"start": 5, "features": 3, "training": 2, "evaluation": 2}
        peaks = {stage: found["anonymous"] for stage, found in watched.memory().items()}
        assert peaks == {"all": 50, "start": 20, "features": 50, "training": 30, "evaluation": 40}
        assert watched.memory()["all"]["mapped"] == 9
        assert watched.first_step()["time"] == 8

    @pytest.mark.parametrize(
        ("description", "stage"),
        [
            ("checking folder/train", "check"),
            ("features of folder/train by efficientnet_lite0", "features"),
            ("cost", "cost"),
            ("Bilinear · upsampling train", "upsampling"),
            ("Bilinear · seg", "training"),
            ("cells", None),
        ],
    )
    def test_bars_are_known_by_their_descriptions(
        self, root: Path, description: str, stage: str | None
    ) -> None:
        assert load(root, "scale").stage_of(description) == stage

    @pytest.mark.parametrize(
        ("memory", "training", "said"),
        [
            (100, 40, ["x 1.00 (+0 kB an image), flat", "images^1.00, linear"]),
            (400, 40, ["x 4.00", "not flat", "images^1.00, linear"]),
            (100, 160, ["flat", "images^2.00, more than linear"]),
        ],
    )
    def test_the_verdict_is_on_the_two_largest_sizes(
        self, root: Path, memory: int, training: float, said: list[str]
    ) -> None:
        rows = [
            {
                "images": images,
                "method": "bilinear",
                "memory": {"all": {"anonymous": anonymous * 10**6}},
                "stages": {"features": 1.0, "training": seconds},
            }
            for images, anonymous, seconds in ((1, 1, 1), (1000, 100, 10), (4000, memory, training))
        ]
        (line,) = load(root, "scale").verdict(rows)
        assert all(words in line for words in said), line


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an interpreter that has this upbench."""
    folder = tmp_path_factory.mktemp("checkout")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


class TestRunSpeed:
    def test_runs_both_checkouts_in_turn(self, root: Path, checkout: Path, tmp_path: Path) -> None:
        out = tmp_path / "speed.json"
        options = ("--methods", "bilinear", "--tasks", "seg,depth", "--limit", "2", "--probe", "epochs=1")
        done = run(
            *(root, "run_speed.py", "--old", str(checkout), "--new", str(checkout), "--repeats", "2"),
            *(*options, "--cases", "matrix", "--work", str(tmp_path / "work"), "--out", str(out)),
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(out.read_text())
        assert [(r["side"], r["repeat"]) for r in result["runs"]] == [
            *(("old", 0), ("new", 0), ("new", 1), ("old", 1)),
        ]
        for measured in result["runs"]:
            assert {cell["task"] for cell in measured["cells"]} == {"seg", "depth"}
            assert 0 < sum(cell["seconds"] for cell in measured["cells"]) < measured["seconds"]
        assert done.stdout.count("\n| matrix | bilinear, ") == 2
        assert "| matrix | beside the cells |" in done.stdout

    def test_five_runs_are_compared_with_five_seeds(self, root: Path) -> None:
        module = load(root, "run_speed")
        runs = []
        for repeat in range(3):
            for side, seconds in (("old", 10.0), ("new", 5.0)):
                for case, factor in (("seeds", 4 + repeat), ("single", 1)):
                    own = {"method": "raysup", "task": "seg", "seconds": seconds * factor / 2}
                    own |= {"split": "val", "metric": "mIoU", "value": 40.0}
                    taken = {"seconds": seconds * factor, "cpu_seconds": 3.0}
                    runs.append({"side": side, "case": case, "repeat": repeat, **taken, "cells": [own]})
        text = "\n".join(module.summary(runs))
        assert "| seeds | 50.0 | 25.0 | 2.00 (2.00-2.00) | 3.0 | 3.0 | 1.00 (1.00-1.00) |" in text
        assert "| new | 1.00 (0.83-1.25) | 1.00 (0.83-1.25) |" in text
        text = "\n".join(module.cells(runs))
        assert "| single | raysup, seg | 5.0 | 2.5 | 2.00 (2.00-2.00) | val mIoU | 40.000 | 40.000 |" in text
        assert "| seeds | beside the cells | 25.0 | 12.5 | 2.00 (2.00-2.00) | | | |" in text

    def test_says_what_is_wrong(self, root: Path, checkout: Path, tmp_path: Path) -> None:
        known = ("run_speed.py", "--old", str(checkout), "--work", str(tmp_path / "work"))
        missing = run(root, *known, "--new", str(tmp_path))
        assert missing.returncode == 2
        assert "no interpreter in" in missing.stderr
        unknown = run(root, *known, "--new", str(checkout), "--cases", "matrx")
        assert "unknown case 'matrx'; known: matrix, seeds, single" in unknown.stderr
        failed = run(root, *known, "--new", str(checkout), "--methods", "bilinaer", "--repeats", "1")
        assert failed.returncode == 2
        assert "did you mean 'bilinear'" in failed.stderr
        assert not list(tmp_path.rglob("*.json"))


class TestPaperCosts:
    """`paper_costs.py`: it runs, and hours are seconds an image times the images."""

    def test_measures(self, root: Path, tmp_path: Path) -> None:
        out = tmp_path / "costs.json"
        words = ("--protocol", "quick", "--methods", "bilinear", "--classes", "3", "--images", "2")
        done = run(root, "paper_costs.py", *words, "--repeats", "1", "--threads", "1", "--out", str(out))
        assert done.returncode == 0, done.stderr
        result = json.loads(out.read_text())
        (row,) = result["rows"]
        assert (row["method"], row["classes"], result["side"], result["threads"]) == ("bilinear", 3, 224, 1)
        for name in ("official_train_s", "official_evaluate_s"):
            assert row[name] > 0
        assert min(row["train_s"], row["evaluate_s"]) >= 0
        assert result["backbone_s"] > 0

    def test_hours(self, root: Path) -> None:
        module = load(root, "paper_costs")
        row = {"train_s": 0.5, "evaluate_s": 2.0, "official_train_s": 5.0, "official_evaluate_s": 10.0}
        assert module._hours(row, train=7200, scored=1800, epochs=10) == "11 (official 150)"
        rows = [{"method": "bilinear", "classes": count} for count in (21, 151)]
        assert module._nearest({"rows": rows}, "bilinear", 27)["classes"] == 21

    def test_every_table_has_its_lines(self, root: Path, tmp_path: Path) -> None:
        result = {"rows": [], "side": 448, "backbone": "b", "backbone_s": 0.1}
        file = tmp_path / "costs.json"
        file.write_text(json.dumps(result))
        done = run(root, "paper_costs.py", "--table", str(file))
        assert done.returncode == 0, done.stderr
        for config in (root / "configs" / "papers").glob("*.yaml"):
            assert f"| {config.stem} | " in done.stdout
        widths = {line.replace("\\|", "").count("|") for line in done.stdout.splitlines()}
        assert len(widths) == 1, "every line has every column"
