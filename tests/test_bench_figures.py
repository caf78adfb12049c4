"""The benchmark's tables say what was measured: ratios, figures that are met, missed for time or error, or not measured."""

from dataclasses import asdict

import pytest

from tools.bench import virtual
from tools.bench.figures import DISTRIBUTED, DUPLICATED, FIGURES, figures_table
from tools.bench.measure import Result
from tools.bench.tables import markdown, rows, virtual_rows


def result(name: str, cpu: float, *, wall: float = 1.0, error: float = 1e-2, adamw: float | None = None) -> Result:
    return Result(name, "blockwise" not in name, "shardstep" in name, [cpu] * 3, [wall] * 3, error, 2, adamw)


def report(case: str, ranks: int, *results, hidden: int = 512, layers: int = 8, precision: str = "medium") -> dict:
    model = {"hidden": hidden, "layers": layers, "precision": precision}
    return {"case": case, "ranks": ranks, **model, "results": [asdict(r) for r in results]}


def line(table: str, *words: str) -> str:
    (found,) = (line for line in table.splitlines() if all(word in line for word in words))
    return found


def test_rows_have_the_ratio_to_the_fastest_exact_peer_and_to_each() -> None:
    measured = [
        result(DUPLICATED, 4.0, wall=2.0),
        result(DISTRIBUTED, 2.0, wall=5.0),
        result("Megatron-Core blockwise", 0.5),
        result("shardstep owner", 1.0, wall=1.0),
    ]
    head, *lines = rows(measured)
    owner = dict(zip(head, lines[-1], strict=True))
    assert owner["CPU / fastest exact peer"] == "0.50"
    assert owner["CPU / duplicated"] == "0.25"
    assert owner["CPU / distributed"] == "0.50"
    assert owner["wall / fastest exact peer"] == "0.50"
    assert owner["wall / distributed"] == "0.20"


def test_one_peer_has_one_column() -> None:
    head, *_ = rows([result("emerging-optimizers", 4.0), result("shardstep", 1.0)])
    assert [h for h in head if h.startswith("CPU /")] == ["CPU / emerging-optimizers"]


def test_rows_without_a_peer() -> None:
    head, _ = rows([result("shardstep owner", 1.0)])
    assert not [h for h in head if "/" in h]


@pytest.mark.parametrize(
    ("cpu", "error", "met"),
    [(0.33, 1e-2, "yes"), (0.34, 1e-2, "no: time"), (0.2, 2e-2, "no: error"), (0.9, 2e-2, "no: time and error")],
)
def test_a_figure_is_met_by_time_and_error(cpu: float, error: float, met: str) -> None:
    theirs = (result(DUPLICATED, 2.0), result(DISTRIBUTED, 1.0))
    ours = (result("shardstep owner", cpu, error=error), result("shardstep blockwise", 0.01))
    table = figures_table([report("step", 4, *theirs, *ours)])
    found = line(table, "best exact mode", "4 ranks", "512")
    assert f" {cpu:.2f} " in found
    assert found.endswith(f"| {met} |")


def test_the_error_of_adamw_counts() -> None:
    theirs = [result(f"{name}, foreach AdamW", 1.0, adamw=1e-7) for name in (DUPLICATED, DISTRIBUTED)]
    ours = result("shardstep owner, adamw", 0.3, adamw=3e-7)
    table = figures_table([report("whole step", 4, *theirs, ours)])
    assert line(table, "AdamW", "512").endswith("| no: error |")


def test_what_was_not_run_is_not_met() -> None:
    table = figures_table([])
    assert table.count("not measured") == len(FIGURES)
    assert "yes" not in table


def test_a_peer_that_is_missing_is_not_measured() -> None:
    measured = report("step", 4, result(DUPLICATED, 2.0), result("shardstep owner", 0.1))
    assert "not measured" in line(figures_table([measured]), "best exact mode", "4 ranks", "512")


def one_rank(name: str, ranks: int, cpu: float) -> virtual.Result:
    return virtual.Result(name, True, "shardstep" in name, ranks, 0, [cpu] * 3, int(cpu * 1000))


@pytest.mark.parametrize(("at_8", "met"), [(0.14, "yes"), (0.15, "no: time")])
def test_scaling_is_the_time_of_a_rank_times_the_ranks(at_8: float, met: str) -> None:
    measured = [
        *(one_rank("shardstep owner", n, t) for n, t in ((1, 1.0), (2, 0.5), (4, 0.25), (8, at_8))),
        *(one_rank(DUPLICATED, n, 2.0) for n in (1, 2, 4, 8)),
    ]
    run = report("virtual", 8, *measured)
    found = line(figures_table([run]), "virtual")
    assert f"1.00, 1.00, {8 * at_8:.2f}" in found
    assert found.endswith(f"| {met} |")
    head, *lines = virtual_rows(measured)
    peer = dict(zip(head, lines[-1], strict=True))
    assert (peer["ranks"], peer["optimizer"], peer["CPU x ranks / one process"]) == ("8", DUPLICATED, "8.00")
    assert "virtual" in markdown(run)
