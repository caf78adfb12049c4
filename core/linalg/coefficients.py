"""Coefficients of the Newton-Schulz iteration, by the names that emerging-optimizers and Megatron-Core give them."""

from itertools import chain, cycle, islice, repeat

from .variants import Coefficients

COEFFICIENT_SETS: dict[str, Coefficients] = {
    # https://kellerjordan.github.io/posts/muon/
    "simple": ((3.4445, -4.7750, 2.0315),),
    # https://leloykun.github.io/ponder/muon-opt-coeffs/
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # https://arxiv.org/abs/2505.16932, divided by 1.01 to the power of each term, as in its algorithm 1
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    # https://arxiv.org/abs/2506.10935
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # https://github.com/thib-s/flash-newton-schulz
    "aol": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    # https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro
    "deepseekv4": (*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2),
    # https://arxiv.org/abs/2606.00371
    "cubic5": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
}
"""Name → (a, b, c) of each iteration ``a X + b X Xᵀ X + c (X Xᵀ)² X``."""

ENDS_WITH_LAST = ("polar_express", "cans", "deepseekv4")
"""Sets whose last iteration is repeated when more are asked for; others begin again."""

FIXED_LENGTH = ("cubic5",)
"""Sets that make sense only as a whole."""


def coefficients(coefficient_type: str, steps: int) -> Coefficients:
    """(a, b, c) of each of ``steps`` iterations.

    Raises:
        ValueError: for an unknown name, or another number of steps than a set of fixed length has.
    """
    if coefficient_type not in COEFFICIENT_SETS:
        raise ValueError(
            f"coefficient_type {coefficient_type!r} has no coefficients; possible: {sorted(COEFFICIENT_SETS)}."
        )
    chosen = COEFFICIENT_SETS[coefficient_type]
    if coefficient_type in FIXED_LENGTH and steps != len(chosen):
        raise ValueError(
            f"coefficient_type {coefficient_type!r} is a schedule of exactly {len(chosen)} iterations, got {steps}; set "
            f"num_ns_steps={len(chosen)}, or take another set."
        )
    endless = chain(chosen, repeat(chosen[-1])) if coefficient_type in ENDS_WITH_LAST else cycle(chosen)
    return tuple(islice(endless, steps))
