"""Every optimizer by name in the main job: the runs that compare them, and those that need more than a step."""

import pytest
import torch

from core import checkpoint
from core.optimizer.rules.sophia import Sophia
from tests.support.small_gpt import TIED, UNTIED, batch, build, parameters, whole
from tools import optimizer_runs
from tools.check_layouts import Layout, largest_difference, train
from tools.pretrain.job import Job, prepare
from tools.pretrain.launch import Launch
from tools.pretrain.parallel import Engine, _pick
from tools.pretrain.report import Record, read_log

TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --seed 3 --micro-batch-size 1 "
    "--global-batch-size 4 --eval-iters 1 --eval-interval 0 --lr 1e-2"
).split()


@pytest.fixture
def job(job_text):
    """Builds the main job in this process."""

    def make(*flags: str) -> Job:
        args, plan, corpus = prepare([*TINY, "--data-path", job_text, *flags], Launch())
        return Job(args, plan, corpus, None, Launch())

    return make


def log(*losses: float) -> list[Record]:
    return [Record(i, i, loss, 1e-3, 1.0, 1.0) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("sharded", "alone", "said"),
    [
        ({"lion": log(3.0, 2.0)}, {"lion": log(3.0, 2.00001)}, ""),
        ({"lion": log(3.0, 2.0)}, {"lion": log(3.0, 2.001)}, "DIFFERS"),
        ({"lion": log(3.0, 2.1, 2.0)}, {"lion": log(3.0, 2.0, 2.0)}, "DIFFERS"),
        ({"lion": log(3.0, float("nan"))}, {"lion": log(3.0, float("nan"))}, "DIFFERS"),
        ({"lion": log(3.0, 3.0)}, {"lion": log(3.0, 3.0)}, "DOES NOT TRAIN"),
        ({}, {"lion": log(3.0, 2.0)}, "FAILED"),
        ({"lion": log(3.0, 2.0)}, {}, "FAILED"),
    ],
)
def test_what_the_table_says_of_a_run(sharded, alone, said):
    table, good = optimizer_runs.report(["lion"], sharded, alone)
    assert good == (not said)
    assert table.splitlines()[1].startswith("lion")
    assert table.endswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--names lyon", "--names lyon: is no registered optimizer; did you mean 'lion'"),
        ("--layout 2", "'2' is no layout; possible: TPxPP or TPxPPxDP"),
        ("--layout 0x2", "'0x2' is no layout"),
        ("--steps 0", "--steps 0: is out of range"),
    ],
)
def test_bad_options(line, said, capsys):
    with pytest.raises(SystemExit) as left:
        optimizer_runs.main(line.split())
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    """Processes that end are started again without the optimizer that ended them."""
    started = []

    def start(names, steps, layout, directory):
        started.append(list(names))
        for name in names:
            if name == "bad":
                return "Traceback (most recent call last)\nValueError: no"
            (directory / name).mkdir(parents=True)
        return ""

    monkeypatch.setattr(optimizer_runs, "_start", start)
    monkeypatch.setattr(optimizer_runs, "read_log", lambda path: log(2.0, 1.0) if path.exists() else [])
    trained, said = optimizer_runs.train(["a", "bad", "b"], 2, Layout(), tmp_path)
    assert list(trained) == ["a", "b"]
    assert started == [["a", "bad", "b"], ["b"]]
    assert "bad on 1 process" in said[0]
    assert "ValueError: no" in said[0]


