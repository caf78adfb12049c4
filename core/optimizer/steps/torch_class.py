"""Optimizers of other libraries, exact on shards: their own class updates each whole tensor on the rank that works on it."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from ... import engine
from ...philox import Key
from ...process_groups_config import ProcessGroupCollection
from ...torch_defaults import torch_defaults
from .argument_checks import choice, non_negative
from .bookkeeping import as_tensor
from .constructor_settings import constructor_arguments, settings
from .weight_decay import METHOD
from .whole_tensor import Unit, WholeMode, WholeState, WholeStep

Initialise = Callable[[Any, nn.Parameter], dict[str, Any]]
"""``initialise(optimizer, p)`` returns the state of ``p`` before the first step: name → tensor, number, or list of them."""

DRAWS = "draws"
"""State of a class that draws random numbers: the number of steps in which it has drawn."""


class LibraryStep(WholeStep):
    """Base of the classes that :func:`on_whole_tensors` makes."""

    inner: type[Optimizer]
    initialise: Initialise
    random: bool
    transient: tuple[str, ...]
    float32_only: bool
    from_weights: bool
    __signature__: inspect.Signature

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        bound = self.__signature__.bind(params, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        cls: type = type(self)
        for setting in settings(cls):
            if setting.choices and arguments[setting.argument] is not None:
                choice(setting.argument, arguments[setting.argument], setting.choices)
        for name in ("lr", "weight_decay"):
            non_negative(name, float(arguments.get(name, 0.0)))
        self.tp_mode: WholeMode = arguments.pop("tp_mode")
        self.seed: int = arguments.pop("seed", 0)
        pg_collection: ProcessGroupCollection | None = arguments.pop("pg_collection")
        del arguments["params"]
        # One instance serves all tensors: for each update it gets one tensor and the state of that tensor.
        with torch_defaults():
            self._inner = self.inner([nn.Parameter(torch.ones(1, 1, dtype=torch.float32, device="cpu"))], **arguments)
        defaults = {k: v for k, v in self._inner.param_groups[0].items() if k != "params"}
        self._takes_decay = "weight_decay" in arguments
        vars(self).update({k: v for k, v in arguments.items() if k not in defaults and not hasattr(self, k)})
        self._check_start()
        self._probes: dict[Any, dict[str, Any]] = {}
        self._inner_arguments = arguments
        super().__init__(params, pg_collection, **defaults)
        self._construct_on_wholes([p for group in self.param_groups for p in group["params"]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the base class; then checks or changes the whole weights in place, as the inner constructor does."""
        super().add_param_group(param_group)
        if self._ready:
            self._construct_on_wholes(self.param_groups[-1]["params"])

    def check(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """As in the base class; refuses a dtype that the inner class cannot compute in."""
        if self.float32_only and p.dtype == torch.float64:
            raise ValueError(
                f"{self._name(p)}: {self.inner.__name__} computes in float32, but this parameter is float64; "
                f"make it float32, or give it to another optimizer."
            )
        if group.get(METHOD) is not None and not self._takes_decay:
            raise ValueError(
                f"{self._name(p)}: {METHOD}={group[METHOD]!r}, but {self.inner.__name__} has a weight decay of its own that "
                f"cannot be turned off; leave it out for this parameter."
            )
        super().check(p, group)

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """State that the inner class keeps for a tensor of ``shape``; its numbers are float64 scalars on the host."""
        specs = {slot: _spec(value) for slot, value in _flat(self._probe(shape, group)).items()}
        return {**specs, DRAWS: _spec(0)} if self.random else specs

    def fresh_state(self, unit: Unit, like: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Initial state of the inner class."""
        state = super().fresh_state(unit, like, group)
        if unit.home.here:
            dtype = torch.promote_types(like.dtype, torch.float32)
            whole = nn.Parameter(torch.empty(unit.layout.shape, dtype=dtype, device=like.device))
            self._lend(group)
            _store(self._initial(whole), state)
        return state

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        """One step of the inner class, with the settings of ``group``."""
        param, slots = nn.Parameter(p), vars(s)
        param.grad = g
        finite = bool(g.isfinite().all())
        inside = self._lend(group)
        inside["params"] = [param]
        like = self._probe(tuple(p.shape), group)
        begins = self.from_weights and not slots["step"]
        self._inner.state = defaultdict(dict, {} if begins else {param: _restored(like, slots)})
        try:
            with torch.compiler.set_stance("force_eager"), torch_defaults(), self._seeded(p, slots, name):
                self._inner.step()
            state = self._inner.state[param]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if finite:
                raise
            p.fill_(torch.nan)  # as in classes whose linear algebra accepts non-finite numbers
            return
        finally:
            self._inner.state, inside["params"] = defaultdict(dict), []
        _store({k: v for k, v in state.items() if k not in self.transient}, slots)
        if param.data_ptr() != p.data_ptr():
            p.copy_(param)

    @contextmanager
    def _seeded(self, p: Tensor, slots: dict[str, Tensor], name: str) -> Iterator[None]:
        if not self.random:
            yield
            return
        seed = noise_seed(self.seed, name, int(slots[DRAWS]))
        slots[DRAWS] += 1
        with torch.random.fork_rng([p.device] if p.is_cuda else []):
            torch.default_generator.manual_seed(seed)
            if p.is_cuda:
                torch.cuda.default_generators[p.device.index].manual_seed(seed)
            yield

    def _lend(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the settings of ``group`` to the inner optimizer; returns its parameter group."""
        inside = self._inner.param_groups[0]
        kept = inside if self._takes_decay else [k for k in inside if k != "weight_decay"]
        inside |= {k: group[k] for k in kept if k != "params"} | {"lr": float(group["lr"])}
        return inside

    def _probe(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> dict[str, Any]:
        """Initial state of the inner class for a tensor of ``shape`` in ``group``, made of a parameter on the meta device."""
        key = shape, *(repr(v) for k, v in group.items() if k in self.defaults and k != "lr")
        if key not in self._probes:
            # A float64 parameter shows which state follows the parameter's dtype and which is always float32.
            like = nn.Parameter(torch.empty(shape, dtype=torch.float64, device="meta"))
            self._lend(group)
            self._probes[key] = self._initial(like)
        return self._probes[key]

    def _initial(self, p: nn.Parameter) -> dict[str, Any]:
        with torch_defaults():
            return type(self).initialise(self._inner, p)

    def _check_start(self) -> None:
        zeros, ones = (
            _flat(self._initial(nn.Parameter(torch.full((2, 3), fill, dtype=torch.float32, device="cpu"))))
            for fill in (0.0, 1.0)
        )
        if moved := [k for k, v in zeros.items() if not torch.equal(*(as_tensor(k, k, x) for x in (v, ones[k])))]:
            raise ValueError(
                f"{self.inner.__name__} begins with state {moved} that depends on the weights, which is not supported; write "
                f"the optimizer as a subclass of WholeStep instead."
            )

    def _construct_on_wholes(self, params: list[Tensor]) -> None:
        """Let the inner class check or change the whole weights as its constructor does."""
        if not _looks_at_weights(self.inner, self._inner_arguments):
            return
        refused: list[str] = []

        def work(unit: Unit, whole: Tensor) -> None:
            try:
                with torch_defaults():
                    self.inner([nn.Parameter(whole)], **self._inner_arguments)
            except ValueError as error:
                refused.append(f"{unit.name}: {error}")

        # On the meta device, where plans are checked, there are no weights to look at.
        params = [p for p in params if not p.is_meta]
        with torch.no_grad():
            engine.run(self._whole_work(p, self.on_wholes(p, [], work), tensors=1) for p in params)
        for domain in dict.fromkeys(unit.home.domain for p in params for unit in self._parameters[p].units):
            refused += [error for errors in domain.gather(refused) for error in errors]
        if refused:
            raise ValueError(refused[0])


def on_whole_tensors(
    inner: type[Optimizer],
    *,
    initialise: Initialise | None = None,
    any_shape: bool = False,
    random: bool = False,
    transient: tuple[str, ...] = (),
    float32_only: bool = True,
    from_weights: bool = False,
    **defaults: Any,
) -> type[LibraryStep]:
    """A class that updates a parameter, however it is sharded, as ``inner`` updates the whole parameter, bit for bit.

    The constructor takes the arguments of ``inner``, then ``tp_mode`` (:class:`~.whole_tensor.WholeStep`), ``seed`` if
    ``random``, and ``pg_collection``. Compiled functions of ``inner`` run eagerly, because the compiler's result depends on
    the shapes that a process saw before. If the constructor of ``inner`` checks or changes the weights, it is given the whole
    weights, with communication. A weight decay that is not an argument of ``inner`` cannot be changed.

    Args:
        inner: An optimizer whose update of a parameter needs nothing but that parameter, its gradient and its state.
        initialise: Makes the state; needed if ``inner`` has no method ``_init_group(group, skip_non_grad_params)`` for that.
            The state must not depend on the weights, unless ``from_weights``.
        any_shape: Whether ``inner`` takes parameters that are not 2-D.
        random: Whether ``inner`` draws from torch's global generators. Before each step of each parameter they are seeded from
            ``seed``, the parameter's name and the number of its steps so far, and restored afterwards, so that all layouts
            and resumed runs draw the same numbers.
        transient: Names of state that a step makes and the next step does not need.
        float32_only: Whether ``inner`` cannot update float64 parameters.
        from_weights: Whether the first step of ``inner`` makes its state of the weights. ``initialise`` then only gives shapes
            and a number ``step``; while that is 0, ``inner`` steps without a state and so makes one.
        defaults: Default values of arguments that have none in ``inner``.

    Raises:
        ValueError: by the constructor, when the state depends on the weights or nothing says how to make it.
    """
    arguments = constructor_arguments(inner)
    own = {"tp_mode": (WholeMode, "owner"), "seed": (int, 1234), "pg_collection": (ProcessGroupCollection | None, None)}
    if not random:
        del own["seed"]
    first = {name: arguments[name] for name in ("params", "lr")}
    taken = [
        p.replace(
            kind=p.POSITIONAL_OR_KEYWORD if name in first else p.KEYWORD_ONLY, default=defaults.get(name, p.default)
        )
        for name, p in {**first, **arguments}.items()
        if name != "self"
    ] + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
        for name, (hint, default) in own.items()
    ]
    made = type(
        f"Whole{inner.__name__}",
        (LibraryStep,),
        {
            "__doc__": f"{inner.__module__}.{inner.__name__} of whole tensors; see :func:`on_whole_tensors`.",
            "__module__": __name__,
            "__signature__": inspect.Signature(taken),
            "inner": inner,
            "initialise": staticmethod(initialise or _by_init_group),
            "matrices_only": not any_shape,
            "random": random,
            "transient": transient,
            "float32_only": float32_only,
            "from_weights": from_weights,
        },
    )
    return made


def noise_seed(seed: int, name: str, draws: int) -> int:
    """Seed of the global generators for a step of the parameter called ``name`` after ``draws`` earlier ones."""
    low, high, *_ = Key(seed, name, draws, "library").words
    return low | high << 32


def _by_init_group(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    group = {**optimizer.param_groups[0], "params": [p]}
    try:
        optimizer._init_group(group, skip_non_grad_params=False)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(optimizer).__name__} does not say what state it keeps for a tensor of shape {tuple(p.shape)} "
            f"({error}); pass on_whole_tensors(..., initialise=...), a function of (optimizer, p) that returns it."
        ) from error
    state: dict[str, Any] = optimizer.state.pop(p, {})
    return state


def _looks_at_weights(inner: type[Optimizer], arguments: dict[str, Any]) -> bool:
    """Whether the constructor of ``inner`` reads or changes the values of the parameters."""
    probe = nn.Parameter(torch.empty(1, 1, dtype=torch.float32, device="meta"))
    try:
        inner([probe], **arguments)
    except (RuntimeError, NotImplementedError):  # a meta tensor has no numbers to look at
        return True
    return probe._version > 0


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with one entry per item of each list: a list ``Q`` becomes ``Q0``, ``Q1`` and so on."""
    flat = {}
    for key, value in state.items():
        several = isinstance(value, list | tuple)
        for name, item in ((f"{key}{i}", x) for i, x in enumerate(value)) if several else [(key, value)]:
            if not isinstance(item, Tensor | int | float):
                raise ValueError(
                    f"state {name!r} is {type(item).__name__}; tensors, numbers and lists of them can be kept."
                )
            flat[name] = item
    return flat


def _spec(value: Any) -> WholeState:
    if not isinstance(value, Tensor):
        return WholeState((), dtype=torch.float64, host=True)
    dtype = None if value.dtype == torch.float64 else value.dtype
    return WholeState(tuple(value.shape), dtype=dtype, host=value.device.type == "cpu")


def _restored(like: Mapping[str, Any], slots: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of ``slots`` in the structure of ``like``; tensors share memory with ``slots``."""

    def item(name: str, value: Any) -> Any:
        return slots[name].view(value.shape) if isinstance(value, Tensor) else type(value)(slots[name].item())

    return {
        key: [item(f"{key}{i}", x) for i, x in enumerate(value)]
        if isinstance(value, list | tuple)
        else item(key, value)
        for key, value in like.items()
    }


def _store(state: Mapping[str, Any], slots: Mapping[str, Tensor]) -> None:
    flat = _flat(state)
    if unknown := flat.keys() - slots.keys():
        raise ValueError(
            f"a step made state {sorted(unknown)} that was not there before it; let on_whole_tensors(..., initialise=...) make "
            f"it, or name it in transient=..., where the next step does not need it."
        )
    for name, value in flat.items():
        slot = slots[name]
        if not isinstance(value, Tensor):
            slot.fill_(value)
        elif value.data_ptr() != slot.data_ptr():
            slot.copy_(value.reshape(slot.shape))
