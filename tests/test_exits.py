"""Runs that leave before their last step save first, go on later as if they had not, and leave on all ranks together."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from core.checkpoint import latest_step
from tests.support.tiny_job import both
from tools.pretrain.arguments import parse_arguments
from tools.pretrain.exits import SIGNALS, Exits
from tools.pretrain.launch import Launch, Machine
from tools.pretrain.parallel import Engine
from tools.pretrain.validation import validate
from tools.usage import UsageError

# torch's, where pytest holds the standard streams.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture
def in_step(monkeypatch):
    """Does something in a step, given by its number in this process, before its gradients are there."""

    def install(number: int, do: Callable[[], None]) -> None:
        train_step, steps = Engine.train_step, iter(range(1, 100))

        def step(engine, *args):
            if next(steps) == number:
                do()
            return train_step(engine, *args)

        monkeypatch.setattr(Engine, "train_step", step)

    return install


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_after_the_step_and_the_run_goes_on_later(job, in_step, tmp_path, capsys, number):
    whole = job()
    before = [signal.getsignal(each) for each in SIGNALS]
    in_step(3, lambda: os.kill(os.getpid(), number))
    assert len(job(*both(tmp_path / "kept"), "--exit-signal-handler")) == 3
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert latest_step(tmp_path / "kept") == 3
    assert f"leaving after step 3: {number.name} was received" in capsys.readouterr().out
    assert job(*both(tmp_path / "kept")) == whole


@pytest.mark.parametrize(
    ("flags", "step", "said"),
    [
        (("--exit-interval", "4"), 4, "step 4 is a multiple of --exit-interval 4"),
        (("--exit-duration-in-mins", "1e-6"), 1, "--exit-duration-in-mins 1e-06 are over"),
        (("--exit-duration-in-mins", "60"), 6, ""),
    ],
)
@pytest.mark.parametrize("background", [(), ("--async-save",)])
def test_steps_and_minutes(job, tmp_path, capsys, flags, step, said, background):
    assert len(job(*both(tmp_path / "kept"), *flags, *background)) == step
    assert latest_step(tmp_path / "kept") == step
    assert said in capsys.readouterr().out


def test_leaving_needs_no_directory(job):
    assert len(job("--exit-interval", "2")) == 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_rank_is_for_all(world, ranks):
    cpu = torch.device("cpu")
    with Exits(signals=(signal.SIGTERM,)) as exits:
        assert exits.due(1, cpu) == ""
        if world.rank in ranks:
            os.kill(os.getpid(), signal.SIGTERM)
        assert exits.due(2, cpu) == "SIGTERM was received"


@pytest.mark.mpi(min_size=2)
def test_the_first_clock_is_for_all(world):
    with Exits(minutes=1e-6 if world.rank else 60.0) as exits:
        time.sleep(0.01)
        assert exits.due(1, torch.device("cpu")).startswith("--exit-duration-in-mins")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--exit-signal-handler", "--exit-signal-handler: there is nowhere to save; hint: add --save DIRECTORY"),
        ("--exit-duration-in-mins -1", "--exit-duration-in-mins -1: is out of range"),
        ("--distributed-timeout-minutes 0", "--distributed-timeout-minutes 0: is out of range"),
        ("--on-non-finite ignore", "--on-non-finite 'ignore': unknown; possible: error, skip"),
        ("--skip-loss-spike 0.5", "--skip-loss-spike 0.5: .*possible: 0, or a number > 1"),
        ("--max-skipped-steps 0", "--max-skipped-steps 0: is out of range"),
        (
            "--overlap-optimizer-with-backward --clip-grad 0 --on-non-finite skip",
            "--overlap-optimizer-with-backward: weights change before --on-non-finite could",
        ),
        (
            "--overlap-optimizer-with-backward --clip-grad 0 --skip-grad-norm-spike 3",
            "--overlap-optimizer-with-backward: weights change before --skip-grad-norm-spike could",
        ),
    ],
)
def test_flags_that_do_not_fit(line, said):
    with pytest.raises(UsageError, match=said):
        validate(parse_arguments(line.split()), Launch(), Machine())
