"""The command line: quick, polite about bad input, and equal to the Python API."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import upbench
from upbench.cli import dispatch as cli
from upbench.cli.dispatch import main
from upbench.cli.list import LISTS
from upbench.results.records import load_records
from upbench.run import loop as runner
from upbench.train.config import TrainConfig, ViewConfig


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line in which a command refuses bad input, with exit code 2."""
    assert main([*words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, line = captured.err.splitlines()
    assert line.startswith("upbench: error: ")
    about = ("records in", "features of")
    assert all(any(word in other for word in about) for other in before), "what the run was about to do"
    return line


# ------------------------------------------------------------------------------------------------ start


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from upbench.cli.dispatch import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'numpy', 'timm', 'yaml', 'rich', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for words in (["--help"], ["run", "--help"], ["report", "--help"], ["train", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_report_of_records_imports_no_torch(toy, out):
    runner.run(toy.config(out))
    code = (
        "import sys; from upbench.cli.dispatch import main; assert main(['report', sys.argv[1]]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert "| Smooth" in done.stdout


def test_version_and_module():
    done = subprocess.run(
        [sys.executable, "-m", "upbench", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"upbench {upbench.__version__}\n"


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "usage: upbench" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- run


def test_a_run_prints_its_table_and_exits_with_0(toy, out, capsys):
    assert main(toy.arguments(out)) == 0
    captured = capsys.readouterr()
    assert "### tiny · toy/val · tiny-v3" in captured.out
    assert "| Smooth |" in captured.out
    assert "[1/1] toy_smooth" in captured.err


def test_flags_are_the_fields_of_the_config(toy, out, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda config, debug: seen.append(config) or [])
    words = "--limit 3 --dtype bfloat16 --force --executor process --workers 3 --shard 2/3"
    words += " --probe lr=1e-3 --probe epochs=4"
    main([*toy.arguments(out, "toy_smooth,toy_trained:none"), *words.split(), "--quiet"])
    expected = toy.config(
        out,
        ["toy_smooth", "toy_trained:none"],
        limit=3,
        dtype="bfloat16",
        force=True,
        executor="process",
        workers=3,
        shard="2/3",
        probe={"lr": 1e-3, "epochs": 4},
    )
    assert seen == [expected]
    flags = {action.dest for action in cli._parser("run")[1]["run"]._actions}
    assert {field.name for field in dataclasses.fields(upbench.RunConfig)} - {"parts"} <= flags


def test_flags_win_over_a_file(toy, out, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda config, debug: seen.append(config) or [])
    file = tmp_path / "run.yaml"
    file.write_text("methods: [toy_smooth]\nseeds: 7\nlimit: 2\n")
    main(["run", "--config", str(file), "--seeds", "4", "--quiet"])
    assert (seen[0].seeds, seen[0].limit) == (4, 2)


def test_a_failed_cell_is_exit_code_1(toy, out, capsys):
    assert main(toy.arguments(out, "toy_smooth,toy_fails")) == 1
    captured = capsys.readouterr()
    assert "upbench: failed: toy_fails · seg · toy · tiny: ValueError: boom in two lines" in captured.err
    assert "failed [1]" in captured.out
    assert "[1] toy_fails, seg: ValueError: boom in two lines" in captured.out


def test_a_skipped_cell_is_no_failure(toy, out, capsys):
    assert main(toy.arguments(out, "toy_skips")) == 0
    assert "[1] toy_skips, seg: only 16x, not 8x" in capsys.readouterr().out


def test_ctrl_c_says_what_is_kept_and_exits_with_130(toy, out, capsys):
    assert main(toy.arguments(out, "toy_smooth,toy_stops")) == 130
    err = capsys.readouterr().err
    assert "stopped: 1 of 2 cells are kept" in err
    assert "Traceback" not in err


def test_sigterm_ends_a_run_as_ctrl_c_does(toy, out, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    summary = runner.summary

    def killed(record: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return summary(record)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "summary", killed)
    assert main(toy.arguments(out, "toy_smooth")) == 143
    assert "stopped: 1 of 1 cells are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["run", "--sedes", "3"], "unknown option '--sedes'; did you mean '--seeds'?"),
        (["run", "--seeds", "x"], "argument --seeds: expected a whole number, got 'x'"),
        (["run", "--seeds", "0"], "seeds must be a whole number from 1 to 1000"),
        (["run", "extra"], "unexpected argument 'extra'"),
        (["run", "--config", "none.yaml"], "config file not found: none.yaml"),
        (["run", "--probe", "lr"], "--probe: expected KEY=VALUE, got 'lr'"),
        (["run", "--preset", "quik"], "unknown protocol 'quik'; did you mean 'quick'?"),
        (["run", "--protocol", "quik"], "unknown protocol 'quik'; did you mean 'quick'?"),
        (["run", "--shard", "3/2"], "shard: expected I/N with 1 <= I <= N, as in 2/4, got '3/2'"),
        (["run", "--shard", "half"], "shard: expected I/N with 1 <= I <= N, as in 2/4, got 'half'"),
        (["run", "--device", "cuda:x"], "unknown device 'cuda:x'; did you mean 'cuda'?"),
        (["report", "nowhere"], "no records: 'nowhere' does not exist"),
        (["report", ".", "--format", "mdd"], "unknown format 'mdd'; did you mean 'md'?"),
        (["list", "method"], "unknown list 'method'; did you mean 'methods'?"),
        (["list"], "the following arguments are required"),
        (["profile", "--size", "4x"], "expected a size such as 448 or 480x640, got '4x'"),
        (["profile", "--size", "8"], "size 8x8 is smaller than the stride 14"),
        (["profile", "--channels", "0"], "--channels must be a whole number from 1"),
        (["train", "bilinear", "--out", "x.safetensors"], "the following arguments are required: --images"),
        (["train", "raysup", "--images", "d", "--out", "x.pth"], "out must end in .safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_mean_nothing(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "toy_smoth"], "unknown method 'toy_smoth'; did you mean 'toy_smooth'?"),
        (["--methods", "x*"], "no method matches 'x*'"),
        (["--tasks", "segg"], "unknown task 'segg'; did you mean 'seg'?"),
        (["--datasets", "tyo"], "unknown dataset 'tyo'; did you mean 'toy'?"),
        (["--datasets", "toy:/no/such/folder"], "dataset folder not found: /no/such/folder"),
        (
            ["--backbones", "vit_smal_patch14_dinov2"],
            "unknown backbone 'vit_smal_patch14_dinov2'; did you mean",
        ),
        (["--backbones", "broken"], "backbone 'broken' gives features that are not finite"),
        (
            ["--methods", "toy_trained:god"],
            "unknown weights of method 'toy_trained' 'god'; did you mean 'good'?",
        ),
        (["--methods", "toy_trained"], "method 'toy_trained' has no default weights"),
        (["--methods", "toy_trained:no.pth"], "checkpoint not found: no.pth"),
        (["--plugin", "missing.py"], "plugin file not found: missing.py"),
        (["--protocol", "tyny"], "unknown protocol 'tyny'; did you mean 'tiny'?"),
        (["--probe", "epoch=3"], "unknown probe setting 'epoch'; did you mean 'epochs'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_and_places_that_are_not_there(toy, capsys, out, more, message):
    assert message in refused(capsys, *toy.arguments(out), *more)
    assert not out.exists(), "nothing is written"


def test_options_that_a_method_has_not(toy, capsys, out, tmp_path):
    file = tmp_path / "run.yaml"
    for entry, message in (
        (
            "{name: toy_smooth, mod: nearest}",
            "unknown option of method 'toy_smooth' 'mod'; did you mean 'mode'?",
        ),
        ("{name: toy_smooth, camera: dataset}", "method 'toy_smooth' uses no camera"),
        ("{name: toy_posed, camera: datset}", "unknown camera 'datset'; did you mean 'dataset'?"),
    ):
        file.write_text(f"methods: [{entry}]\n")
        words = toy.arguments(out)
        del words[1:3]  # the methods come from the file
        assert message in refused(capsys, *words, "--config", str(file))
    assert not out.exists()


@pytest.mark.parametrize(
    "kind", ["truncated", "garbage", "other size", "left over", "not finite", "wrong hash"]
)
def test_checkpoints_that_are_no_good(toy, capsys, out, tmp_path, kind):
    file = tmp_path / "toy.safetensors"
    save_file({"gain": torch.ones(6, 1, 1)}, file)
    weights, message = str(file), ""
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
        message = "is corrupt or truncated"
    elif kind == "garbage":
        file.write_bytes(os.urandom(256))
        message = "is corrupt or truncated"
    elif kind == "other size":
        save_file({"gain": torch.ones(7, 1, 1)}, file)
        message = "has gain [7, 1, 1] instead of [6, 1, 1]"
    elif kind == "left over":
        save_file({"gain": torch.ones(6, 1, 1), "more": torch.ones(1)}, file)
        message = "has more left over"
    elif kind == "not finite":
        save_file({"gain": torch.full((6, 1, 1), torch.nan)}, file)
        message = "not finite in gain"
    else:
        toy.find("toy_trained").weights["good"] = dataclasses.replace(
            toy.find("toy_trained").weights["good"], source=str(file)
        )
        weights, message = "good", "its sha256 is"
    assert message in refused(capsys, *toy.arguments(out, f"toy_trained:{weights}"))
    assert not out.exists()


def test_a_good_checkpoint_is_recorded_by_its_hash(toy, out, tmp_path):
    file = tmp_path / "toy.safetensors"
    save_file({"gain": torch.ones(6, 1, 1)}, file)
    assert main(toy.arguments(out, f"toy_trained:{file}")) == 0
    first = load_records(out)[0]
    assert len(first.inputs["weights"]["sha256"]) == 64
    assert "images_seen" not in first.inputs["weights"]
    save_file({"gain": torch.full((6, 1, 1), 2.0)}, file, {"images_seen": "70"})
    assert main(toy.arguments(out, f"toy_trained:{file}")) == 0
    (second,) = load_records(out)
    assert second.inputs["weights"]["sha256"] != first.inputs["weights"]["sha256"]
    assert second.inputs["weights"]["images_seen"] == 70


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(toy, capsys, out, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, *toy.arguments(out), "--device", device)
    assert f"device '{device}' asked for, but torch sees no GPU; use 'cpu' or 'auto'" in line
    assert not out.exists()


def test_one_gpu_more_than_there_are(toy, capsys, out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "unknown device 'cuda:7'; did you mean 'cuda:" in refused(
        capsys, *toy.arguments(out), "--device", "cuda:7"
    )
    assert not out.exists()


def test_a_plugin_that_raises(toy, capsys, out, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text("raise RuntimeError('on\\nimport')\n")
    line = refused(capsys, *toy.arguments(out), "--plugin", str(plugin))
    assert f"plugin file {plugin} raises RuntimeError on import: on import" in line
    assert not out.exists()


def test_images_without_labels_or_that_cannot_be_read(toy, capsys, out, monkeypatch):
    dataset = toy.find("toy", "dataset")
    read = dataset.read

    def without(self, split):
        raise upbench.UpbenchError("image val0.jpg has no label map")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "names", without)
        assert "val0.jpg has no label map" in refused(capsys, *toy.arguments(out))

    def damaged(self, split, index):
        if (split, index) == ("val", 2):
            raise upbench.UpbenchError("cannot read val2.png")
        return read(self, split, index)

    monkeypatch.setattr(dataset, "read", damaged)
    monkeypatch.setenv("TOY_DATA", "unread")
    assert refused(capsys, *toy.arguments(out)) == "upbench: error: cannot read val2.png"
    assert not out.exists(), "all images are looked at before anything is written"


def test_labels_that_are_no_classes(toy, capsys, out, monkeypatch):
    dataset = toy.find("toy", "dataset")
    monkeypatch.setattr(dataset, "classes", ("dark",))
    assert main(toy.arguments(out)) == 1
    assert "labels 0 to 1 of image 'train0' are out of range: dataset 'toy' names 1 classes" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/run", "/proc/upbench/run"])
def test_output_folders_that_cannot_be(toy, capsys, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    words = toy.arguments(tmp_path / place)
    assert main(words) == 2
    assert "upbench: error: output folder" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(toy, capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "no permission" in refused(capsys, *toy.arguments(tmp_path / "run"))
    tmp_path.chmod(0o700)


def test_a_disk_that_fills_up(toy, capsys, out, monkeypatch):
    assert main(toy.arguments(out)) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (out / "records").iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("upbench.results.records.os.fsync", full)
    assert main([*toy.arguments(out), "--force"]) == 2
    err = capsys.readouterr().err
    assert "upbench: error: disk full: cannot write" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in (out / "records").iterdir()} == before


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_disk_that_is_full_for_real(toy, capsys, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small disk")
    try:
        assert main(toy.arguments(disk / "run")) == 2
        assert "disk full" in capsys.readouterr().err.splitlines()[-1]
        left = [path for path in disk.rglob("*") if path.is_file()]
        for path in left:
            json.loads(path.read_text())
    finally:
        subprocess.run(["umount", disk], check=True)


# ------------------------------------------------------------------------------------------ the others


@pytest.mark.parametrize("what", LISTS)
def test_lists(toy, what, capsys):
    assert main(["list", what]) == 0
    text = capsys.readouterr().out
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert len(text.splitlines()) == len(rows) + 1
    expected = {
        "methods": "toy_smooth",
        "tasks": "seg",
        "datasets": "toy",
        "protocols": "tiny",
        "backbones": "dinov2_vits14_focus",
        "weights": "toy_trained:good",
    }[what]
    assert expected in text


def test_the_list_of_protocols_says_every_parameter(toy, capsys):
    assert main(["list", "protocols", "--json"]) == 0
    tiny = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == "tiny")
    assert tiny["version"] == 3
    assert tiny["parameters"]["geometry.side"] == 32
    assert tiny["parameters"]["recipe.epochs"] == 2
    main(["list", "protocols"])
    assert "recipe.epochs" not in capsys.readouterr().out, "a list fits the screen"


def test_report_formats_files_and_folders(toy, out, tmp_path, capsys):
    main(toy.arguments(out))
    capsys.readouterr()
    assert main(["report", str(out), "--format", "csv", "--metrics", "all"]) == 0
    head, line, *_ = capsys.readouterr().out.splitlines()
    assert "seg/pixel_accuracy_std" in head.split(",")
    assert line.startswith("tiny,toy,tiny-v3")
    file = tmp_path / "table.md"
    assert main(["report", str(out), "--out", str(file)]) == 0
    assert file.read_text().startswith("### tiny")
    assert main(["report", str(out), "--out", str(tmp_path / "no" / "table.md")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_reader_that_stops_reading(toy, out):
    runner.run(toy.config(out))
    pipe = f"{shlex.quote(sys.executable)} -m upbench report {shlex.quote(str(out))} | head -n 1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("###")
    assert done.stderr == ""


def test_profile(toy, capsys, tmp_path):
    file = tmp_path / "cost.json"
    words = "profile --methods toy_smooth,bilinear --size 32,48x64 --channels 8 --stride 8 --device cpu --out"
    assert main([*words.split(), str(file)]) == 0
    text = capsys.readouterr().out
    costs = json.loads(file.read_text())
    assert [(c["method"], c["output_size"]) for c in costs] == [
        ("toy_smooth", [32, 32]),
        ("toy_smooth", [48, 64]),
        ("bilinear", [32, 32]),
        ("bilinear", [48, 64]),
    ]
    assert "48x64" in text


def test_training_flags_repeat_the_command_that_a_card_shows(monkeypatch, tmp_path):
    config = TrainConfig(
        "anyup",
        ("photos", "more photos"),
        str(tmp_path / "w.safetensors"),
        steps=7,
        lr=1e-3,
        options={"window_ratio": 0.2},
        micro_batch=2,
        views=ViewConfig(recipe="crop", ratio=(0.3, 0.6), view_size=224),
    )
    seen = []

    def train(config):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("upbench.train.loop.train", train)
    assert main(shlex.split(config.command())[1:]) == 130
    assert seen == [config]
