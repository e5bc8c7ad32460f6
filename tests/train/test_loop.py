"""Training: the loss against loops, batches, exact resumption, what is left behind, bad input."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from drill.disks import fill, small_disk
from safetensors import safe_open
from training import VIEWS, FakeBackbone, change

from upbench.cli.dispatch import main
from upbench.errors import UpbenchError
from upbench.testing import assert_close
from upbench.train.loop import (
    TrainConfig,
    TrainResult,
    _Run,
    cosine_loss,
    learning_rate,
    scaled_mse,
    train,
    upsampling_loss,
)
from upbench.train.views import Batch


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """This process gets a signal while the step after `steps` steps is computed."""
    optimise = _Run.optimise

    def interrupted(run: _Run, batch: object) -> float:
        if run.step == steps:
            os.kill(os.getpid(), number)
        return optimise(run, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(_Run, "optimise", interrupted)


def test_losses_against_loops():
    prediction, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    cosines, squares = [], []
    for b in range(2):
        for i in range(3):
            for j in range(4):
                p, t = prediction[b, :, i, j].tolist(), target[b, :, i, j].tolist()
                dot = sum(x * y for x, y in zip(p, t, strict=True))
                cosines.append(dot / math.sqrt(sum(x * x for x in p)) / math.sqrt(sum(x * x for x in t)))
                low, high = min(t), max(t)
                for x, y in zip(p, t, strict=True):
                    squares.append(((x - low) / (high - low) - (y - low) / (high - low)) ** 2)
    expected = 1 - sum(cosines) / len(cosines), sum(squares) / len(squares)
    losses = [loss(prediction, target).item() for loss in (cosine_loss, scaled_mse, upsampling_loss)]
    assert_close(losses, [*expected, sum(expected)], dtype=torch.float32)
    assert_close(upsampling_loss(target, target).item(), 0.0, scale=1, dtype=torch.float32)


def test_constant_targets_give_a_finite_gradient():
    prediction = torch.randn(1, 4, 2, 2, requires_grad=True)
    upsampling_loss(prediction, torch.ones(1, 4, 2, 2)).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_learning_rate_rises_then_falls(config: TrainConfig):
    config = change(config, steps=10, warmup=3, lr=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 6 / 7)))
    constant = change(config, schedule="constant")
    assert [learning_rate(constant, step) for step in range(4, 10)] == [1.0] * 6


def test_a_run_learns_and_leaves_weights_curve_and_card(config: TrainConfig):
    result = train(change(config, steps=60, val_images=config.images, val_every=30, val_views=2))
    rows = [json.loads(line) for line in result.curve.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 61, 2))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [row["step"] for row in rows if "val_cosine" in row] == [30, 60]
    assert result.val_cosine == rows[-1]["val_cosine"] > rows[14]["val_cosine"]
    assert result.finished
    assert (result.steps, result.images_seen) == (60, 120)
    with safe_open(result.out, framework="pt") as file:
        metadata = file.metadata()
        assert "guide.weight" in set(file.keys())
    assert (metadata["method"], metadata["backbone"], metadata["steps"]) == (config.method, "fake", "60")
    assert metadata["images_seen"] == "120"
    assert "torch" in json.loads(metadata["versions"])
    card = result.card.read_text()
    for fact in (result.sha256, config.method, "120 images", "bilinear", metadata["command"]):
        assert fact is not None
        assert fact in card
    assert not config.paths().resume.exists()
    assert {p.name for p in result.out.parent.iterdir()} == {
        p.name for p in (result.out, result.curve, result.card)
    }


def test_a_second_training_counts_the_images_of_the_first(config: TrainConfig, tmp_path: Path):
    first = train(config)
    again = train(change(config, init=str(first.out), out=str(tmp_path / "again.safetensors"), steps=2))
    with safe_open(again.out, framework="pt") as file:
        assert file.metadata()["images_seen"] == str(first.images_seen + 4)
    assert (again.images_seen, again.images_before) == (4, first.images_seen)
    assert f" views, after {first.images_seen} images of `{first.out.name}` |" in again.card.read_text()


def test_trained_weights_load_as_a_checkpoint(config: TrainConfig):
    from upbench.weights.load import load_method

    result = train(config)
    method = load_method(config.method, result.out, channels=4)
    assert not method.training


def test_a_checkpoint_remembers_its_options(config: TrainConfig):
    from upbench.registry import find_method
    from upbench.weights.load import load_method, options_unlike_training
    from upbench.weights.resolve import resolve

    result = train(change(config, options={"width": 5}, steps=1))
    assert "| Options | width 5 |" in result.card.read_text()
    assert load_method(config.method, result.out, channels=4).smooth.kernel_size == (5, 5)
    with pytest.raises(UpbenchError, match="instead of"):
        load_method(config.method, result.out, channels=4, width=3)
    cls = find_method(config.method)
    assert options_unlike_training(cls, resolve(cls, result.out), {"width": 5, "broken": False}) == {}
    assert options_unlike_training(cls, resolve(cls, result.out), {"broken": True}) == {
        "broken": (True, False)
    }


@pytest.mark.parametrize("recipe", ["guidance", "crop"])
def test_an_interrupted_run_ends_with_the_same_bits(
    recipe: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from dataclasses import replace

    config = change(config, views=replace(VIEWS, recipe=recipe), guidance_sizes=(8, 16))
    whole = train(change(config, out=str(tmp_path / "whole.safetensors")))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        part = train(config)
    assert (part.finished, part.steps, part.sha256) == (False, 3, None)
    assert not part.out.exists()
    assert config.paths().resume.is_file()
    resumed = train(change(config, resume=True))
    assert resumed.finished
    assert state(resumed) == state(whole)
    assert resumed.curve.read_text() == whole.curve.read_text()
    assert resumed.loss == whole.loss


def state(result: TrainResult) -> dict[str, list[float]]:
    with safe_open(result.out, framework="pt") as file:
        return {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118


def test_a_kill_between_checkpoints_loses_the_steps_since(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = train(change(config, out=str(tmp_path / "whole.safetensors")))

    class Killed(BaseException):
        pass

    optimise = _Run.optimise

    def killed(run: _Run, batch: object) -> float:
        if run.step == 5:
            raise Killed
        return optimise(run, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "optimise", killed)
        with pytest.raises(Killed):
            train(change(config, save_every=3))
    resumed = train(change(config, save_every=3, resume=True))
    assert state(resumed) == state(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_says_what_stopped_it(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, number: int):
    """And the command ends as others do that a signal stops."""
    stop_after(monkeypatch, 1, number)
    assert main(shlex.split(config.command())[1:]) == 128 + number
    assert config.paths().resume.is_file()


@pytest.mark.drill("full disk")
def test_a_full_disk_leaves_the_older_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = train(change(config, out=str(tmp_path / "whole.safetensors")))
    optimise = _Run.optimise
    with small_disk(tmp_path / "disk", "256k") as disk:
        config = change(config, out=str(disk / "w.safetensors"), save_every=2, log_every=100)

        def filling(run: _Run, batch: object) -> float:
            if run.step == 3:
                fill(disk)
            return optimise(run, batch)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(_Run, "optimise", filling)
            capsys.readouterr()
            assert main(shlex.split(config.command())[1:]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"upbench: error: disk full: cannot write {config.paths().resume} (")
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "w.resume.pt"]
        (disk / "filler").unlink()
        assert state(train(change(config, resume=True))) == state(whole)


def test_interrupts_restore_the_handlers(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_after(monkeypatch, 1, signal.SIGINT)
    assert not train(config).finished
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_micro_batches_sum_to_the_same_gradient(config: TrainConfig, tmp_path: Path):
    """In eval mode: the masks of dropout would differ."""
    from upbench.train.views import MixedPool, prepare

    pool = prepare(config.images, FakeBackbone(), config.views)  # type: ignore[arg-type]
    gradients = []
    for size in (1, 4):
        run = _Run(change(config, micro_batch=size), 4, torch.device("cpu"), MixedPool([pool]), {})
        run.model.eval()
        run.optimise(pool.batch(0, 4, 0))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    assert_close(*gradients)


def test_bf16_autocast_trains(config: TrainConfig):
    assert math.isfinite(train(change(config, steps=2, dtype="bf16")).loss)


def test_the_command_repeats_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from upbench.cli.dispatch import main

    views = replace(config.views, recipe="crop", ratio=(0.3, 0.4))
    config = change(config, views=views, options={"broken": False}, guidance_sizes=(8, 16), device="auto")
    command = config.command()
    assert command.startswith("upbench train tiny-trainable --backbone fake --images ")
    assert "--schedule" not in command  # a default
    parsed = []

    def catch(config: TrainConfig) -> None:
        parsed.append(config)
        raise UpbenchError("enough")

    monkeypatch.setattr("upbench.train.loop.train", catch)
    assert main(shlex.split(command)[1:]) == 2
    assert parsed == [config]


def test_nan_stops_with_the_step(config: TrainConfig):
    with pytest.raises(UpbenchError, match="loss is nan at step 1"):
        train(change(config, options={"broken": True}))
    assert not Path(config.out).exists()


def test_names_are_checked(config: TrainConfig):
    with pytest.raises(UpbenchError, match="did you mean 'tiny-trainable'"):
        train(change(config, method="tiny-trainabel"))
    with pytest.raises(UpbenchError, match="method 'bilinear' has nothing to train"):
        train(change(config, method="bilinear"))
    with pytest.raises(UpbenchError, match="did you mean 'cosine'"):
        change(config, schedule="cosin")
    with pytest.raises(UpbenchError, match="unknown device"):
        train(change(config, device="cudda"))


def test_options_are_checked_before_anything_is_computed(config: TrainConfig, backbone: FakeBackbone):
    with pytest.raises(UpbenchError, match="'widht'; did you mean 'width'"):
        train(change(config, options={"widht": 5}))
    assert backbone.calls == 0


@pytest.fixture
def two_backbones(monkeypatch: pytest.MonkeyPatch, backbone: FakeBackbone) -> dict[str, FakeBackbone]:
    both = {"narrow": backbone, "wide": FakeBackbone(8)}
    monkeypatch.setattr("upbench.features.backbones.load_backbone", lambda name, device="cpu": both[name])
    return both


def test_two_backbones_take_turns(
    config: TrainConfig, two_backbones: dict[str, FakeBackbone], monkeypatch: pytest.MonkeyPatch
):
    widths: list[int] = []
    optimise = _Run.optimise

    def noted(run: _Run, batch: Batch) -> float:
        widths.append(batch.features.shape[1])
        return optimise(run, batch)

    monkeypatch.setattr(_Run, "optimise", noted)
    result = train(
        change(
            config,
            method="raysup",
            options={"dim": 64},
            backbone=tuple(two_backbones),
            val_images=config.images,
            val_views=2,
            val_every=3,
        )
    )
    assert widths == [4, 8, 4, 8, 4, 8]
    rows = [json.loads(line) for line in result.curve.read_text().splitlines()]
    measured = next(row for row in rows if row["step"] == 3)
    each = [measured[f"val_cosine/{name}"] for name in two_backbones]
    assert each[0] != each[1]
    assert_close(measured["val_cosine"], sum(each) / 2, dtype=torch.float32)
    with safe_open(result.out, framework="pt") as file:
        assert file.metadata()["backbone"] == "narrow, wide"
        assert "--backbone narrow --backbone wide" in file.metadata()["command"]
    assert "narrow, wide" in result.card.read_text()


def test_parameters_that_depend_on_c_serve_one_width_only(
    config: TrainConfig, two_backbones: dict[str, FakeBackbone]
):
    with pytest.raises(UpbenchError, match=r"'tiny-trainable' depend on C, .* 4 and 8 channels"):
        train(change(config, backbone=tuple(two_backbones)))
    assert all(backbone.calls == 0 for backbone in two_backbones.values())


@pytest.mark.parametrize(
    ("names", "message"), [((), "no backbone"), (("a", "b", "a"), "named twice: a, b, a")]
)
def test_a_wrong_number_of_backbones(config: TrainConfig, names: tuple[str, ...], message: str):
    with pytest.raises(UpbenchError, match=message):
        change(config, backbone=names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("out", "weights.pth"),
        ("guidance_sizes", (32,)),
        ("guidance_sizes", (0,)),
        ("micro_batch", -1),
        ("warmup", -5),
        ("clip", math.nan),
        ("save_minutes", math.nan),
        ("seed", -1),
        ("steps", True),
        ("images", ()),
        ("force", 1),
    ],
)
def test_values_are_checked(config: TrainConfig, field: str, value: object):
    with pytest.raises(UpbenchError, match=field.replace("_", "-")):
        change(config, **{field: value})


def test_outputs_are_not_replaced_unasked(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        train(config)
    with pytest.raises(UpbenchError, match=r"an unfinished run lies at .*--resume goes on"):
        train(config)
    train(change(config, resume=True))
    with pytest.raises(UpbenchError, match="exists; --force replaces it"):
        train(config)
    assert train(change(config, force=True)).finished


def test_a_checkpoint_of_another_run_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        train(config)
    with pytest.raises(UpbenchError, match=r"a run with lr 0\.01, not 0\.5"):
        train(change(config, lr=0.5, resume=True))
    config.paths().resume.write_bytes(b"no checkpoint")
    with pytest.raises(UpbenchError, match="corrupt"):
        train(change(config, resume=True))


def test_an_output_that_cannot_be_written(config: TrainConfig, backbone: FakeBackbone, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UpbenchError, match=r"cannot write the weights to .*: a file is in its place"):
        train(change(config, out=str(tmp_path / "file" / "w.safetensors")))
    assert backbone.calls == 0  # found out before anything is computed
