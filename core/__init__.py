"""Optimizers for sharded models: every step is the unsharded step.

The public names are listed in ``__init__.pyi``, and each is imported when it is first asked for: a job that only wants our
optimizers in Megatron-Core must not pay for PyTorch when Python starts.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
