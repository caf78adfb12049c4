"""The training job, stopped and resumed: bit for bit on the layout that saved, and with the same losses on any other."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from core.checkpoint.manifest import NAME, Manifest
from tests.support.processes import on_ranks, train
from tests.support.small_run import differing, read_plainly
from tools.check_layouts import JOB, Layout, largest_difference
from tools.pretrain.report import Record, read_log

LAYOUTS = {
    str(layout): layout
    for layout in (
        Layout(),
        Layout(tp=2),
        Layout(tp=4),
        Layout(pp=2),
        Layout(dp=2),
        Layout(tp=2, pp=2),
        Layout(tp=2, dp=2),
        Layout(tp=2, pp=2, dp=2),
    )
}
RING = list(zip(LAYOUTS, [*list(LAYOUTS)[1:], *list(LAYOUTS)[:1]], strict=True))
SAME = ("1 process", "TP2", "PP2", "DP2", "TP2 x PP2", "TP2 x DP2")
SMALLER = "--seq-length 32 --global-batch-size 4 --lr-warmup-iters 2".split()
FAMILIES = {
    "muon": "",
    "adamw": "--lr 1e-3",
    "lion": "--lr 1e-4",
    "lamb": "--lr 1e-3",
    "adafactor": "--lr 1e-3",
    "schedule_free_adamw": "--lr 1e-3",
    "adamw_sr": "--lr 1e-3",
    "apollo": "--lr 1e-3",
    "micro_adam": "--lr 1e-3",
    "soap": "--lr 1e-3",
    "shampoo": "--lr 1e-3",
    "quad": "--lr 1e-3",
    "adaptive_muon": "",
    # With the library's own epsilon rounding is amplified; see docs/optimizers.md.
    "eo_soap": "--lr 1e-3 --eo-soap-eps 1e-2",
}


def job(layout: str, optimizer: str, log: Path, *flags: object) -> list[Record]:
    """Rows of the log; their speed, which is never the same, is left out."""
    at = LAYOUTS[layout]
    sizes = ("--tensor-model-parallel-size", at.tp, "--pipeline-model-parallel-size", at.pp)
    own = ("--optimizer", optimizer, *FAMILIES[optimizer].split())
    given = [*JOB, *SMALLER, *own, *sizes, "--log-dir", log, *flags]
    on_ranks(at.world, train, [str(flag) for flag in given])
    return [replace(row, tokens_per_s=0) for row in read_log(log)]


def manifest(path: Path) -> Manifest:
    return Manifest.parse((path / NAME).read_text(), str(path))


def check_same(folder: Path, layout: str, optimizer: str) -> None:
    """Save at 5, resume, train to 20."""
    steps = ("--train-iters", 20)
    whole = job(layout, optimizer, folder / "whole", *steps, "--save", folder / "saved", "--save-interval", 5)
    resumed = ("--load", folder / "saved", "--ckpt-step", 5, "--save", folder / "again")
    rest = job(layout, optimizer, folder / "rest", *steps, *resumed)
    assert [row.step for row in rest] == list(range(6, 21))
    assert rest == whole[5:]
    first, second = (folder / where / "iter_0000020" for where in ("saved", "again"))
    tensors, same = (read_plainly(path, everything=True) for path in (first, second))
    assert tensors.keys() == same.keys()
    assert any(key.startswith("rng/") for key in tensors)
    assert differing(same, tensors) == []
    expected, found = manifest(first), manifest(second)
    assert (found.consumed_samples, found.schedule) == (expected.consumed_samples, expected.schedule) != (0, None)
    assert [asdict(group) for group in found.groups] == [asdict(group) for group in expected.groups]


def check_next_losses(folder: Path, optimizer: str, pairs: list[tuple[str, str]]) -> float:
    """The largest relative difference of the three losses after step 3 from those of the run that was not interrupted."""
    worst = 0.0
    for saver in dict.fromkeys(saver for saver, _ in pairs):
        steps, place = ("--train-iters", 6), folder / saver.replace(" ", "")
        whole = job(saver, optimizer, place / "whole", *steps, "--save", place / "saved", "--save-interval", 3)
        for loader in [loader for other, loader in pairs if other == saver]:
            log = place / loader.replace(" ", "")
            rest = job(loader, optimizer, log, *steps, "--load", place / "saved", "--ckpt-step", 3)
            assert [row.step for row in rest] == [4, 5, 6]
            difference = largest_difference([row.loss for row in rest], [row.loss for row in whole[3:]])
            print(f"{optimizer}: {saver} → {loader}: {difference:.1e}", flush=True)
            worst = max(worst, difference)
    return worst


def test_the_same_layout_goes_on_bit_for_bit(tmp_path):
    check_same(tmp_path, "TP2", "muon")


def test_the_next_losses_on_another_layout(tmp_path):
    assert check_next_losses(tmp_path, "adafactor", [("PP2", "1 process"), ("PP2", "TP2 x PP2")]) <= 1e-6


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", SAME)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adaptive_muon", "soap"])
def test_the_same_layout_goes_on_bit_for_bit_everywhere(tmp_path, layout, optimizer):
    check_same(tmp_path, layout, optimizer)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("optimizer", FAMILIES)
def test_the_next_losses_all_round_the_layouts(tmp_path, optimizer):
    assert check_next_losses(tmp_path, optimizer, RING) <= 1e-6
