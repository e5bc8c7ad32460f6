"""The configuration of a run: sources, bad values, wildcards."""

from __future__ import annotations

import re

import pytest

from upbench.errors import UpbenchError
from upbench.registry import match_names
from upbench.results.cell import MethodSpec
from upbench.run.config import RunConfig
from upbench.system.yaml_text import read_mapping

METHODS = ("anyup", "bicubic", "bilinear", "raysup")
TASKS = ("depth", "normals", "seg")


def test_command_line_over_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("methods: [raysup, {name: anyup, window: 7, label: Wide}]\nseeds: 5\nlimit: 4\n")
    config = RunConfig.load(file, {"seeds": 2, "limit": None, "tasks": "seg,depth"})
    assert config.seeds == 2, "the command line wins over the file"
    assert config.limit == 4, "a flag that was not given leaves the file's value"
    assert config.protocol == "quick", "what nobody gave is the default"
    assert config.tasks == ("seg", "depth")
    assert config.methods == (
        MethodSpec("raysup"),
        MethodSpec("anyup", options={"window": 7}, label="Wide"),
    )


def test_a_config_survives_its_own_dictionary():
    config = RunConfig(methods="raysup:none,bilinear", tasks=["seg"], limit=3, probe={"epochs": 2})
    assert RunConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods: [a]", "unknown key 'metods'; did you mean 'methods'?"),
        ("seeds: many", "seeds must be a whole number from 1 to 1000, got 'many'"),
        ("seeds: true", "seeds must be a whole number"),
        ("seeds: 0", "seeds must be a whole number from 1"),
        ("limit: -1", "limit must be a whole number"),
        ("force: 1", "force must be true or false"),
        ("device: gpu", "unknown device 'gpu'"),
        ("device: 'cuda:'", "unknown device 'cuda:'; did you mean 'cuda'?"),
        ("device: cuda:-1", "unknown device 'cuda:-1'"),
        ("protocol: ''", "protocol must be text, got ''"),
        ("protocol: standard\npreset: quick", "protocol 'standard' and preset 'quick' are two names for one"),
        ("dtype: float23", "unknown dtype 'float23'; did you mean 'float32'?"),
        ("executor: proces", "unknown executor 'proces'; did you mean 'process'?"),
        ("tasks: 3", "tasks: expected a list of names, got 3"),
        ("tasks: []", "tasks: expected a list of names"),
        ("tasks: [[seg]]", "tasks must be text"),
        ("methods: []", "methods: expected a list of names"),
        ("methods: [4]", "methods: expected a name or a mapping with 'name', got 4"),
        ("methods: [{weights: none}]", "needs a 'name'"),
        ("methods: ['raysup:']", "expected NAME or NAME:WEIGHTS"),
        ("methods: [{name: a, size: {b: 1}}]", "'size' must be a plain value"),
        ("probe: [3]", "probe: expected a mapping"),
        ("probe: {lr: [[1]]}", "probe: 'lr' must be a plain value"),
        ("out: ''", "out must be text"),
        ("shard: 3/2", "shard: expected I/N with 1 <= I <= N, as in 2/4, got '3/2'"),
        ("shard: 0/2", "shard: expected I/N"),
        ("shard: 1/0", "shard: expected I/N"),
        ("shard: '1'", "shard: expected I/N"),
        ("shard: 1 of 2", "shard: expected I/N"),
        ("shard: -1/2", "shard: expected I/N"),
        ("shard: 1/2/3", "shard: expected I/N"),
        ("shard: 2", "shard: expected I/N"),
        ("shard: [1, 2]", "shard: expected I/N"),
        ("- a\n- b", "must be a mapping of settings"),
        ("a: [", "is not YAML"),
        ("{1: 2}", "has the key '1', which is not text (line 1); put it in quotes"),
    ],
)
def test_bad_values_are_told_in_one_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UpbenchError) as caught:
        RunConfig.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_on_the_command_line_does_not_blame_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seeds: 2\n")
    with pytest.raises(UpbenchError) as caught:
        RunConfig.load(file, {"seeds": 0})
    assert str(file) not in str(caught.value)


