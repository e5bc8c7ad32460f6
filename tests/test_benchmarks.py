"""The benchmark scripts run, and say what went wrong; what they measure is not judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from upbench.contracts.sample import IGNORE, Sample


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
        assert row["relative_error"] < 1e-5
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


def test_closed_form_probe_is_linear_discriminant_analysis(root: Path) -> None:
    """Scores are log posteriors of Gaussians of one covariance, up to what all classes share."""
    spec = importlib.util.spec_from_file_location("closed_form", root / "benchmarks/closed_form_probe.py")
    assert spec
    assert spec.loader
    sys.modules["closed_form"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
        statistics.add(features, Sample("", torch.zeros(3, 40, 40), valid, label=target))
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
    torch.testing.assert_close(differences[0].double(), differences[1], atol=1e-3, rtol=1e-3)
