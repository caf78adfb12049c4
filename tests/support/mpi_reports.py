"""One pytest report out of those of all ranks."""

from collections.abc import Mapping

import pytest

PHASES = ("setup", "call", "teardown")
RankReports = Mapping[int, Mapping[str, pytest.TestReport]]  # rank -> phase -> report


def merge(reports: RankReports) -> list[pytest.TestReport]:
    """The reports of one test, a phase each: failed if it failed on any rank, skipped if skipped on all."""
    phases = [{rank: of[phase] for rank, of in sorted(reports.items()) if phase in of} for phase in PHASES]
    return [_merge_phase(phase) for phase in phases if phase]


def blame(nodeid: str, reports: RankReports, problem: str, sections: list[tuple[str, str]]) -> list[pytest.TestReport]:
    """The reports of a test that could not end: what the ranks said before, and why it could not."""
    merged = [report for report in merge(reports) if report.when != "teardown"]
    failed = [report for report in merged if report.failed]
    if failed:
        failed[0].sections += [("why the ranks were stopped", problem), *sections]
        return merged[: merged.index(failed[0]) + 1]
    path, _, name = nodeid.partition("::")
    call = pytest.TestReport(nodeid, (path, None, name), {name: 1}, "failed", problem, "call", sections=sections)
    return [report for report in merged if report.when == "setup"] + [call]


def _merge_phase(reports: dict[int, pytest.TestReport]) -> pytest.TestReport:
    failed = {rank: report for rank, report in reports.items() if report.failed}
    skipped = {rank: report for rank, report in reports.items() if report.skipped}
    expected = any(hasattr(report, "wasxfail") for report in skipped.values())
    if failed:
        merged = _merge_failures(failed)
    elif skipped and not expected and len(skipped) < len(reports):
        merged = next(iter(skipped.values()))
        merged.outcome = "failed"
        merged.longrepr = f"skipped on {_names([*skipped])} but not on the others: {merged.longrepr[2]}"
    else:
        merged = next(iter((skipped or reports).values()))
    merged.duration = max(report.duration for report in reports.values())
    return merged


def _merge_failures(failed: dict[int, pytest.TestReport]) -> pytest.TestReport:
    by_text: dict[str, list[int]] = {}
    for rank, report in failed.items():
        by_text.setdefault(report.longreprtext, []).append(rank)
    (_, ranks), *others = by_text.items()
    merged = failed[ranks[0]]
    if crash := getattr(merged.longrepr, "reprcrash", None):
        crash.message = f"{_names(ranks)}: {crash.message}"
    merged.sections = [("failed on", _names(ranks)), *merged.sections]
    merged.sections += [(f"failed on {_names(ranks)}", text) for text, ranks in others]
    return merged


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
