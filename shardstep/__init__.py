"""Optimizers for sharded models: every step is the unsharded step. The names are those of :mod:`shardstep.core`."""

try:
    from .core import __all__, __dir__, __getattr__, __version__  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "shardstep.core":
        raise
    raise ModuleNotFoundError(
        "this is the folder of a checkout, and shardstep is not installed: run `pip install -e .` there, or import the same "
        "names from `core`.",
        name="shardstep",
    ) from error
