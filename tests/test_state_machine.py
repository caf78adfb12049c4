"""Random sequences of what torch lets others do to an optimizer, done to ours and to torch's own class side by side."""

import copy
from collections import defaultdict
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from core.optimizer.chained import ChainedOptimizer
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection

SHAPES = ((3, 4), (4, 3), (3, 4), (5, 5))


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def fill(params: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)


class Beside(RuleBasedStateMachine):
    """Ours and torch's optimizer, to both of which the same is done.

    Muon of torch rounds to bfloat16, so of it the momentum is compared, and whether a parameter moved.
    """

    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.ours_params, self.their_params = parameters(), parameters()
        self.ours, self.theirs = self.make(self.ours_params), self.make_theirs(self.their_params)
        self.seed = self.calls = 0

    def make(self, params: list[nn.Parameter]) -> Any:
        raise NotImplementedError

    def make_theirs(self, params: list[nn.Parameter]) -> Any:
        raise NotImplementedError

    @property
    def both(self) -> list[tuple[Any, list[nn.Parameter]]]:
        return [(self.ours, self.ours_params), (self.theirs, self.their_params)]

    def step_all(self, some: set[int]) -> None:
        self.seed += 1
        before = [p.detach().clone() for p in self.ours_params], [p.detach().clone() for p in self.their_params]
        for optimizer, params in self.both:
            fill(params, self.seed)
            for i, p in enumerate(params):
                if i not in some:
                    p.grad = None
            optimizer.step()
        self.compare(*before)

    def compare(self, ours_before: list[torch.Tensor], theirs_before: list[torch.Tensor]) -> None:
        for k, (p, q) in enumerate(zip(self.ours_params, self.their_params, strict=True)):
            if self.exact:
                torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
            assert torch.equal(p, ours_before[k]) == torch.equal(q, theirs_before[k]), f"only one moved parameter {k}"
            held, other = self.ours.state.get(p, {}), self.theirs.state.get(q, {})
            for slot in other.keys() & held.keys():
                torch.testing.assert_close(
                    torch.as_tensor(held[slot], dtype=torch.float64), torch.as_tensor(other[slot], dtype=torch.float64)
                )
        if not self.exact:  # the next step starts from equal weights
            with torch.no_grad():
                for p, q in zip(self.ours_params, self.their_params, strict=True):
                    p.copy_(q)

    @rule(some=st.sets(st.integers(0, len(SHAPES) - 1)))
    def step_some(self, some: set[int]) -> None:
        self.step_all(some)

    @invariant()
    def step_between(self) -> None:
        """Mostly after each thing that was done, sometimes only after two of them."""
        self.calls += 1
        if self.calls % 4:
            self.step_all(set(range(len(SHAPES))))

    @rule()
    def clear(self) -> None:
        for optimizer, _ in self.both:
            optimizer.state.clear()

    @rule()
    def assign_state(self) -> None:
        for optimizer, _ in self.both:
            optimizer.state = defaultdict(dict)

    @rule(i=st.integers(0, len(SHAPES) - 1))
    def delete(self, i: int) -> None:
        for optimizer, params in self.both:
            optimizer.state.pop(params[i], None)

    @rule(i=st.integers(0, len(SHAPES) - 1))
    def double(self, i: int) -> None:
        for optimizer, params in self.both:
            for slot, value in optimizer.state[params[i]].items():
                if value.ndim:
                    optimizer.state[params[i]][slot] = value * 2

    @rule()
    def swap_state(self) -> None:
        for optimizer, params in self.both:
            state = optimizer.state
            if params[0] in state and params[2] in state:
                state[params[0]], state[params[2]] = state[params[2]], state[params[0]]

    @rule(keep=st.booleans())
    def reload(self, keep: bool) -> None:
        for optimizer, _ in self.both:
            present = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for p in [p for p in optimizer.state if id(p) not in present]:  # torch has no number for these
                del optimizer.state[p]
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved if keep else {**saved, "state": {}})

    @rule()
    def equal_copies(self) -> None:
        for optimizer, _ in self.both:
            optimizer.param_groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]

    @rule(at=st.integers(0, 3), lr=st.sampled_from([0.0, 0.01, 0.1]))
    def schedule(self, at: int, lr: float) -> None:
        for optimizer, _ in self.both:
            if optimizer.param_groups:
                optimizer.param_groups[at % len(optimizer.param_groups)]["lr"] = lr

    @rule()
    def reverse_groups(self) -> None:
        for optimizer, _ in self.both:
            optimizer.param_groups.reverse()

    @rule()
    def reverse_parameters(self) -> None:
        for optimizer, _ in self.both:
            for group in optimizer.param_groups:
                group["params"] = group["params"][::-1]

    @rule(i=st.integers(0, len(SHAPES) - 1))
    def remove_parameter(self, i: int) -> None:
        for optimizer, params in self.both:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not params[i]]

    @precondition(lambda self: len(self.ours.param_groups) > 1)
    @rule()
    def drop_group(self) -> None:
        for optimizer, _ in self.both:
            optimizer.param_groups.pop()

    @rule(i=st.integers(0, len(SHAPES) - 1))
    def add_again(self, i: int) -> None:
        for optimizer, params in self.both:
            if not any(p is params[i] for group in optimizer.param_groups for p in group["params"]):
                optimizer.add_param_group({"params": [params[i]], "lr": 0.05})

    @precondition(lambda self: self.ours.param_groups)
    @rule(i=st.integers(0, len(SHAPES) - 1))
    def append_to_a_group(self, i: int) -> None:
        for optimizer, params in self.both:
            if not any(p is params[i] for group in optimizer.param_groups for p in group["params"]):
                optimizer.param_groups[0]["params"].append(params[i])

    @rule(i=st.integers(0, len(SHAPES) - 1))
    def swap_data(self, i: int) -> None:
        for _, params in self.both:
            params[i].data = params[i].data.clone() + 1

    @rule(i=st.integers(0, len(SHAPES) - 1), on=st.booleans())
    def freeze(self, i: int, on: bool) -> None:
        for _, params in self.both:
            params[i].requires_grad_(on)


