"""Sophia: its step, and both estimates of the Hessian's diagonal."""

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call

from core.optimizer.rules.sophia import Sophia
from core.process_groups_config import ProcessGroupCollection

SHAPES = ((4, 9), (9, 4), (7,), ())


def draws(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class Problem:
    """Mean loss of a tiny network, curved in every parameter, and its dense Hessian."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.params = list(self.module.parameters())
        self.x, self.y = torch.randn(8, 3, dtype=dtype), torch.randint(2, (8,))

    def loss(self):
        return nn.functional.cross_entropy(self.module(self.x), self.y)

    def backward(self):
        """What a training loop has for a closure."""
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def hessian(self):
        names = [name for name, _ in self.module.named_parameters()]
        sizes = [p.numel() for p in self.params]

        def loss(flat):
            parts = [part.view_as(p) for part, p in zip(flat.split(sizes), self.params, strict=True)]
            out = functional_call(self.module, dict(zip(names, parts, strict=True)), (self.x,))
            return nn.functional.cross_entropy(out, self.y)

        return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in self.params]))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def test_a_step_is_the_papers():
    """Algorithm 3 in numpy, with estimates of either sign every third step."""
    b1, b2, rho, eps, decay, lr = 0.8, 0.9, 0.4, 1e-12, 0.1, 0.03
    params = [nn.Parameter(x) for x in draws(100)]
    optimizer = Sophia(params, lr, (b1, b2), rho=rho, eps=eps, weight_decay=decay)
    state = [[p.detach().numpy().copy(), 0.0, 0.0] for p in params]
    for t in range(12):
        gradients, products = draws(t), draws(50 + t)
        if t % 3 == 0:
            probes = optimizer.probes()
            optimizer.update_hessian(probes=probes, products=products)
        for i, (p, m, h) in enumerate(state):
            if t % 3 == 0:
                h = b2 * h + (1 - b2) * probes[i].numpy() * products[i].numpy()
            m = b1 * m + (1 - b1) * gradients[i].numpy()
            state[i] = [p - lr * decay * p - lr * np.clip(m / np.maximum(rho * h, eps), -1, 1), m, h]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
    for p, (wanted, _, _) in zip(params, state, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_a_step_is_the_peers():
    """It clips m / max(h, eps) to ±p: the same with lr·p, rho=p and eps·p."""
    clip, lr = 0.04, 0.5
    mine, other = ([nn.Parameter(x) for x in draws(100)] for _ in range(2))
    ours = Sophia(mine, lr * clip, (0.96, 0.99), rho=clip, eps=1e-12 * clip, weight_decay=0.0)
    theirs = pytorch_optimizer.SophiaH(other, lr=lr, betas=(0.96, 0.99), p=clip, eps=1e-12, weight_decay=0.0)
    for t in range(12):
        estimates = [x.abs() for x in draws(50 + t)]
        for p, q, g in zip(mine, other, draws(t), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.update_hessian(probes=[torch.ones_like(p) for p in mine], products=estimates)
        ours.step()
        theirs.step(hessian=[x.clone() for x in estimates])
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("hvp", "epsilon", "tolerance"), [("double_backward", 1e-3, 1e-12), ("differences", 1e-4, 1e-7)]
)
def test_products_are_those_of_the_dense_hessian(hvp, epsilon, tolerance):
    problem = Problem()
    optimizer = Sophia(problem.params, lr=0.1, betas=(0.9, 0.75))
    before = [p.detach().clone() for p in problem.params]
    problem.backward()
    gradients = [p.grad for p in problem.params]
    closure = problem.loss if hvp == "double_backward" else problem.backward
    wanted = torch.zeros(sum(p.numel() for p in problem.params), dtype=torch.float64)
    drawn = []
    for _ in range(3):
        u = flat(optimizer.probes())
        drawn.append(u)
        wanted = 0.75 * wanted + 0.25 * u * (problem.hessian() @ u)
        optimizer.update_hessian(closure, hvp=hvp, epsilon=epsilon)
        got = flat(optimizer.state[p]["hessian"] for p in problem.params)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert set(drawn[0].tolist()) == {-1.0, 1.0}
    assert not torch.equal(drawn[0], drawn[1])
    assert all(map(torch.equal, before, problem.params))
    assert all(p.grad is g for p, g in zip(problem.params, gradients, strict=True))


def test_the_mean_of_estimates_is_the_diagonal():
    """With as many sign vectors as parameters, rows of a Hadamard matrix, the mean is exact."""
    problem = Problem()
    size = sum(p.numel() for p in problem.params)  # 26
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    hessian = problem.hessian()
    optimizer = Sophia(problem.params, lr=0.1, betas=(0.9, 0.0))
    total = torch.zeros(size, dtype=torch.float64)
    sizes = [p.numel() for p in problem.params]

    def like(x):
        return [part.view_as(p) for part, p in zip(x.split(sizes), problem.params, strict=True)]

    for row in signs[:, :size]:
        optimizer.update_hessian(probes=like(row), products=like(hessian @ row))
        total += flat(optimizer.state[p]["hessian"] for p in problem.params)
    torch.testing.assert_close(total / len(signs), hessian.diagonal(), rtol=1e-12, atol=1e-12)


def test_gnb_is_the_batch_size_times_the_squared_gradient():
    problem = Problem()
    optimizer = Sophia(problem.params, lr=0.1, betas=(0.9, 0.75), estimator="gnb")
    wanted = 0.0
    for _ in range(2):
        problem.backward()
        wanted = 0.75 * wanted + 0.25 * 8 * flat(p.grad for p in problem.params).square()
        optimizer.update_hessian(batch_size=8)
    got = flat(optimizer.state[p]["hessian"] for p in problem.params)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_between_estimates_the_hessian_stays():
    problem = Problem()
    optimizer = Sophia(problem.params, lr=0.1)
    optimizer.update_hessian(problem.loss, hvp="double_backward")
    before = [optimizer.state[p]["hessian"].clone() for p in problem.params]
    for _ in range(2):
        problem.backward()
        optimizer.step()
    assert all(map(torch.equal, before, (optimizer.state[p]["hessian"] for p in problem.params)))


@pytest.mark.parametrize("hvp", ["double_backward", "differences"])
def test_unused_parameters_and_straight_losses(hvp):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = Sophia([used, unused], lr=0.1)
    optimizer.state[unused]["hessian"].fill_(7.0)

    def closure():
        loss = 2 * used.sum()
        if hvp == "differences":
            loss.backward()
        return loss

    optimizer.update_hessian(closure, hvp=hvp)
    assert torch.equal(optimizer.state[used]["hessian"], torch.zeros(3))
    assert torch.equal(optimizer.state[unused]["hessian"], torch.full((2,), 7.0))
    assert [int(optimizer.state[p]["hessian_step"]) for p in (used, unused)] == [1, 0]


def test_a_closure_that_fails_leaves_the_parameters():
    problem = Problem()
    before = flat(problem.params)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sophia(problem.params, lr=0.1).update_hessian(closure)
    assert torch.equal(flat(problem.params), before)


def test_signs_go_on_after_a_load():
    problem, other = Problem(), Problem()
    first, second = (Sophia(p.module.named_parameters(), lr=0.1, seed=3) for p in (problem, other))
    for _ in range(2):
        first.update_hessian(problem.loss, hvp="double_backward")
    second.load_state_dict(first.state_dict())
    assert torch.equal(flat(first.probes()), flat(second.probes()))


@pytest.mark.parametrize(
    ("estimator", "arguments", "text"),
    [
        ("gnb", {}, "batch_size > 0"),
        ("gnb", {"batch_size": 4, "closure": print}, "nothing else"),
        ("hutchinson", {}, "either a closure, or probes and products"),
        ("hutchinson", {"probes": []}, "either a closure, or probes and products"),
        ("hutchinson", {"batch_size": 4, "closure": print}, "either a closure"),
        ("hutchinson", {"closure": print, "hvp": "exact"}, "possible: differences, double_backward"),
        ("hutchinson", {"closure": print, "epsilon": 0.0}, "epsilon=0.0"),
        ("hutchinson", {"probes": [torch.ones(2)], "products": [torch.ones(3)]}, r"\(3,\) for a shard of \(2,\)"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(estimator, arguments, text):
    optimizer = Sophia([nn.Parameter(torch.ones(2))], lr=0.1, estimator=estimator)
    with pytest.raises(ValueError, match=text):
        optimizer.update_hessian(**arguments)


def test_differences_of_16_bit_parameters_are_refused():
    problem = Problem(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16 rounds a shift by 0.001 away"):
        Sophia(problem.params, lr=0.1).update_hessian(problem.backward)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtensor", [False, True])
def test_estimates_are_the_same_on_shards(world, dim, dtensor):
    """A loss that couples all entries: its closure gathers what the ranks hold, as tensor parallelism does."""
    mesh = world.mesh((2,), ("tp",))
    groups = ProcessGroupCollection.from_mesh(mesh)
    wholes = draws(1, ((6, 8), (6, 8)))

    def shard(whole):
        piece = whole.chunk(2, dim)[world.rank].contiguous()
        return DTensor.from_local(piece, mesh, [Shard(dim)]) if dtensor else piece

    def gather(p):
        piece = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
        return DTensor.from_local(piece, mesh, [Shard(dim)]).full_tensor()

    def run(cut, together, **kwargs):
        params = [nn.Parameter(cut(whole.clone())) for whole in wholes]
        for p in params:
            if kwargs and not dtensor:
                p.tensor_model_parallel, p.partition_dim = True, dim
        optimizer = Sophia(params, lr=0.02, betas=(0.9, 0.75), **kwargs)

        def closure():
            full = [together(p).requires_grad_() for p in params]
            with torch.enable_grad():
                loss = (full[0] @ full[1].T).tanh().sum() + full[0].square().sum()
            for p, g in zip(params, torch.autograd.grad(loss, full), strict=True):
                p.grad = cut(g)

        for k in range(6):
            if k % 2 == 0:
                optimizer.update_hessian(closure, epsilon=1e-4)
            closure()
            optimizer.step()
        return [*params, *(optimizer.state[p]["hessian"] for p in params), *optimizer.probes()], optimizer

    got, optimizer = run(shard, gather, pg_collection=groups)
    wanted, _ = run(lambda x: x, lambda p: p.detach().clone())
    for mine, whole in zip(got, wanted, strict=True):
        mine = mine.to_local() if isinstance(mine, DTensor) else mine
        torch.testing.assert_close(mine, whole.chunk(2, dim)[world.rank], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"shared by several ranks.*differences"):
        optimizer.update_hessian(lambda: None, hvp="double_backward")
