"""Names that no paper's number has, and runs whose parts are wrong."""

from __future__ import annotations

from pathlib import Path

from drill.case import Case, Promise, refused


def part(name: str, text: str, promise: Promise) -> Case:
    """A run with a config of parts."""

    def given(folder: Path) -> None:
        (folder / "run.yaml").write_text(f"methods: [bilinear]\nparts: {text}\n")

    return Case("published", name, ("run", "--config", "run.yaml"), promise, given)


CASES = [
    Case("published", "method", ("published", "--method", "raysub"), refused("raysub", "raysup")),
    Case("published", "dataset", ("published", "--dataset", "voc"), refused("voc", "voc2012")),
    Case("published", "task", ("published", "--task", "segm"), refused("segm", "seg")),
    Case("published", "paper", ("published", "--paper", "anyupp"), refused("anyupp", "anyup")),
    Case(
        "published",
        "protocol",
        ("published", "--protocol", "raysup_seg"),
        refused("raysup_seg", "raysup-seg"),
    ),
    Case("published", "format", ("published", "--format", "html"), refused("html", "md")),
    Case("published", "option", ("published", "--methods", "raysup"), refused("--methods", "--method")),
    Case("published", "no-records", ("report", "--published", "nowhere"), refused("nowhere")),
    part("parts-no-list", "{protocol: quick}", refused("parts", "list of mappings")),
    part("part-no-mapping", "[quick]", refused("part 1", "mapping")),
    part("part-key", "[{tasks: [seg]}, {protocl: quick}]", refused("protocl", "protocol", "part 2")),
    part("part-out", "[{out: elsewhere}]", refused("out", "part 1")),
    part("part-value", "[{tasks: []}]", refused("part 1", "tasks")),
    part("part-protocol", "[{protocol: quik}]", refused("quik", "quick")),
]
