"""What stands below a table: what its numbers are, and what a reader must know about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from upbench.results.records import Record, size
from upbench.results.report.bootstrap import RESAMPLES
from upbench.results.report.model import Row

PARTIAL = "partial copy"
_OWN = "upbench"  # what protocols of upbench's own say of their source
RATIO = (
    "Native ratio: what the steps of a method upsample by; its output is resized bilinearly from the next "
    "size that they make. Methods without one make every size themselves"
)


def numbers(records: Sequence[Record], split: str) -> Iterable[str]:
    """Sizes, images, seeds and arithmetic, in one line."""
    head = records[0].cell
    parts = [*_sizes(records)]
    count = max((images(record, split) for record in records), default=0)
    if count:
        parts.append(f"{count} images")
    values = [len(of) for record in records for of in record.metrics.get(split, {}).values()]
    seeds = len(head.seeds)
    if seeds > 1 and max(values, default=seeds) > 1:
        parts.append(f"mean ± standard deviation over {seeds} seeds of the probe")
    else:
        parts.append("one seed" if seeds == 1 else "one value each")
    if head.dtype != "float32":
        parts.append(f"methods in {head.dtype}")
    yield "; ".join(parts)


def _sizes(records: Iterable[Record]) -> Iterable[str]:
    """Sizes of image and output, by task where tasks differ."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        named = {name: size(record.protocol.get(f"{name}_size")) for name in ("image", "output")}
        text = ", ".join(f"{name} {pixels} px" for name, pixels in named.items() if pixels is not None)
        if text:
            found.setdefault(f"{record.protocol_label}: {text}", {})[record.cell.task] = None
    for text, tasks in found.items():
        yield text if len(found) == 1 else f"{text} ({', '.join(tasks)})"


def images(record: Record, split: str) -> int:
    """How many images of a split were seen; 0 where the record does not say."""
    counts = [record.data[split]["images"]] if split in record.data else []
    counts += [len(record.per_image[split]["names"])] if split in record.per_image else []
    return int(counts[0]) if counts else 0


def partial(records: Iterable[Record], split: str) -> list[str]:
    """What is missing of the dataset: of a split, and of those that were trained on.

    Images that a limit leaves out are not missing.
    """
    return list(dict.fromkeys(text for record in records for text in _partial(record, split)))


def _partial(record: Record, split: str) -> Iterable[str]:
    for name, facts in record.data.items():
        seen, official = facts["images"], facts.get("official")
        if official is None or seen >= official or seen == record.cell.limit:
            continue
        if name == split:
            yield f"{seen} of {official} images"
        elif name not in record.metrics:
            yield f"{seen} of {official} images of {name}"


def protocol(records: Iterable[Record]) -> Iterable[str]:
    """Whether a protocol that follows a paper is exact, and where it does not, or cannot, do what its source
    does."""
    told: dict[str, None] = {}
    for record in records:
        exact, departures = record.protocol.get("exact", "exact"), record.protocol.get("departures", ())
        source = record.protocol.get("source", _OWN)
        if exact == "exact" and source != _OWN:
            told[f"{record.protocol_label} is exact: every parameter is known; {source}"] = None
        if exact != "exact":
            told[f"{record.protocol_label} is not exact; {exact}"] = None
        if departures:
            told[f"{record.protocol_label} departs from its source: {'; '.join(departures)}"] = None
    yield from told


def differences(against: str) -> str:
    """What the columns of differences are."""
    return (
        f"Δ: mean over images of an image's own value minus {against}'s, seeds averaged; in brackets the "
        f"95 % interval of a paired bootstrap over images ({RESAMPLES} resamples). For metrics of a whole "
        "split, such as mIoU, a mean over images is another number"
    )


def warnings(rows: Sequence[Row], told: Sequence[str]) -> Iterable[str]:
    """Warnings that are not told yet, with the rows that they are about unless that is all of them."""
    for text in dict.fromkeys(text for row in rows for text in row.warnings if text not in told):
        labels = [row.label for row in rows if text in row.warnings]
        who = "" if len(labels) == len(rows) and len(rows) > 1 else f"{', '.join(labels)}: "
        yield f"**Warning**: {who}{text}"


def weights(records: Iterable[tuple[str, Record]]) -> Iterable[str]:
    """The weights of rows, given as (label, record), and what they were trained on."""
    found: dict[str, str] = {}
    budgets: dict[str, int | None] = {}
    for label, record in records:
        used = record.inputs.get("weights") or {}
        if used.get("sha256"):
            seen = used.get("images_seen")
            trained = "" if seen is None else f", trained on {seen} images"
            name = f"{used['name']} " if used.get("name") else ""
            found[label] = f"{label} {name}(sha256 {used['sha256'][:12]}{trained})"
            budgets[label] = seen
    if found:
        yield f"Weights: {', '.join(sorted(found.values()))}"
    if len(set(budgets.values())) > 1:
        yield f"Training budgets differ: {'; '.join(_by_budget(budgets))}"


def _by_budget(budgets: Mapping[str, int | None]) -> Iterable[str]:
    """Rows of one budget together, the largest first, those that do not tell theirs last."""
    for seen in sorted(set(budgets.values()), key=lambda n: -1 if n is None else n, reverse=True):
        rows = ", ".join(sorted(label for label, own in budgets.items() if own == seen))
        yield f"{rows} not told" if seen is None else f"{rows} {seen} images"


def machines(records: Iterable[Record]) -> Iterable[str]:
    """Where the records were made, each once."""
    found: dict[str, None] = {}
    for record in records:
        e = record.environment
        if e:
            gpu = f"{e['gpu']}, " if e.get("gpu") else ""
            torch = e.get("packages", {}).get("torch", "?")
            cpu, cores, upbench = (e.get(name) or "?" for name in ("cpu", "cores", "upbench"))
            found[f"Machine: {gpu}{cpu}, {cores} cores; torch {torch}, upbench {upbench}"] = None
    yield from found