class AdamWBeside(Beside):
    def make(self, params: list[nn.Parameter]) -> Any:
        return AdamW(params, lr=0.1)

    def make_theirs(self, params: list[nn.Parameter]) -> Any:
        return torch.optim.AdamW(params, lr=0.1, foreach=False)


class ChainBeside(AdamWBeside):
    """A chain of one member, which takes new groups as torch does."""

    def make(self, params: list[nn.Parameter]) -> Any:
        return ChainedOptimizer({"adamw": AdamW(params, lr=0.1)}, ProcessGroupCollection())


class ChainOfTwoBeside(AdamWBeside):
    """A chain of two members of one class. It belongs to what the members were given which one steps a parameter."""

    def make(self, params: list[nn.Parameter]) -> Any:
        members = {"a": AdamW(params[:2], lr=0.1), "b": AdamW(params[2:], lr=0.1)}
        return ChainedOptimizer(members, ProcessGroupCollection())

    def make_theirs(self, params: list[nn.Parameter]) -> Any:
        return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, foreach=False)


class MuonBeside(Beside):
    exact = False

    def make(self, params: list[nn.Parameter]) -> Any:
        return TensorParallelMuon(params, lr=0.1)

    def make_theirs(self, params: list[nn.Parameter]) -> Any:
        return torch.optim.Muon(params, lr=0.1)


few = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
for machine in (AdamWBeside, ChainBeside, ChainOfTwoBeside, MuonBeside):
    machine.TestCase.settings = few
TestAdamW = AdamWBeside.TestCase
TestChain = ChainBeside.TestCase
TestChainOfTwo = ChainOfTwoBeside.TestCase
TestMuon = MuonBeside.TestCase
