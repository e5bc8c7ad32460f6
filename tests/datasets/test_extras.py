"""Datasets whose packages are extras say which one is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import miniatures
import pytest

from upbench.errors import UpbenchError
from upbench.registry import open_dataset


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


def spec(name: str, root: Path) -> str:
    if name == "nyuv2":
        (root / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 7.3 MAT-file")
    elif name == "voc2012_aug":
        miniatures.sbd(root)
    elif name == "mmseg":
        (root / "config.py").write_text("")
        return f"mmseg:{root / 'config.py'}"
    return f"{name}:{root}"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("nyuv2", "h5py", "datasets"),
        ("voc2012_aug", "scipy.io", "datasets"),
        ("hf", "datasets", "hf"),
        ("mmseg", "mmseg.datasets", "mmseg"),
    ],
)
def test_what_is_missing_is_named(
    name: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = spec(name, tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails then
    with pytest.raises(UpbenchError, match=rf"pip install 'upbench\[{extra}\]'"):
        open_dataset(given).fingerprint("train_aug")


def test_a_folder_called_datasets_is_not_the_package(tmp_path: Path) -> None:
    """Without the package, Python would take a folder of data for it."""
    (tmp_path / "datasets").mkdir()
    program = "\n".join(
        [
            "import sys, types",
            "sys.modules['datasets'] = types.ModuleType('datasets')",
            "from upbench.registry import open_dataset",
            "open_dataset('hf:here')",
        ]
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "needs the package datasets: pip install 'upbench[hf]'" in run.stderr


def test_listing_datasets_needs_none_of_them() -> None:
    """The registry imports every dataset, and no package of an extra."""
    program = "\n".join(
        [
            "import sys",
            "from upbench.registry import plugins",
            "plugins('dataset')",
            "print([name for name in ('h5py', 'datasets', 'mmseg', 'mmengine') if name in sys.modules])",
        ]
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
