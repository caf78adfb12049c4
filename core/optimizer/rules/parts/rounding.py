"""What the optimizers with stochastic rounding share: switches of other kernels, and the entry of their noise in a state dict."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ...steps.base import ShardedStep

NOISE = "sr_generator_state"
"""Entry of a state dict that resumes the noise, by Forgather's name."""


def check_kernels(*, torch_compile: bool, use_triton: bool, relative_step: bool = False) -> None:
    """Refuse kernels that do not exist, because an eager step in their place would be a silent one.

    Raises:
        ImportError: for ``use_triton`` without Triton.
        ValueError: for ``use_triton`` with ``relative_step``, for ``use_triton`` at all as long as there are no such kernels, and
            for ``torch_compile``.
    """
    if torch_compile:
        raise ValueError(
            "torch_compile=True: this optimizer has no compiled step, it runs torch's own kernels eagerly; leave torch_compile "
            "out or give False."
        )
    if not use_triton:
        return
    if relative_step:
        raise ValueError(
            "use_triton=True does not go with relative_step=True, for which no Triton kernel is meant; give use_triton=False."
        )
    if find_spec("triton") is None:
        raise ImportError("use_triton=True needs Triton, which is not installed: pip install triton, or leave it out.")
    raise ValueError("use_triton=True: there are no Triton kernels yet; leave use_triton out or give False.")


class RoundsStochastically(ShardedStep):
    """Base of optimizers whose groups have a ``seed`` of rounding noise; a state dict holds what the noise depends on.

    The noise of a step is a function of seed, parameter name, step and position, so there is no generator to save. In its place,
    ``state_dict()["sr_generator_state"]`` is ``{"seed": […], "step": […]}``: for each group its seed, and the largest
    number of steps that one of its parameters has taken. Loading takes the seeds over. The steps of each parameter come from
    its own state.
    """

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with the entry ``sr_generator_state``."""
        saved = super().state_dict()
        steps = [[int(self.state[p]["step"]) for p in group["params"]] for group in self.param_groups]
        seeds = [group["seed"] for group in self.param_groups]
        return {**saved, NOISE: {"seed": seeds, "step": [max(of_group, default=0) for of_group in steps]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base class; ``sr_generator_state`` may be missing. ``state_dict`` is not changed.

        Raises:
            ValueError: as in the base class, and for a ``sr_generator_state`` of another form; nothing is changed then.
        """
        rest = {key: value for key, value in state_dict.items() if key != NOISE}
        seeds = self._seeds(state_dict[NOISE]) if NOISE in state_dict else None
        super().load_state_dict(rest)
        for group, seed in zip(self.param_groups, seeds or (), strict=bool(seeds)):
            group["seed"] = seed

    def _seeds(self, noise: Any) -> list[int]:
        if isinstance(noise, Tensor):
            raise ValueError(
                f"{NOISE!r} is the state of a torch.Generator, as Forgather saves it; convert the state dict with "
                f"from_forgather_state first."
            )
        seeds = noise.get("seed") if isinstance(noise, Mapping) else None
        count = len(self.param_groups)
        if not isinstance(seeds, list) or len(seeds) != count or not all(isinstance(seed, int) for seed in seeds):
            raise ValueError(
                f"{NOISE!r} is {noise!r}; give {{'seed': [...], 'step': [...]}} with a whole number for each of the {count} "
                f"parameter groups, or leave it out."
            )
        return seeds
