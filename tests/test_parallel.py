"""The training engine: on every layout the loss and the gradients of one process."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support.small_gpt import MODELS, SIZES, TIED, UNTIED, batch, build, parameters, whole
from tools.pretrain.model import GPTConfig
from tools.pretrain.parallel import AXES, Engine, check_layout
from tools.usage import UsageError


def descend(engine: Engine, lr: float) -> None:
    with torch.no_grad():
        for param in parameters(engine).values():
            param -= lr * param.grad


def check_against_one_process(world, config: GPTConfig, layout: dict[str, int], **options) -> None:
    """Three steps of gradient descent in float64: losses, every gradient of every step, and losses on other text."""
    one = Engine(config, micro_batches=2, dtype=torch.float64)
    many = build(world, config, layout, dtype=torch.float64, **options)
    alone, spread = parameters(one), parameters(many)
    assert set(spread) <= set(alone)
    for step in range(3):
        assert many.eval_step(batch(100 + step)) == pytest.approx(one.eval_step(batch(100 + step)), rel=1e-12)
        assert many.train_step(batch(step)) == pytest.approx(one.train_step(batch(step)), rel=1e-12)
        for name, param in spread.items():
            if isinstance(param, DTensor):
                assert param.grad.placements == param.placements, name
            torch.testing.assert_close(
                whole(param.grad),
                alone[name].grad,
                rtol=1e-9,
                atol=1e-13,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        descend(one, 0.5)
        descend(many, 0.5)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [{"tp": 2}, {}, {"pp": 2}], ids=str)
def test_two_ranks_train_as_one(world, layout, model):
    check_against_one_process(world, MODELS[model], layout)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("model", "v"), [("tied", 1), ("untied", 2)])
def test_interleaved_stages_train_as_one(world, model, v):
    check_against_one_process(world, MODELS[model], {"pp": 2, "v": v})


@pytest.mark.mpi(min_size=2)
def test_gpipe_trains_as_one(world):
    check_against_one_process(world, TIED, {"pp": 2}, schedule="gpipe")


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2}, {"pp": 4}], ids=str)
def test_four_ranks_train_as_one(world, layout, model):
    check_against_one_process(world, MODELS[model], layout)


@pytest.mark.mpi(min_size=4)
def test_interleaved_stages_of_shards_train_as_one(world):
    check_against_one_process(world, UNTIED, {"tp": 2, "pp": 2, "v": 2})


@pytest.mark.mpi(min_size=4)
def test_tp4_trains_as_one(world):
    check_against_one_process(world, TIED, {"tp": 4})


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"tp": 2}], ids=str)
def test_losses_in_float32_agree(world, layout):
    losses = []
    for engine in (Engine(UNTIED, micro_batches=2), build(world, UNTIED, layout)):
        optimizer = torch.optim.AdamW(parameters(engine).values(), lr=3e-3, foreach=False)
        losses.append([])
        for step in range(10):
            losses[-1].append(engine.train_step(batch(step % 2)))
            optimizer.step()
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1  # else nothing was trained


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("pp", [2, 4])
def test_tied_copies_stay_equal_and_one_of_them_says_so(world, pp):
    engine = build(world, TIED, {"pp": pp})
    engine.train_step(batch(0))
    descend(engine, 0.5)
    rank = world.mesh((pp, 4 // pp, 1), AXES)["pp"].get_local_rank()
    copy = parameters(engine).get("embedding.word_embeddings.weight")
    assert (copy is not None) == (rank in (0, pp - 1))
    gathered: list[tuple[bool, Tensor] | None] = [None] * 4
    mine = None if copy is None else (getattr(copy, "shared", False), copy.detach())
    torch.distributed.all_gather_object(gathered, mine)
    copies = [entry for entry in gathered if entry is not None]
    assert all(torch.equal(weight, copies[0][1]) for _, weight in copies)
    assert [shared for shared, _ in copies] == [False, True] if pp == 4 else [False, False, True, True]


@pytest.mark.mpi(min_size=4)
def test_all_ranks_return_the_same_loss_and_validation_leaves_gradients_alone(world):
    engine = build(world, UNTIED, {"tp": 2, "pp": 2})
    loss = engine.train_step(batch(0))
    before = {name: param.grad.clone() for name, param in parameters(engine).items()}
    valid = engine.eval_step(batch(1))
    assert all(torch.equal(whole(param.grad), whole(before[name])) for name, param in parameters(engine).items())
    assert engine.train_step(batch(0)) == loss
    losses = [None] * 4
    torch.distributed.all_gather_object(losses, (loss, valid))
    assert len(set(losses)) == 1
    assert all(torch.equal(whole(param.grad), whole(before[name])) for name, param in parameters(engine).items())


@pytest.mark.mpi(min_size=4)
def test_bfloat16_autocast_on_shards(world):
    # bfloat16 has 8 bits: relative errors of 2^-9 a number, averaged over many.
    exact = Engine(UNTIED, micro_batches=2)
    low = build(world, UNTIED, {"tp": 2, "pp": 2}, autocast=torch.bfloat16)
    for step in range(3):
        assert low.train_step(batch(step)) == pytest.approx(exact.train_step(batch(step)), rel=2e-3)
        descend(exact, 0.5)
        descend(low, 0.5)
    assert {param.dtype for param in parameters(low).values()} == {torch.float32}
    assert {param.grad.dtype for param in parameters(low).values()} == {torch.float32}


def test_one_process_needs_no_process_group():
    if torch.distributed.is_initialized():
        pytest.skip("the session of this test has a process group already")
    engine = Engine(TIED, micro_batches=2)
    assert engine.eval_step(batch(0)) == pytest.approx(engine.train_step(batch(0)), rel=1e-6)


def test_micro_batches_do_not_change_the_gradient():
    engines = [Engine(TIED, micro_batches=n, dtype=torch.float64) for n in (1, 4)]
    losses = [engine.train_step(batch(0)) for engine in engines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for a, b in zip(parameters(engines[0]).values(), parameters(engines[1]).values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 13), "rows divisible by 1 data-parallel ranks x 4 micro-batches = 4"), ((8, 14), "2 to 13 columns")],
)
def test_a_batch_that_cannot_be_cut_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Engine(TIED, micro_batches=4).train_step(torch.zeros(shape, dtype=torch.long))


def test_batches_must_stay_of_one_shape():
    engine = Engine(TIED)
    engine.train_step(batch(0))
    with pytest.raises(ValueError, match=r"made for the first batch, of shape \(8, 13\)"):
        engine.eval_step(batch(0)[:4])


LAYOUT = {"world_size": 4, "tp": 2, "pp": 2, "micro_batches": 4}


def test_what_remains_is_data_parallel():
    assert check_layout(TIED, **LAYOUT) == 1
    assert check_layout(TIED, **(LAYOUT | {"world_size": 12})) == 3
    interleaved = {"schedule": "interleaved", "layers_per_virtual_stage": 1}
    assert check_layout(TIED, **(LAYOUT | interleaved)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 6}, "2 x 2 x data-parallel size must be the number of processes, which is 6"),
        ({"world_size": 6, "tp": 3}, "--tensor-model-parallel-size 3: does not divide --num-query-groups 4"),
        ({"world_size": 16, "tp": 1, "pp": 8}, "makes 8 stages, but --num-layers is 4"),
        ({"micro_batches": 1}, "1 micro-batches a step, fewer than the 2 pipeline stages"),
        ({"schedule": "zigzag"}, "--pipeline-schedule zigzag: unknown; possible: 1f1b, gpipe, interleaved"),
        ({"schedule": "interleaved"}, "goes with the interleaved schedule"),
        ({"layers_per_virtual_stage": 1}, "goes with the interleaved schedule"),
        ({"schedule": "interleaved", "layers_per_virtual_stage": 2}, "leaves one stage a rank; possible: 1 to 1"),
        ({"schedule": "interleaved", "layers_per_virtual_stage": 1, "micro_batches": 5}, "cannot deal 5"),
        ({"schedule": "interleaved", "layers_per_virtual_stage": 1, "pp": 1}, "there is no pipeline"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        check_layout(TIED, **(LAYOUT | change))


def test_a_vocabulary_that_tp_does_not_divide_is_refused():
    odd = GPTConfig(num_layers=4, **(SIZES | {"vocab_size": 257}))
    with pytest.raises(UsageError, match="does not divide the padded vocabulary of 257"):
        check_layout(odd, **LAYOUT)
