"""The configs of papers' tables: every name in them is there, and what a table has is in its file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import miniatures
import pytest
import timm

from upbench.errors import UpbenchError
from upbench.evaluate import module_heads
from upbench.features import backbones
from upbench.registry import find_dataset, find_method, find_protocol, find_task
from upbench.results.papers import load_published
from upbench.run.config import RunConfig
from upbench.run.loop import run
from upbench.testing import tiny_backbone

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "papers").glob("*.yaml"))

# Protocols that published numbers name, for which there is no task or no dataset yet.
NUMBERS_ALONE = {"raysup-davis", "naf-davis", "loftup-davis", "anyup-fidelity", "jafar-depth"}
FIND = {"protocol": find_protocol, "dataset": find_dataset, "task": find_task, "method": find_method}


def comment(file: Path) -> str:
    """What a file says above its settings, as one line."""
    lines = [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#")]
    return " ".join(" ".join(lines).split())


def names(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every (kind, name) in a config."""
    for part in config.each():
        yield "protocol", part.protocol
        yield from (("task", name) for name in part.tasks)
        yield from (("dataset", entry.partition(":")[0]) for entry in part.datasets)
        yield from (("method", spec.name) for spec in part.methods)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestFile:
    def test_says_what_it_is_and_how_it_is_run(self, file: Path):
        config, text = RunConfig.load(file), comment(file)
        paper = next(row.paper for row in load_published() if row.paper.name == file.stem.partition("_")[0])
        assert text.startswith(f"{paper.title} (arXiv {paper.arxiv}), ")
        assert f"upbench run --config configs/papers/{file.name}" in text
        assert config.out == f"runs/papers/{file.stem}"
        assert config.seeds == 1, "as papers: one training a number"
        assert config.limit is None

    def test_names_are_there(self, file: Path):
        for kind, name in names(RunConfig.load(file)):
            FIND[kind](name)

    def test_methods_have_these_weights_and_options(self, file: Path):
        for part in RunConfig.load(file).each():
            for spec in part.methods:
                cls = find_method(spec.name)
                assert set(spec.options) <= set(cls.option_names()), spec
                known = ("default", "none", *cls.weights)
                assert spec.weights in known or (ROOT / spec.weights).is_file(), spec
                cls(channels=384, **spec.options)

    def test_backbones_are_timms(self, file: Path):
        for part in RunConfig.load(file).each():
            assert set(part.backbones) <= set(timm.list_pretrained())

    def test_weights_fit_a_backbone(self, file: Path):
        """Weights that are tied to a backbone stand in a part that has it."""
        for part in RunConfig.load(file).each():
            for spec in part.methods:
                entry = find_method(spec.name).weights.get(spec.weights)
                if entry is not None and entry.backbone:
                    assert entry.backbone in part.backbones, (spec.title, part.backbones)

    def test_what_its_table_has_is_in_it(self, file: Path):
        """Each part has published numbers of its paper; its methods are the table's, or the comment says what
        is missing."""
        config, text = RunConfig.load(file), comment(file).lower()
        head = comment(file).partition(":")[0]
        tables = {f"Table {number}" for number in re.findall(r"\b\d+\b", head.partition("Table")[2])}
        rows = [row for row in load_published() if row.paper.name == file.stem.partition("_")[0]]
        for part in config.each():
            protocol = {"naf-seg": "raysup-seg"}.get(part.protocol, part.protocol)
            for dataset in part.datasets:
                found = [
                    row
                    for row in rows
                    if (row.protocol, row.dataset) == (protocol, dataset) and row.backbone in part.backbones
                ]
                if not found:  # numbers whose dataset or backbone was not named where they were read
                    assert "named nowhere" in text, (part.protocol, dataset)
                methods = {spec.name for spec in part.methods}
                for row in found:
                    if not tables or not row.table or row.table in tables:
                        told = "without an upsampler" if row.method == "low_res" else row.method
                        assert row.method in methods or told in text, (row.method, part.protocol, dataset)


def test_protocols_of_published_numbers_are_there():
    for name in {row.protocol for row in load_published() if row.protocol} - NUMBERS_ALONE:
        assert find_protocol(name).name == name, "numbers stand under a protocol's own name"


