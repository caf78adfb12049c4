"""SHA-256 digests of a checkpoint's files, kept in a file that ``sha256sum -c`` can check."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def digest(path: Path) -> str:
    """SHA-256 of one file, in hexadecimal; other threads run while it reads."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → digest of the files ``names`` in ``folder``."""
    return {name: digest(folder / name) for name in names}


def text(sums: Mapping[str, str]) -> str:
    """Contents of the digest file: a line for each file, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def parse(written: str) -> dict[str, str]:
    """Inverse of :func:`text`.

    Raises:
        ValueError: when ``written`` differs in any character from what :func:`text` writes.
    """
    lines = [_LINE.fullmatch(line) for line in written.splitlines()]
    sums = {match[2]: match[1] for match in lines if match}
    if text(sums) != written or not sums:
        raise ValueError("it is not a list of SHA-256 digests")
    return sums


def wrong(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The files of ``names`` whose contents are not what was written, or cannot be read."""
    return [name for name in names if _digest_or_error(folder / name) != sums[name]]


def _digest_or_error(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        return str(error)
