"""Every example by its command: sharded or replicated it trains as one process does, and goes on from what it saved."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 4
NEEDS = {"hf_trainer": ("transformers", "accelerate"), "lightning_module": ("lightning",)}
"""Packages of the extra ``examples``."""


@functools.cache
def losses(text: str, name: str, *flags: str, ranks: int = 0, steps: int = STEPS) -> dict[int, float]:
    """Step → loss, as ``tools/examples/<name>.py`` prints them; under torchrun when there are ``ranks``."""
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: bash scripts/bootstrap.sh examples")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "-m", f"tools.examples.{name}", "--steps", str(steps), "--data-path", text]
    cpu = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        cpu.pop(variable, None)
    run = subprocess.run([*command, *flags], cwd=ROOT, env=cpu, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", run.stdout, re.MULTILINE)}
    assert found, run.stdout + run.stderr
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return str(file)


def check_equal(found: dict[int, float], expected: dict[int, float]) -> None:
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), f"step {step}: {found} instead of {expected}"
    assert found.keys() <= expected.keys()


def test_fsdp2(text):
    one = losses(text, "fsdp2")
    assert one[STEPS] < one[1]
    check_equal(losses(text, "fsdp2", ranks=2), one)


def test_torchtitan_style(text):
    check_equal(losses(text, "torchtitan_style", "--tp", "2", ranks=2), losses(text, "torchtitan_style"))


def test_hugging_face_trainer(text):
    one = losses(text, "hf_trainer")
    assert one[STEPS] < one[1]
    check_equal(losses(text, "hf_trainer", ranks=2), one)


def test_lightning(text):
    # The same model, text and schedule as in a loop of one's own.
    flags = ("--schedule-steps", str(STEPS))
    check_equal(losses(text, "lightning_module", *flags, ranks=2), losses(text, "fsdp2"))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lamb"])
def test_other_optimizers(text, name):
    flags = ("--optimizer", name)
    check_equal(losses(text, "fsdp2", *flags, "--replicas", "2", ranks=4), losses(text, "fsdp2", *flags))
    check_equal(
        losses(text, "torchtitan_style", *flags, "--tp", "2", ranks=4), losses(text, "torchtitan_style", *flags)
    )


@pytest.mark.soak
def test_bfloat16_trains_nearly_the_same(text):
    one = losses(text, "fsdp2")
    for step, loss in losses(text, "fsdp2", "--bf16", ranks=2).items():
        assert loss == pytest.approx(one[step], rel=1e-2)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
def test_torchs_checkpoints_load_on_any_other_layout(text, tmp_path, name):
    flags = ("--optimizer", name)
    whole = losses(text, "torchtitan_style", *flags, steps=2 * STEPS)
    saved = str(tmp_path / "saved")
    losses(text, "torchtitan_style", *flags, "--tp", "2", "--save", saved, ranks=4)
    for ranks, tp in ((0, "1"), (2, "1"), (2, "2")):
        check_equal(losses(text, "torchtitan_style", *flags, "--tp", tp, "--load", saved, ranks=ranks), whole)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_trainer_resumes(text, tmp_path):
    output = str(tmp_path)
    whole = losses(text, "hf_trainer", "--output", output, "--save-steps", "2")
    resume = ("--output", output, "--resume", str(tmp_path / "checkpoint-2"))
    check_equal(losses(text, "hf_trainer", *resume), whole)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_lightning_resumes(text, tmp_path):
    schedule = ("--schedule-steps", str(STEPS))
    saved = str(tmp_path / "half.ckpt")
    losses(text, "lightning_module", *schedule, "--save", saved, steps=2)
    check_equal(losses(text, "lightning_module", *schedule, "--resume", saved), losses(text, "fsdp2"))
