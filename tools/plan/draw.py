"""Draws the cost of a step against the number of ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..usage import UsageError

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Label → (ranks, milliseconds)."""


def draw(curves: Curves, title: str, out: Path) -> None:
    """Write ``curves``, on logarithmic axes, to ``out`` in the format of its suffix.

    Raises:
        UsageError: when matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError("--plot", str(out), "drawing needs matplotlib", hint="pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for label, points in curves.items():
        ours = not label.startswith("Megatron")
        axes.plot(
            *zip(*points, strict=True),
            "o-" if ours else "s--",
            label=label,
            markersize=4,
            linewidth=1.6 if ours else 1.2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ranks = sorted({n for points in curves.values() for n, _ in points})
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_xlabel("ranks")
    axes.set_ylabel("optimizer step, ms (predicted)")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    try:
        figure.savefig(out, dpi=130, bbox_inches="tight")
    except (OSError, ValueError) as error:
        problem = f"cannot be written: {error}"
        raise UsageError("--plot", str(out), problem, possible=".png, .pdf, .svg") from None
    finally:
        plt.close(figure)
