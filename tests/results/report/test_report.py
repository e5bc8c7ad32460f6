"""Tables: what stands where, which is best, and what must not be left out."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
from recording import COST, record

from upbench.errors import UpbenchError
from upbench.results.cell import MethodSpec
from upbench.results.records import Record
from upbench.results.report import Column, Value, build_tables, render
from upbench.results.report.bootstrap import paired_difference


def one_table(*records: Record, **options: Any):
    (table,) = build_tables(records, **options)
    return table


def entries(table) -> dict[tuple[str, str], str]:
    return {(r.label, c.key): table.value(r, c).format(c) for r in table.rows for c in table.columns}


def test_methods_down_tasks_and_cost_across():
    table = one_table(record("raysup"), record("bilinear"), record("raysup", "depth", (0.31, 0.33)))
    assert table.title == "vit · rooms/val · quick-v1"
    assert [row.label for row in table.rows] == ["Bilinear", "Raysup"], "the oldest method first"
    assert [column.header for column in table.columns] == [
        "seg mIoU (%) ↑",
        "depth RMSE (m) ↓",
        "Params (M) ↓",
        "MACs (G) ↓",
        "CPU (ms) ↓",
        "GPU (ms) ↓",
        "CPU peak (MB) ↓",
    ]
    shown = entries(table)
    assert shown["Raysup", "seg/miou"] == "51.00 ± 1.41"
    assert shown["Raysup", "depth/rmse"] == "0.320 ± 0.014"
    assert shown["Bilinear", "depth/rmse"] == "–", "a cell that was not run"
    assert shown["Raysup", "cost/parameters"] == "0.103"
    assert shown["Raysup", "cost/macs"] == "6.38"
    assert shown["Raysup", "cost/cpu_latency"] == "75.8 (73.7–77.2)"
    assert shown["Raysup", "cost/gpu_latency"] == "–", "no number from a GPU without a GPU"


def test_a_gpu_has_columns_of_its_own():
    gpu = {**COST, "latency_ms": 1.5, "latency_q25_ms": 1.4, "latency_q75_ms": 1.6, "hardware": "Some GPU"}
    table = one_table(record("raysup", device="cuda", cost={"cpu": COST, "cuda": gpu}))
    assert entries(table)["Raysup", "cost/gpu_latency"] == "1.50 (1.40–1.60)"
    assert table.columns[-1].key == "cost/gpu_memory"
    assert any("GPU: Some GPU" in note for note in table.notes)


def test_methods_with_a_ratio_of_their_own_say_so():
    """A column only where there is such a method, in every format; and what it means."""
    without = one_table(record("bilinear"), record("raysup"))
    assert not any(column.key == "method/native_ratio" for column in without.columns)
    about = {"title": "FeatUp", "year": 2024, "paper": "", "native_ratio": 16}
    records = [
        record("bilinear"),
        record("jbu", about=about),
        record("jbu", "depth", (0.3, 0.4), about=about),
    ]
    table = one_table(*records)
    shown = entries(table)
    assert shown["FeatUp", "method/native_ratio"] == "16"
    assert shown["Bilinear", "method/native_ratio"] == "–"
    assert any(note.startswith("Native ratio: ") for note in table.notes)
    rows = list(csv.DictReader(io.StringIO(render(records, "csv"))))
    assert [(row["method/native_ratio"], row["remarks"]) for row in rows] == [("", ""), ("16.0", "")]
    assert "Native ratio (x)" in render(records, "md")
    split = {"val": {"miou": [1.0]}, "test": {"miou": [2.0]}}
    first, second = build_tables([record("jbu", about=about, metrics=split)])
    assert [sum("Native" in c.title for c in t.columns) for t in (first, second)] == [1, 0], "told once"


def test_the_best_is_bold_in_the_right_direction_and_ties_share():
    table = one_table(
        record("bilinear", values=(40.0, 40.0)),
        record("raysup", values=(51.001, 51.001)),
        record("jbu", values=(51.0, 51.0)),
        record("bilinear", "depth", (0.2, 0.2)),
        record("raysup", "depth", (0.3, 0.3)),
    )
    best = {(r.label, key) for r in table.rows for key, value in r.values.items() if value.best}
    assert best == {("Raysup", "seg/miou"), ("Jbu", "seg/miou"), ("Bilinear", "depth/rmse")}
    text = render([record("bilinear", values=(1.0, 3.0)), record("raysup")])
    assert "**51.00 ± 1.41**" in text
    assert "**2.00" not in text


def test_one_method_alone_is_not_the_best():
    table = one_table(record("raysup"))
    assert not any(value.best for row in table.rows for value in row.values.values())


def test_skipped_and_failed_cells_stand_in_the_table_with_their_reasons():
    table = one_table(
        record("bilinear"),
        record("raysup", status="failed", reason="ValueError: boom"),
        record("jbu", status="skipped", reason="only 16x"),
    )
    shown = entries(table)
    assert shown["Jbu", "seg/miou"] == "skipped [1]"
    assert shown["Raysup", "seg/miou"] == "failed [2]"
    assert table.footnotes == ["Jbu, seg: only 16x", "Raysup, seg: ValueError: boom"]
    text = render([record("raysup", status="failed", reason="a | b")])
    assert r"[1] Raysup, seg: a \| b" in text


def test_no_cell_is_lost():
    records = [
        record(method, task, backbone=backbone, limit=limit, dtype=dtype, protocol=protocol)
        for method in ("bilinear", "raysup")
        for task in ("seg", "depth")
        for backbone in ("vit", "cnn")
        for limit in (None, 3)
        for dtype in ("float32", "bfloat16")
        for protocol in ("quick", "standard")
    ]
    tables = build_tables(records)
    assert len(tables) == 16, "what cannot be compared stands in tables of their own"
    shown = [v for table in tables for row in table.rows for k, v in row.values.items() if "cost" not in k]
    assert sum(value.number is not None for value in shown) == len(records) + len(records) // 2


def test_options_weights_and_labels_name_rows():
    table = one_table(
        record("raysup"),
        record("raysup", spec=MethodSpec("raysup", weights="none")),
        record("raysup", spec=MethodSpec("raysup", options={"window": 7})),
        record("raysup", spec=MethodSpec("raysup", camera="dataset", label="With cameras")),
    )
    labels = [row.label for row in table.rows]
    assert labels == ["Raysup", "Raysup:none", "Raysup (window=7)", "With cameras"]


def test_a_second_split_has_a_table_without_costs():
    metrics = {"val": {"miou": [50.0], "accuracy": [1.0]}, "held": {"miou": [40.0], "accuracy": [2.0]}}
    first, second = build_tables([record("raysup", metrics=metrics)])
    assert (first.facts["split"], second.facts["split"]) == ("val", "held")
    assert entries(second)["Raysup", "seg/miou"] == "40.00"
    assert not [column for column in second.columns if column.key.startswith("cost")]


def test_all_metrics_on_request():
    assert [c.key for c in one_table(record("raysup"), metrics="all").columns][:2] == [
        "seg/miou",
        "seg/accuracy",
    ]


def test_notes_tell_what_a_reader_must_know():
    table = one_table(
        record("bilinear", limit=3, warnings=["only the first 3 images"]),
        record("raysup", limit=3, warnings=["only the first 3 images", "random weights"]),
    )
    notes = "\n".join(table.notes)
    assert "quick-v1: image 224 px, output 224 px; 3 images; mean ± standard deviation over 2 seeds" in notes
    assert "**Warning**: only the first 3 images" in notes
    assert "**Warning**: Raysup: random weights" in notes
    assert "Weights: Raysup w (sha256 0123456789ab)" in notes
    assert "Machine: Some CPU, 2 cores; torch 2, upbench 1" in notes
    assert "Cost is that of the upsampler alone" in notes
    assert "384 channels, 16x16 to 224x224" in notes


def test_training_budgets_that_differ_are_named():
    def trained(method: str, images: int | None) -> Record:
        budget = {} if images is None else {"images_seen": images}
        return record(method, inputs={"weights": {"name": "w", "sha256": "ab" * 32, **budget}})

    alike = one_table(record("bilinear"), trained("naf", 2000), trained("jafar", 2000))
    assert "Naf w (sha256 abababababab, trained on 2000 images)" in "\n".join(alike.notes)
    assert "budgets" not in "\n".join(alike.notes)
    unlike = one_table(
        trained("naf", 2000), trained("jafar", 2000), trained("raysup", 6000), trained("anyup", None)
    )
    assert (
        "Training budgets differ: Raysup 6000 images; Jafar, Naf 2000 images; Anyup not told" in unlike.notes
    )


def test_of_two_records_of_a_cell_the_later_one_counts_and_the_table_says_so():
    old = record("raysup", values=(1.0, 1.0), started="2026-01-01T00:00:00")
    new = record("raysup", values=(2.0, 2.0), started="2026-01-02T00:00:00")
    table = one_table(new, old)
    assert entries(table)["Raysup", "seg/miou"] == "2.00 ± 0.00"
    assert "1 older records of the same cells are left out" in table.notes


def test_csv_has_every_number_unrounded_and_a_remark_for_every_gap():
    text = render(
        [
            record("raysup", values=(51.23456789, 51.23456789)),
            record("jbu", status="skipped", reason="only 16x, sorry"),
            record("bilinear", limit=3, warnings=["only the first 3 images"]),
        ],
        "csv",
        metrics="all",
    )
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(text))}
    assert float(rows["Raysup"]["seg/miou"]) == 51.23456789
    assert float(rows["Raysup"]["seg/miou_std"]) == 0
    assert rows["Raysup"]["backbone"] == "vit"
    assert float(rows["Raysup"]["cost/cpu_latency"]) == 75.81
    assert rows["Jbu"]["seg/miou"] == ""
    assert rows["Jbu"]["remarks"] == "seg skipped: Jbu, seg: only 16x, sorry"
    assert rows["Bilinear"]["limit"] == "3"
    assert rows["Bilinear"]["remarks"] == "only the first 3 images"


def test_markdown_columns_line_up():
    text = render([record("bilinear"), record("raysup", "depth", (0.1, 0.2))])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1


def test_differences_to_a_baseline():
    base = record("bilinear", values=(40.0, 42.0))
    table = one_table(base, record("raysup", values=(50.0, 52.0)), against="bilinear")
    key = "seg/miou_vs_bilinear"
    shown = entries(table)
    assert shown["Raysup", key] == "+10.00 [+10.00, +10.00]", "the same on every image: no uncertainty"
    assert shown["Bilinear", key] == "–"
    assert any("paired bootstrap over images" in note for note in table.notes)
    with pytest.raises(
        UpbenchError, match="unknown method in these records 'bilinaer'; did you mean 'bilinear'"
    ):
        build_tables([base], against="bilinaer")
    rows = list(csv.DictReader(io.StringIO(render([base, record("raysup")], "csv", against="bilinear"))))
    assert float(rows[1][f"{key}_low"]) == 10


def test_unknown_format():
    with pytest.raises(UpbenchError, match="unknown format 'htm'"):
        render([], "htm")


def test_the_paired_bootstrap_covers_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        hard = generator.normal(0, 30, 60)  # what is hard for both cancels
        a = {"names": [str(i) for i in range(60)], "values": [list(hard + 2 + generator.normal(0, 3, 60))]}
        b = {"names": a["names"], "values": [list(hard + generator.normal(0, 3, 60))]}
        found = paired_difference(a, b, resamples=400, seed=trial)
        assert found is not None
        assert found.images == 60
        assert found.high - found.low < 4
        covered += found.low <= 2 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_bootstrap_pairs_by_name_and_drops_images_without_a_value():
    a = {"names": ["x", "y", "z", "w"], "values": [[1.0, 2.0, math.nan, 9.0], [3.0, 2.0, 5.0, 9.0]]}
    b = {"names": ["y", "x", "z"], "values": [[0.0, 1.0, 1.0]]}
    found = paired_difference(a, b)
    assert found is not None
    assert (found.images, found.mean) == (2, 1.5)
    assert found == paired_difference(a, b), "the same every time"
    assert paired_difference({"names": ["x"], "values": [[1.0]]}, b) is None


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (Value(0.0), Column("p", "Params"), "0"),
        (Value(1234.5), Column("p", "ms"), "1234"),
        (Value(0.012345), Column("p", "ms"), "0.0123"),
        (Value(math.nan, 1.0), Column("p", "RMSE", digits=2), "–"),
        (Value(1.0, math.nan), Column("p", "RMSE", digits=2), "1.00"),
        (Value(-0.5, interval=(-1.0, 0.25)), Column("p", "Δ", digits=1), "-0.5 [-1.0, +0.2]"),
        (Value(text="failed", note=3), Column("p", "x"), "failed [3]"),
    ],
)
def test_numbers_as_text(value, column, text):
    assert value.format(column) == text


def test_a_terminal_shows_the_same_numbers():
    from rich.console import Console

    from upbench.results.report.terminal import draw

    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    draw(build_tables([record("bilinear", warnings=["careful [now]"]), record("raysup")]), console)
    text = console.file.getvalue()
    assert "51.00 ± 1.41" in text
    assert "careful [now]" in text
