"""Options that a method has under a protocol: a smaller budget that the record tells."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from upbench.contracts.upsampler import Upsampler
from upbench.methods.featup_implicit import FeatUpImplicit
from upbench.registry import plugins
from upbench.run.loop import run
from upbench.testing import MethodCase


@pytest.fixture
def smooth(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> type[Upsampler]:
    """The toy method, with an option of its own under the toy protocol."""
    cls: type[Upsampler] = plugins("method")["toy_smooth"]
    monkeypatch.setattr(cls, "preset_options", {"tiny": {"mode": "nearest"}, "contract": {"mode": "bicubic"}})
    return cls


def test_a_protocol_sets_options_that_the_user_does_not(
    toy: ModuleType, smooth: type[Upsampler], tmp_path: Path
) -> None:
    (record,) = run(toy.config(tmp_path / "a"))
    assert record.status == "ok"
    assert record.cell.method.options == {"mode": "nearest"}
    assert record.row == "Smooth, tiny budget"
    assert record.warnings == ["options of the preset 'tiny', not the method's own: mode=nearest"]

    (record,) = run(toy.config(tmp_path / "b", methods={"name": "toy_smooth", "mode": "bicubic"}))
    assert record.cell.method.options == {"mode": "bicubic"}
    assert record.row == "Smooth (mode=bicubic)"
    assert not record.warnings


def test_what_the_protocol_set_is_what_ran(toy: ModuleType, smooth: type[Upsampler], tmp_path: Path) -> None:
    (budget,) = run(toy.config(tmp_path / "a", tasks=["depth"]))
    (asked,) = run(toy.config(tmp_path / "b", {"name": "toy_smooth", "mode": "nearest"}, tasks=["depth"]))
    (other,) = run(toy.config(tmp_path / "c", {"name": "toy_smooth", "mode": "bicubic"}, tasks=["depth"]))
    scores = [record.metrics["val"]["absrel"] for record in (budget, asked, other)]
    assert scores[0] == scores[1] != scores[2]


def test_contract_tests_have_their_own(smooth: type[Upsampler]) -> None:
    assert MethodCase(smooth).options == {"mode": "bicubic"}
    assert MethodCase(smooth, {"mode": "nearest"}).options == {"mode": "nearest"}


@pytest.mark.parametrize("name", sorted(plugins("method")))
def test_every_method_knows_the_options_and_protocols_that_it_names(name: str) -> None:
    cls = plugins("method")[name]
    for protocol, options in cls.preset_options.items():
        assert protocol in (*plugins("protocol"), "contract")
        assert set(options) <= set(cls.option_names())
        cls.build(**options)


def test_the_quick_budget_is_a_smaller_one() -> None:
    full, quick = FeatUpImplicit(384), FeatUpImplicit(384, **FeatUpImplicit.preset_options["quick"])
    for name in ("steps", "views", "batch", "dim", "frequencies"):
        assert getattr(quick, name) < getattr(full, name)
