"""The parameter groups and the state that a chain of optimizers shares with its members, whoever replaces them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .steps.argument_checks import unknown
from .steps.bookkeeping import fingerprint, keep_names

MEMBER = "optimizer"
"""Entry of a new parameter group: the name of the member that is to step it."""


def common_defaults(members: Iterable[Optimizer]) -> dict[str, Any]:
    """The default settings that all ``members`` have, with the values of the first of them.

    ``momentum`` is among them if every member has ``momentum`` or ``betas``, but not all have the same of the two, so that
    schedules such as ``OneCycleLR`` can cycle it.
    """
    every = [member.defaults for member in members]
    common = {k: v for k, v in every[0].items() if all(k in other for other in every)} if every else {}
    momenta = [d["momentum"] if "momentum" in d else d.get("betas", (None,))[0] for d in every]
    if every and not {"momentum", "betas"} & common.keys() and None not in momenta:
        common["momentum"] = momenta[0]
    return common


class SharedGroups:
    """Deals the groups of a chain to its members, and lets all of them use one ``state``.

    The chain's ``param_groups`` and ``state`` are what holds, as for any torch optimizer: they may be assigned, and the lists in
    them changed. A group that was not there before belongs to the member that had its parameters. What somebody does to the
    groups or the state of one member reaches the chain too.

    Args:
        chain: The chain.
        members: Registered name → member.
    """

    def __init__(self, chain: Optimizer, members: dict[str, Optimizer]) -> None:
        self._chain = chain
        self._members = members
        self._member_of = WeakTensorKeyDictionary()  # parameter → name of its member
        self._names = WeakTensorKeyDictionary()  # parameter → its name
        # The groups and parameters are kept, because fingerprints hold only while these live.
        self._dealt: list[tuple[dict[str, Any], list[Tensor], str | None]] = []
        for name, member in members.items():
            self._dealt += [(group, list(group["params"]), name) for group in member.param_groups]
        self._state: Any = None
        self._deal()

    def followed(self) -> dict[str, Optimizer]:
        """The members, after they have followed what was replaced since the last call.

        Raises:
            ValueError: for a group that belongs to no member or to several, and when the chain's list of groups and a member's
                own were both changed; nothing is changed then.
        """
        lists = [[id(group) for group in member.param_groups] for member in self._members.values()]
        chain_changed = fingerprint(self._chain.param_groups) != self._seen
        if lists != self._lists:
            if chain_changed and [id(g) for g in self._chain.param_groups] != [id(g) for g, *_ in self._dealt]:
                raise ValueError(
                    "the parameter groups of a chain and those of one of its members were both replaced; replace those of the "
                    "chain alone, the members follow."
                )
            self._chain.param_groups = [group for member in self._members.values() for group in member.param_groups]
            own = {id(group): name for name, member in self._members.items() for group in member.param_groups}
            self._dealt = [(group, list(group["params"]), own[id(group)]) for group in self._chain.param_groups]
            chain_changed = True
        if chain_changed:
            self._deal()
        self._share_state()
        for group, _, name in self._dealt:
            if name is not None:
                _take_momentum(group, self._members[name])
        return self._members

    def add(self, group: dict[str, Any]) -> None:
        """Add ``group`` to a member, which completes and checks it; mutates ``group``.

        The member is the one that its entry :data:`MEMBER` names, that had its parameters before, or that is the only one.

        Raises:
            ValueError: for a group that none of these tells the member of, or that the member refuses.
        """
        members = self.followed()
        name = self._owner(len(self._dealt), {**group, "params": _tensors(group)})
        given = {k: v for k, v in group.items() if k != MEMBER}
        _name_parameters(given, self._chain.param_groups)
        if known := [p for p in _tensors(given) if any(p is q for _, params, _ in self._dealt for q in params)]:
            raise ValueError(f"{len(known)} parameters of the new group are in a group of this chain already.")
        if name is None:
            raise ValueError("the new parameter group has no parameters; give it at least one.")
        members[name].add_param_group(given)
        # torch completes the dict that it is given.
        group.clear()
        group.update(given)
        members[name].param_groups[-1] = group
        self._chain.param_groups.append(group)
        self._dealt.append((group, list(group["params"]), name))
        self._deal()

    def _deal(self) -> None:
        """Give each member its groups of the chain, and remember what was dealt."""
        dealt = [
            (group, list(group["params"]), self._owner(k, group)) for k, group in enumerate(self._chain.param_groups)
        ]
        keep_names(self._chain.param_groups, self._names)
        self._dealt = dealt
        for group, params, name in dealt:
            if name is not None:
                group.pop(MEMBER, None)
                for p in params:
                    self._member_of[p] = name
        for name, member in self._members.items():
            member.param_groups = [group for group, _, of in dealt if of == name]
        self._seen = fingerprint(self._chain.param_groups)
        self._lists = [[id(group) for group in member.param_groups] for member in self._members.values()]

    def _owner(self, k: int, group: dict[str, Any]) -> str | None:
        """Name of the member that steps ``group``, the k-th of the chain; None for a new one without parameters."""
        for known, _, name in self._dealt:
            if known is group and name is not None:
                return name
        if MEMBER in group or not group["params"]:
            return self._chosen(group[MEMBER], k) if MEMBER in group else None
        owners = sorted({self._member_of[p] for p in group["params"] if p in self._member_of})
        if len(owners) > 1:
            raise ValueError(
                f"parameter group {k} of a chain has parameters of {' and '.join(owners)}; give each of them a group of its "
                f"own."
            )
        return str(owners[0]) if owners else self._chosen(None, k)

    def _chosen(self, name: str | None, k: int) -> str:
        names = list(self._members)
        if name in self._members:
            return str(name)
        if name is not None:
            raise ValueError(f"parameter group {k}: {unknown('optimizer of this chain', name, names)}")
        if len(names) > 1:
            raise ValueError(
                f"parameter group {k} has only new parameters, and this chain has several optimizers; say which one is to step "
                f"them: {{'params': ..., {MEMBER!r}: {names[0]!r}}}. Possible: {', '.join(names)}."
            )
        return names[0]

    def _share_state(self) -> None:
        """Let chain and members use one ``state``, the one that was assigned last."""
        state = self._chain.state
        if state is self._state:
            for member in self._members.values():
                if member.state is not state:  # somebody has assigned this member's alone
                    for group in member.param_groups:
                        for p in group["params"]:
                            state.pop(p, None)
                    state.update(member.state)
        self._state = state
        for member in self._members.values():
            member.state = state


def _take_momentum(group: dict[str, Any], member: Optimizer) -> None:
    """Let a ``momentum`` that a schedule has put into ``group`` be the first of the member's ``betas``; mutates ``group``."""
    if "momentum" in group and "momentum" not in member.defaults and "betas" in member.defaults:
        group["betas"] = (group.pop("momentum"), *group["betas"][1:])


def _name_parameters(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Number parameters without a name where the other groups have names, which torch wants in all groups or none."""
    count = sum(len(other["params"]) for other in others)
    params = _listed(group)
    if "param_names" in group or not all("param_names" in other for other in others):
        return
    if params and not any(isinstance(p, tuple) for p in params):
        group["params"] = [(f"parameter {count + k}", p) for k, p in enumerate(params)]


def _listed(group: dict[str, Any]) -> list[Any]:
    params = group["params"]
    if isinstance(params, Tensor):
        group["params"] = [params]
    elif not isinstance(params, set):  # which torch refuses, because a set has no order
        group["params"] = list(params)
    return list(group["params"])


def _tensors(group: dict[str, Any]) -> list[Tensor]:
    return [p[1] if isinstance(p, tuple) else p for p in _listed(group)]
