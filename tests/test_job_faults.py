"""Steps of the main job that are left out or end it, and what it keeps of them in its log and its checkpoints."""

import math
from itertools import pairwise

import pytest
import torch

from core.checkpoint import latest_step
from tests.support.tiny_job import both
from tools.pretrain.job import Job
from tools.pretrain.parallel import Engine

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture
def broken(monkeypatch):
    """Makes a gradient not finite in some steps, given by their number in this process."""

    def install(*numbers: int, value: float = math.nan) -> None:
        train_step, steps = Engine.train_step, iter(range(1, 100))

        def step(engine, *args):
            loss = train_step(engine, *args)
            if next(steps) in numbers:
                engine.model_chunks[0].get_parameter(FC1).grad[3, 5] = value
            return loss

        monkeypatch.setattr(Engine, "train_step", step)

    return install


@pytest.fixture
def weights(monkeypatch):
    """The weights after each step."""
    kept, step = [], Job._step

    def watched(running):
        result = step(running)
        kept.append(torch.cat([p.detach().flatten() for p in running.engine.model_chunks[0].parameters()]))
        return result

    monkeypatch.setattr(Job, "_step", watched)
    return kept


def test_steps_that_are_left_out_count_and_the_schedule_moves_on(job, broken, weights, capsys):
    whole = job()
    weights.clear()
    broken(1, 3, 4, value=-math.inf)
    rows = job("--on-non-finite", "skip")
    assert [row.skipped for row in rows] == [1, 1, 2, 3, 3, 3]
    assert [(row.step, row.samples, row.lr) for row in rows] == [(row.step, row.samples, row.lr) for row in whole]
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [False, True, True, False, False]
    assert f"left out step 3: gradient of {FC1} on rank 0 is not finite (2 so far)" in capsys.readouterr().out
    assert rows[0].loss == whole[0].loss


def test_an_error_names_the_step_and_saves_what_is_under_way(job, broken, tmp_path, capsys):
    broken(5)
    with pytest.raises(SystemExit) as left:
        job(*both(tmp_path / "kept"), "--save-interval", "4", "--async-save")
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"pretrain: error: step 5: gradient of {FC1} on rank 0 is not finite; nothing was changed" in said
    assert latest_step(tmp_path / "kept") == 4


def test_counters_and_medians_come_back(job, broken, tmp_path, capsys):
    flags = (*both(tmp_path / "kept"), "--on-non-finite", "skip", "--max-skipped-steps", "3", "--save-interval", "1")
    broken(2, 3)
    job(*flags, "--exit-interval", "3")
    broken(1)
    with pytest.raises(SystemExit):
        job(*flags)
    assert (
        "3 steps in a row were left out, which is the limit; the last one: step 4: gradient" in capsys.readouterr().err
    )


def test_a_norm_that_jumps_is_left_out(job, broken):
    broken(5, value=1e4)
    rows = job("--skip-grad-norm-spike", "10", "--spike-window", "4")
    assert [row.skipped for row in rows] == [0, 0, 0, 0, 1, 1]
    assert rows[4].grad_norm == pytest.approx(1e4, rel=1e-3)


@pytest.fixture
def poisoned(monkeypatch):
    """Puts a NaN into the momentum in the second step."""
    step = Job._step

    def watched(running):
        result = step(running)
        if running.done == 2:
            p = running.engine.model_chunks[0].get_parameter(FC1)
            next(x for x in running.optimizer.state[p].values() if x.ndim == 2)[1, 1] = math.nan
        return result

    monkeypatch.setattr(Job, "_step", watched)


@pytest.mark.parametrize(
    ("flags", "kept"), [(("--save-interval", "1"), 1), (("--check-state-interval", "1"), None), ((), None)]
)
def test_poisoned_state_is_not_saved(job, poisoned, tmp_path, capsys, flags, kept):
    with pytest.raises(SystemExit) as left:
        job(*both(tmp_path / "kept"), *flags, "--on-non-finite", "skip")
    assert left.value.code == 2
    said = capsys.readouterr().err
    # The weights follow in the next step, where nobody looks before it.
    assert f" of {FC1} on rank 0" in said
    assert f"error: after step {2 if flags else 6}: " in said
    assert latest_step(tmp_path / "kept") == kept
