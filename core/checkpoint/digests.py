"""SHA-256 of a checkpoint's files, in the file that ``sha256sum -c`` checks too."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def digest(path: Path) -> str:
    """Of one file, in hexadecimal; frees the interpreter while it reads."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → digest."""
    return {name: digest(folder / name) for name in names}


def text(sums: Mapping[str, str]) -> str:
    """A line for each file, sorted."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def parse(written: str) -> dict[str, str]:
    """Inverse of :func:`text`.

    Raises:
        ValueError: when it is not what :func:`text` writes, to the last character.
    """
    lines = [_LINE.fullmatch(line) for line in written.splitlines()]
    sums = {match[2]: match[1] for match in lines if match}
    if text(sums) != written or not sums:
        raise ValueError("it is not a list of SHA-256 digests")
    return sums


def wrong(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose contents are not what was written, or cannot be read."""
    return [name for name in names if _read(folder / name) != sums[name]]


def _read(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        return str(error)
