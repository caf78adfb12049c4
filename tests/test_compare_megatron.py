"""The comparison with Megatron-Core, run as a user does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

from tools.compare_megatron import command as compare_megatron
from tools.compare_megatron.cases import CASES
from tools.compare_megatron.measure import errors

ROOT = Path(__file__).parents[1]
EXACT = 1e-5


def compare(folder: Path, *flags: str, patience: float) -> tuple[str, list[dict[str, Any]]]:
    """What was printed, and what was found."""
    out = folder / "found.json"
    ended = subprocess.run(
        [sys.executable, "-m", "tools.compare_megatron", *flags, "--json", str(out)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())["found"]
    return ended.stdout, found


@pytest.mark.timeout(250)
@pytest.mark.soak
def test_two_rows(tmp_path):
    said, (defaults, refused) = compare(
        tmp_path, "--cases", "defaults,distributed-optimizer", "--markdown", patience=240
    )
    assert defaults["ours"]["error"] < EXACT < defaults["theirs"]["error"]
    assert defaults["ours"]["collectives"] > 0
    assert refused["ours"]["stage"] == "when built"
    assert refused["theirs"]["error"] > EXACT
    above, blank, head, rule, *lines = said.splitlines()
    assert re.fullmatch(r"python [\d.]+, torch \S+, emerging-optimizers \S+, megatron-core \S+", above)
    assert not blank
    assert head.startswith("| case | weak point |")
    assert [line.split(" | ")[0] for line in lines] == ["| defaults", "| distributed-optimizer"]
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1


def test_a_case_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare_megatron.main(["--cases", "qvk"])
    assert "--cases qvk: is no case; possible: adaptive, " in capsys.readouterr().err


def test_a_folder_without_megatron_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit):
        compare_megatron.main(["--megatron-lm", str(tmp_path)])
    assert f"--megatron-lm {tmp_path}: is no checkout of Megatron-LM" in capsys.readouterr().err


def test_a_checkout_goes_before_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    compare_megatron._take(tmp_path)
    assert sys.path[0] == str(tmp_path)
    assert os.environ["PYTHONPATH"] == os.pathsep.join((str(tmp_path), "elsewhere"))


def test_the_cases_are_listed(capsys):
    compare_megatron.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [case.name for case in CASES]


def test_errors_are_over_all_shards():
    ranks = [{"squares": {"a": (9.0, 50.0), "b": (0.0, 1.0)}}, {"squares": {"a": (0.0, 50.0), "b": (0.0, 1.0)}}]
    assert errors(ranks) == {"a": pytest.approx(0.3), "b": 0.0}


def test_a_crash_is_shown_with_its_place():
    crash = {"crash": "AssertionError: ", "stage": "in loading", "at": 2.0}
    right = {"error": 0.0, "collectives": 3, "cpu": 0.0125, "wall": 0.02}
    case = {"name": "x", "about": "y", "measured": "z", "how": "error", "theirs": crash, "ours": right}
    _, line = compare_megatron.rows([case], "cpu")
    assert line == ("x", "y", "z", "AssertionError (in loading)", "0", "- / 3", "- / 12.5")


@pytest.mark.soak
@pytest.mark.timeout(1300)
def test_the_whole_table(tmp_path):
    _, found = compare(tmp_path, patience=1200)
    ours = {case["name"]: case["ours"] for case in found}
    assert list(ours) == [case.name for case in CASES]
    # A norm below 1e-15 counts as none, so the update is nearly none.
    assert ours.pop("adamuon-size")["error"] == pytest.approx(1.0, abs=1e-3)
    assert "drift apart" in ours.pop("distributed-optimizer")["crash"]
    assert all("does not run under Megatron-Core" in why for why in ours.pop("names")["failed"].values())
    assert {name: side for name, side in ours.items() if not side.get("error", 1) < EXACT} == {}


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_speed_of_a_small_model(tmp_path):
    flags = ["--speed", "--tp", "2", "--hidden", "64", "--layers", "1", "--heads", "2", "--rounds", "2"]
    said, found = compare(tmp_path, *flags, patience=280)
    assert len(said.splitlines()) == 3 + len(found) == 7
    assert all(len(row["cpu"]) == 2 and row["error"] < EXACT for row in found)
