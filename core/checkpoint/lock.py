"""The lock by which one job at a time saves to a directory; it ends with the process that holds it, however that ends."""

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path

from .together import CheckpointError

NAME = ".lock"
_held: dict[Path, int] = {}
"""Directory → descriptor of its lock file."""


def hold(directory: Path) -> None:
    """Take the lock of ``directory`` until this process ends; does nothing where this process holds it already.

    Raises:
        CheckpointError: when another process holds it.
    """
    path = directory.resolve() / NAME
    if (old := _held.get(path)) is not None:
        if _same_file(path, old):
            return
        os.close(_held.pop(path))  # the directory was removed and made again
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise CheckpointError(
                f"cannot save to {directory}: another job ({holder or 'unknown'}) is saving there. Give each job a directory "
                f"of its own, or end that one."
            ) from None
        warnings.warn(
            f"the file system of {directory} has no locks ({error.strerror or error}): nothing keeps a second job from "
            f"saving there.",
            stacklevel=2,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[path] = descriptor


def _same_file(path: Path, descriptor: int) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