def test_the_work_of_one_process(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    optimizer_runs.work(["lion", "scion"], 2, Layout(), tmp_path)
    assert [len(read_log(tmp_path / name)) for name in ("lion", "scion")] == [2, 2]


class TestScheduleFree:
    """Trains on one set of weights, evaluates and saves another."""

    FLAGS = ("--optimizer", "schedule_free_adamw", "--train-iters", "6", "--save-interval", "3", "--eval-interval", "3")

    def test_averaged_weights_are_evaluated_and_saved(self, job, tmp_path, monkeypatch):
        seen = []

        def spy(owner, name):
            original = getattr(owner, name)

            def called(*args, **kwargs):
                state = made.optimizer.state
                seen.append((name, {bool(s["evaluating"]) for s in state.values()}))
                return original(*args, **kwargs)

            monkeypatch.setattr(owner, name, called)

        for owner, name in ((Engine, "train_step"), (Engine, "eval_step"), (checkpoint, "save")):
            spy(owner, name)
        made = job(*self.FLAGS, "--save", str(tmp_path / "saved"))
        made.run()
        assert {name for name, _ in seen} == {"train_step", "eval_step", "save"}
        assert all(modes == {name != "train_step"} for name, modes in seen)

    def test_a_resumed_run_is_the_uninterrupted_one(self, job, tmp_path):
        job(*self.FLAGS, "--save", str(tmp_path / "saved"), "--log-dir", str(tmp_path / "whole")).run()
        second = ["--log-dir", str(tmp_path / "second")]
        half = ["--save", str(tmp_path / "half"), "--train-iters", "3", "--lr-decay-iters", "6"]
        job(*self.FLAGS, *half).run()
        job(*self.FLAGS, "--load", str(tmp_path / "half"), "--save", str(tmp_path / "rest"), *second).run()
        one, two = (
            {row.step: row.loss for row in read_log(tmp_path / name) if row.step > 3} for name in ("whole", "second")
        )
        assert one == two


class TestSophia:
    """Estimates curvature between steps."""

    @pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
    def test_estimates_are_made_when_they_are_due_and_leave_the_gradient(self, job, estimator, monkeypatch):
        made = job(
            *("--optimizer", "sophia", "--sophia-estimator", estimator, "--sophia-hessian-interval", "2"),
            *("--train-iters", "5", "--clip-grad", "0.01"),
        )
        estimate, norms = made._estimate_curvature, []

        def checked(batch):
            before = [p.grad.clone() for p in made.engine.model_chunks[0].parameters()]
            estimate(batch)
            after = [p.grad for p in made.engine.model_chunks[0].parameters()]
            norms.append(torch.cat([g.flatten() for g in after]).norm().item())
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

        monkeypatch.setattr(made, "_estimate_curvature", checked)
        made.run()
        assert norms == pytest.approx([0.01] * 5, rel=1e-3)
        assert {int(s["hessian_step"]) for s in made.optimizer.state.values()} == {3}
        assert all(s["hessian"].isfinite().all() for s in made.optimizer.state.values())

    def test_gnb_is_the_square_of_the_gradient_for_drawn_labels(self, job):
        made = job("--optimizer", "sophia", "--sophia-estimator", "gnb")
        made._estimate_curvature(made.train.batch(0, 4))
        member = made.optimizer.members["sophia"]
        assert isinstance(member, Sophia)
        made.engine.sampled_step(made.train.batch(0, 4), seed=3 << 32)
        for p in made.engine.model_chunks[0].parameters():
            wanted = (1 - 0.99) * 4 * 16 * p.grad.square()
            torch.testing.assert_close(member.state[p]["hessian"], wanted)

    @pytest.mark.timeout(300)
    @pytest.mark.soak
    @pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
    def test_a_stage_without_a_parameter_for_it_takes_part(self, tmp_path, estimator):
        flags = ["--optimizer", "adamw", "--param-override", "decoder.layers.0.*=sophia,lr:1e-3"]
        flags += ["--sophia-estimator", estimator, "--sophia-hessian-interval", "2", "--lr", "1e-3"]
        one, two = (train(layout, 4, flags, tmp_path / str(layout)) for layout in (Layout(), Layout(pp=2)))
        assert largest_difference(two, one) <= 1e-5


def test_a_class_is_drawn_as_often_as_it_is_likely():
    logits = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)) * 2
    count = 10_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5).view(1, count) / count
    drawn = _pick(logits.expand(1, count, 6), draws).flatten().bincount(minlength=6)
    assert (drawn - count * logits.flatten().double().softmax(0)).abs().max() <= 1
    assert _pick(logits, torch.ones(1, 1, dtype=torch.float64)) == 5


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("model", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_four_ranks_draw_labels_as_one(world, layout, model):
    one = Engine(model, micro_batches=2, dtype=torch.float64)
    many = build(world, model, layout, dtype=torch.float64)
    alone, spread = parameters(one), parameters(many)
    one.sampled_step(batch(1), seed=7)
    many.sampled_step(batch(1), seed=7)
    for name, param in spread.items():
        torch.testing.assert_close(whole(param.grad), alone[name].grad, rtol=1e-9, atol=1e-13)
    first = {name: p.grad.clone() for name, p in alone.items()}
    one.sampled_step(batch(1), seed=8)
    assert any(not torch.equal(first[name], p.grad) for name, p in alone.items())