def test_missing_or_binary_config_file(tmp_path):
    with pytest.raises(UpbenchError, match="config file not found"):
        read_mapping("config file", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(
        UpbenchError, match=r"cannot read config file .*bad\.yaml'.*: it is not text in UTF-8"
    ):
        read_mapping("config file", tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_mapping("config file", tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", list(METHODS)),
        ("b*", ["bicubic", "bilinear"]),
        ("*up", ["anyup", "raysup"]),
        ("anyup", ["anyup"]),
        ("?aysup", ["raysup"]),
    ],
)
def test_wildcards(pattern, expected):
    assert match_names("method", pattern, METHODS) == expected


def test_names_that_match_nothing():
    with pytest.raises(UpbenchError, match="unknown method 'raysupp'; did you mean 'raysup'"):
        match_names("method", "raysupp", METHODS)
    with pytest.raises(UpbenchError, match=r"no task matches 'x\*'; known: depth, normals, seg"):
        match_names("task", "x*", TASKS)


def test_wildcards_keep_weights_and_repeat_nothing():
    config = RunConfig(methods="bilinear,b*,raysup:none,raysup", tasks="all").select(METHODS, TASKS, ())
    assert [m.title for m in config.methods] == ["bilinear", "bicubic", "raysup:none", "raysup"]
    assert config.tasks == ("depth", "normals", "seg")


def test_datasets_keep_their_folders():
    chosen = RunConfig(datasets=["voc:/data/voc", "i*", "interiors"]).select(
        METHODS, TASKS, ("interiors", "voc")
    )
    assert chosen.datasets == ("voc:/data/voc", "interiors")


def test_preset_is_another_name_of_protocol(tmp_path):
    assert RunConfig(preset="standard") == RunConfig(protocol="standard")
    file = tmp_path / "run.yaml"
    file.write_text("preset: standard\n")
    assert RunConfig.load(file).protocol == "standard"
    assert RunConfig.load(file, {"protocol": "quick"}).protocol == "quick", "whichever name the file has"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:7"])
def test_devices(device):
    assert RunConfig(device=device).device == device


def test_parts():
    assert RunConfig().part() == (1, 1)
    assert RunConfig(shard="2/3").part() == (2, 3)


class TestParts:
    """A run of several protocols: each part has something of its own, and the rest from the run."""

    def test_each_is_a_run_of_its_own(self):
        parts = [{"protocol": "standard", "tasks": "depth"}, {"methods": ["raysup"], "probe": {"epochs": 2}}]
        config = RunConfig(methods="bilinear", seeds=5, parts=parts)
        first, second = config.each()
        assert (first.protocol, first.tasks, first.seeds, first.parts) == ("standard", ("depth",), 5, ())
        assert first.methods == config.methods
        assert (second.protocol, second.methods) == ("quick", (MethodSpec("raysup"),))
        assert second.probe == {"epochs": 2}
        assert RunConfig(**config.to_dict()) == config
        assert RunConfig(seeds=5).each() == [RunConfig(seeds=5)]

    def test_what_is_given_wins_over_them(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text("parts: [{protocol: standard, tasks: [seg]}, {protocol: quick, tasks: [depth]}]\n")
        loaded = RunConfig.load(file, {"tasks": "normals", "limit": 2})
        assert [(part.protocol, part.tasks, part.limit) for part in loaded.each()] == [
            ("standard", ("normals",), 2),
            ("quick", ("normals",), 2),
        ]
        assert {part.protocol for part in RunConfig.load(file, {"preset": "mine"}).each()} == {"mine"}

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ("seg", "parts: expected a list of mappings, got 'seg'"),
            ({"protocol": "quick"}, "parts: expected a list of mappings"),
            (["quick"], "part 1: expected a mapping, got 'quick'"),
            (
                [{"tasks": "seg"}, {"protocl": "quick"}],
                "unknown key 'protocl'; did you mean 'protocol'?; in part 2",
            ),
            ([{"out": "x"}], "unknown key 'out'"),
            ([{"tasks": []}], "part 1: tasks: expected a list of names"),
            ([{"methods": [{"weights": "x"}]}], "part 1: methods:"),
        ],
    )
    def test_what_is_wrong_is_named(self, parts, message, tmp_path):
        with pytest.raises(UpbenchError, match=re.escape(message)):
            RunConfig(parts=parts)