def test_tasks_metrics_and_splits_of_published_numbers_are_there():
    """Of what may stand beside a measured number: else a slip in a name would hide it for ever."""
    for row in load_published():
        if row.protocol and row.protocol not in NUMBERS_ALONE:
            assert row.metric in {metric.name for metric in find_task(row.task).metrics}, row
            assert row.split in find_dataset(row.dataset).eval_splits, row


def told() -> Iterator[tuple[str, list[str], list[str]]]:
    """(config, protocols, the other columns) of each line of the table in docs/papers.md."""
    config, protocols = "", [""]
    lines = (ROOT / "docs" / "papers.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| config |")) + 2
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[begin:]):
        first, second, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        config = first.strip("`") or config
        if second:
            protocols = re.findall(r"`([\w-]+)`", second)
            protocols = [name if name[0] != "-" else f"{protocols[0]}{name}" for name in protocols]
        yield config, protocols, rest


def test_the_page_has_every_cell():
    found: dict[tuple[str, str, str], int] = {}
    for config, protocols, (dataset, _, _, _, cells) in told():
        for protocol in protocols:
            found[config, protocol, dataset.strip("`")] = int(cells) // len(protocols)
    expected = {}
    for file in FILES:
        for part in RunConfig.load(file).each():
            for dataset in part.datasets:
                key = (file.stem, part.protocol, dataset)
                expected[key] = expected.get(key, 0) + len(part.methods) * len(part.backbones)
    assert found == expected


def test_the_page_has_the_steps_of_each_training():
    for _, protocols, (dataset, images, training, steps, _) in told():
        name = dataset.strip("`")
        for protocol in (find_protocol(each)() for each in protocols):
            if training == "none":
                continue
            cls = find_dataset(name)
            counts = [cls.counts[split] for split in (cls.train_split, cls.eval_splits[0])]
            assert images == " / ".join(f"{count:,}" for count in counts), name
            recipe = protocol.recipe_for(dataset=name)
            assert training == f"{recipe.epochs}, {recipe.batch_size}", (protocol.name, name)
            taken = recipe.epochs * -(-counts[0] // recipe.batch_size)
            assert steps.removesuffix(" each") == f"{taken:,}", (protocol.name, name)


def test_readme_says_how():
    text = (ROOT / "configs" / "papers" / "README.md").read_text()
    (used,) = set(re.findall(r"--config (configs/papers/\w+\.yaml)", text))
    assert (ROOT / used).is_file()
    with pytest.raises(UpbenchError):
        RunConfig.load(ROOT / "configs" / "papers" / "README.md")


@pytest.fixture(scope="module")
def miniature_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$UPBENCH_DATA with a miniature of every dataset that a table has."""
    made = {
        "voc2012": miniatures.voc2012,
        "ade20k": miniatures.ade20k,
        "cityscapes": miniatures.cityscapes,
        "coco_stuff27": miniatures.coco_stuff,
        "nyuv2_geonet": miniatures.geonet,
    }
    data = tmp_path_factory.mktemp("data")
    for name, make in made.items():
        folder = data / (find_dataset(name).folder or name)
        folder.mkdir()
        make(folder)
    return data


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_table_runs(file: Path, toy, miniature_data: Path, tmp_path: Path, monkeypatch):
    """Two images a split, one epoch, a small backbone, and DPT heads of little width."""
    monkeypatch.setenv("UPBENCH_DATA", str(miniature_data))
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbones, "load_backbone", lambda *_, **__: tiny_backbone(16, 14, 8, 12))
    monkeypatch.setattr(module_heads, "HIDDEN", 8)
    given = {"methods": ["bilinear"], "backbones": ["tiny"], "limit": 2, "probe": {"epochs": 1}}
    config = RunConfig.load(file, {**given, "device": "cpu", "out": str(tmp_path / "out")})
    records = run(config)
    wanted = {
        (part.protocol, task, dataset)
        for part in config.each()
        for task in part.tasks
        for dataset in part.datasets
    }
    found = {(record.cell.protocol, record.cell.task, record.cell.dataset) for record in records}
    assert found == {(find_protocol(protocol).name, task, dataset) for protocol, task, dataset in wanted}
    assert [record.status for record in records] == ["ok"] * len(wanted), [r.reason for r in records]
