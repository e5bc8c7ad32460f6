"""What upbench writes for others to read says nothing of where files lie, or of who ran it."""

from __future__ import annotations

import importlib.util
import json
import platform
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from upbench.contracts.upsampler import Upsampler
from upbench.export import export
from upbench.registry import find_method
from upbench.results.records import load_records
from upbench.run.loop import run
from upbench.system.environment import without_home
from upbench.train.config import TrainConfig, ViewConfig
from upbench.train.loop import train
from upbench.weights.load import load_method

pytestmark = pytest.mark.drill("published")

HOST = "machine-of-alice"
needs_onnx = pytest.mark.skipif(
    any(not importlib.util.find_spec(name) for name in ("onnx", "onnxscript")),
    reason="onnx and onnxscript are not installed",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of a user whose name must not get out."""
    folder = tmp_path / "alice-home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: HOST)
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    return folder


def silent(content: bytes, *words: Path | str) -> None:
    for word in (HOST, *map(str, words)):
        assert word.encode() not in content, word


class Backbone(nn.Module):
    name, stride, channels, fingerprint = "fake", 4, 4, "fake"

    def forward(self, image01: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(image01, 4)[:, [0, 1, 2, 0]]


def test_weights_card_and_metadata(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("upbench.features.backbones.load_backbone", lambda name, device="cpu": Backbone())
    for folder in ("photos", "others|<b>"):
        (home / folder).mkdir()
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{index}.png")
    config = TrainConfig(
        method="carafe",
        images=(str(home / "photos"), str(home / "others|<b>")),
        val_images=(str(home / "photos"),),
        out=str(home / "out" / "mine.safetensors"),
        backbone=("fake",),
        steps=2,
        batch=1,
        views=ViewConfig(view_size=32, guidance_size=32, crops_per_image=1, scales_per_view=1),
        warmup=0,
        device="cpu",
    )
    result = train(config)
    card = result.card.read_text()
    with safe_open(result.out, "pt") as file:
        metadata = file.metadata()
    silent(result.out.read_bytes(), home, "alice-home")
    silent(card.encode(), home, "alice-home")
    assert "--images photos" in metadata["command"]
    assert "--out mine.safetensors" in metadata["command"]
    assert str(home / "photos") in config.command(), "the one that is run again names all"
    assert "| Photos | photos, others\\|&lt;b> |" in card
    assert "(2 photos of photos)" in card or "of photos)" in card


def test_the_command_of_weights_that_began_from_others():
    config = TrainConfig("carafe", ("/data/a", "b/c"), "/x/y.safetensors", backbone=("fake",))
    command = replace(config, init="/home/alice/z.pth").command(published=True)
    assert command.startswith("upbench train carafe --backbone fake --images a --images c ")
    assert "--out y.safetensors" in command
    assert "--init z.pth" in command
    assert "/" not in command


class Exported(Upsampler):
    """A convolution, for other C than any."""

    def __init__(self, channels: int = 384) -> None:
        super().__init__(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(
        self, image: torch.Tensor, features: torch.Tensor, output_size: tuple[int, int]
    ) -> torch.Tensor:
        return nn.functional.interpolate(self.mix(features), output_size)


Exported.name = "exported"


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=needs_onnx), "pt2"])
def test_exported_models(kind: str, home: Path, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(Upsampler.registered, "exported", Exported)
    save_file(load_method("exported", "none", channels=8).state_dict(), home / "own.safetensors")
    path = home / f"model.{kind}"
    sizes = {"image_size": (28, 42), "feature_size": (2, 3), "channels": 8}
    done = export("exported", path, weights=str(home / "own.safetensors"), **sizes)
    assert done.metadata["weights"] == "own.safetensors"
    silent(path.read_bytes(), home, "alice-home", root, Path(torch.__file__).parent)


def test_records_of_failures(toy, home: Path, tmp_path: Path):
    plugin = home / "mine.py"
    plugin.write_text(
        "import torch.nn.functional as F\nfrom pathlib import Path\nfrom upbench import Upsampler\n"
        "class Mine(Upsampler):\n    name = 'mine_fails'\n"
        "    def forward(self, image, features, output_size):\n"
        "        return (Path.home() / 'private' / 'table.txt').read_text()\n"
    )
    run(toy.config(tmp_path / "run", "mine_fails", plugins=[*toy.config(tmp_path).plugins, str(plugin)]))
    (record,) = load_records(tmp_path / "run")
    assert record.status == "failed"
    assert "~/private/table.txt" in record.reason
    assert "FileNotFoundError" in record.reason
    assert '"~/mine.py"' in record.traceback
    silent(json.dumps(record.to_dict()).encode(), home, "alice-home")
    assert find_method("mine_fails") is not None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read {home}/a.txt", "cannot read ~/a.txt"),
        ("{home}", "~"),
        ("'{home}': {home}/x:{home}/y", "'~': ~/x:~/y"),
        ("{home}-of-another/a", "{home}-of-another/a"),
        ("{home}2", "{home}2"),
        ("nothing", "nothing"),
    ],
)
def test_the_home_folder_is_a_tilde(home: Path, text: str, shown: str):
    assert without_home(text.format(home=home)) == shown.format(home=home)
