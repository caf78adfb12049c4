from .core import *  # noqa: F403
from .core import __version__ as __version__
