"""What the drill runs, and its report: one line a group of cases, and a total.

Tests carry `@pytest.mark.drill("group")`; those that are slow `@pytest.mark.whole`, too, and run only with
`--whole` (`make drill`).
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

#: Outcomes by group.
_COUNTS: dict[str, Counter[str]] = defaultdict(Counter)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the slow ones out, unless the whole drill is asked for."""
    whole = config.getoption("--whole")
    kept = [item for item in items if whole or not item.get_closest_marker("whole")]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts it under its group."""
    group = next((value for key, value in report.user_properties if key == "drill"), None)
    if group is None:
        return
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        _COUNTS[str(group)][report.outcome] += 1


@pytest.fixture(autouse=True)
def _group(request: pytest.FixtureRequest) -> None:
    """Hands the test's group to its report."""
    marker = request.node.get_closest_marker("drill")
    if marker is not None:
        request.node.user_properties.append(("drill", marker.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line a group, and a total."""
    if not config.getoption("--whole") or not _COUNTS:
        return
    terminalreporter.section("drill")
    total: Counter[str] = Counter()
    width = max(map(len, _COUNTS))
    for group, counts in sorted(_COUNTS.items()):
        terminalreporter.write_line(f"{group:<{width}}  {_words(counts)}")
        total.update(counts)
    terminalreporter.write_line(f"{'total':<{width}}  {_words(total)}")


def _words(counts: Counter[str]) -> str:
    return f"{counts['passed']:5d} held {counts['failed']:4d} failed {counts['skipped']:4d} skipped"
