"""Text for the main job: where tokens come from, and which of them make up batch number n.

Tokens are the bytes of the text plus one end-of-document mark, or whatever a Megatron ``.bin``/``.idx`` pair holds.
"""

import hashlib
import importlib
import math
import struct
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..usage import UsageError

EOD = 256  # token after every document; bytes are the tokens 0 to 255
FLAG = "--data-path"
LARGEST_VOCABULARY = 1 << 24
"""Number of token ids; larger ones are taken for damage, because the embedding is made as large as the largest asks for."""
# Codes of the token type in an .idx file, from megatron/core/datasets/indexed_dataset.py.
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class DataError(UsageError):
    """Text that cannot be trained on: what was given, what is possible, what to do."""


@dataclass(frozen=True)
class Corpus:
    """One long row of tokens.

    Attributes:
        tokens: Token ids of any integer type, (n,); may be a read-only memory map.
        vocab_size: One more than the largest id that can occur.
        source: Description of the origin, for messages.
        digest: Equal for equal corpora. For a ``.bin`` file it covers the index and the size, not the contents.
    """

    tokens: NDArray[Any]
    vocab_size: int
    source: str
    digest: str

    def padded_vocab_size(self, multiple: int = 8) -> int:
        """Vocabulary rounded up to a ``multiple`` that does not depend on the tensor-parallel size, which a resume may change."""
        return -(-self.vocab_size // multiple) * multiple


def load_corpus(data_path: Sequence[str] = ()) -> Corpus:
    """Load the user's text, or the text that Python carries.

    Args:
        data_path: UTF-8 text files and directories of ``*.txt``, joined in this order; or one prefix of a Megatron
            ``.bin``/``.idx`` pair (either file's name will do). Empty for :func:`python_corpus`.

    Raises:
        DataError: A path is missing, empty, of the wrong kind or not UTF-8, or one file of a pair is missing or
            damaged.
    """
    if not data_path:
        return python_corpus()
    prefixes = [prefix for path in data_path if (prefix := _megatron_prefix(Path(path))) is not None]
    if prefixes:
        if len(data_path) > 1:
            hint = "merge the pairs with Megatron's tools/merge_datasets.py"
            raise DataError(FLAG, " ".join(data_path), "takes text files, or one .bin/.idx prefix alone", hint=hint)
        return megatron_corpus(prefixes[0])
    files = [file for path in data_path for file in _text_files(Path(path))]
    documents = [_read_text(file) for file in files]
    if not any(documents):
        raise DataError(
            FLAG, " ".join(data_path), "holds no text", possible="UTF-8 text files with at least one character"
        )
    return _byte_corpus(documents, f"{len(files)} text file{'s' if len(files) > 1 else ''} of {' '.join(data_path)}")


def python_corpus() -> Corpus:
    """The text that CPython carries: the topics of its language reference, and ``*.py`` of its library's top level.

    Raises:
        DataError: This Python carries neither.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    documents = [topics[name].encode() for name in sorted(topics)]
    documents += [file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    if not any(documents):
        raise DataError(
            FLAG, None, "not given, and this Python carries no text of its own", hint=f"give text files with {FLAG}"
        )
    return _byte_corpus(documents, "the texts of this Python: language reference and standard library")


def megatron_corpus(prefix: Path) -> Corpus:
    """The tokens of ``prefix.bin`` as ``prefix.idx`` describes them, in the order of the file, memory-mapped.

    The index is, little-endian: 9 bytes of magic, u64 version 1, u8 token type, u64 sequences, u64 documents; then the
    lengths of the sequences (i32), their byte offsets (i64), and the first sequences of the documents (i64). The tokens
    are read through once, for the largest of them gives the vocabulary size.

    Raises:
        DataError: One file is missing, or they are not of this format, or do not fit each other.
    """
    index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path, other in ((index_path, bin_path), (bin_path, index_path)):
        if not path.is_file():
            hint = "a Megatron data set is both files; write them again with Megatron's tools/preprocess_data.py"
            raise DataError(FLAG, prefix, f"there is {other}, but not {path}", hint=hint)
    index = _read(index_path)
    if index[:9] != _INDEX_MAGIC or len(index) < 34:
        raise DataError(
            FLAG, prefix, f"{index_path} is not a Megatron index", possible="a file that begins with MMIDIDX"
        )
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    if version != 1 or code not in _INDEX_DTYPES:
        raise DataError(
            FLAG, prefix, f"{index_path} has version {version} and token type {code}",
            possible=f"version 1 and token types {', '.join(map(str, _INDEX_DTYPES))} (integers)",
        )  # fmt: skip
    if len(index) < 34 + 12 * sequences + 8 * documents:
        raise DataError(FLAG, prefix, f"{index_path} is cut short", hint="copy it again")
    dtype = np.dtype(_INDEX_DTYPES[code])
    lengths = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    size = bin_path.stat().st_size
    if (lengths < 0).any() or not np.array_equal(offsets, (lengths.cumsum() - lengths) * dtype.itemsize):
        raise DataError(
            FLAG, prefix, f"the sequences of {index_path} do not follow one another", hint="write the pair again"
        )
    if size != lengths.sum() * dtype.itemsize:
        problem = f"{bin_path} has {size} bytes, but its index describes {lengths.sum() * dtype.itemsize}"
        raise DataError(FLAG, prefix, problem, hint="the two files are not of one data set, or a copy broke off")
    if not size:
        raise DataError(FLAG, prefix, "holds no tokens")
    try:
        tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(FLAG, bin_path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if dtype.kind == "i" and tokens.min() < 0:
        raise DataError(
            FLAG, prefix, f"{bin_path} has negative token ids", hint="it is damaged: copy or write it again"
        )
    largest = int(tokens.max())
    if largest >= LARGEST_VOCABULARY:
        raise DataError(
            FLAG, prefix, f"{bin_path} has the token id {largest:,}, which no tokenizer gives",
            possible=f"ids below {LARGEST_VOCABULARY:,}", hint="it is damaged, or its index names another token type",
        )  # fmt: skip
    digest = hashlib.sha256(index).hexdigest()[:16]
    return Corpus(tokens, largest + 1, f"Megatron data set {prefix}", digest)


class Samples:
    """Sequences of a corpus: in every epoch each of them once, in an order that depends on the seed and the epoch alone.

    The position in the data is one integer, the number of samples consumed so far, whatever the batch sizes were.

    Args:
        tokens: Token ids, (n,).
        starts: Positions at which sequences of ``seq_length + 1`` tokens begin.
        seq_length: Number of tokens that the model sees.
        seed: Seed of the order.
    """

    def __init__(self, tokens: NDArray[Any], starts: NDArray[np.int64], seq_length: int, seed: int) -> None:
        self._tokens, self._starts, self._seq_length, self._seed = tokens, starts, seq_length, seed
        self._epoch, self._order = -1, starts

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, consumed: int, size: int) -> Tensor:
        """The ``size`` sequences that follow the first ``consumed`` ones; (size, sequence + 1), int64."""
        rows = [
            self._tokens[start : start + self._seq_length + 1]
            for start in map(self._start, range(consumed, consumed + size))
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _start(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self))
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest()
            self._order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8]))).permutation(self._starts)
            self._epoch = epoch
        return int(self._order[position])


def split_samples(
    corpus: Corpus, *, seq_length: int, seed: int, valid_fraction: float = 0.05
) -> tuple[Samples, Samples]:
    """Training and validation sequences: the corpus in pieces of ``seq_length``, of which a regular share is held out.

    Sequences are held out all along the text and not at its end, so that both parts hold the same kind of text.

    Args:
        valid_fraction: Share to hold out, in (0, 0.5]; at least one sequence is held out.

    Raises:
        DataError: The corpus is too short for one sequence of either kind.
    """
    assert 0 < valid_fraction <= 0.5
    count = (len(corpus.tokens) - 1) // seq_length
    if count < 2:
        raise DataError(
            "--seq-length", seq_length,
            f"is too long for the text, which has {len(corpus.tokens)} tokens ({corpus.source})",
            possible=f"1 to {(len(corpus.tokens) - 1) // 2}" if len(corpus.tokens) > 2 else "",
            hint=f"give at least {2 * seq_length + 1} tokens: one sequence to train on and one to validate with",
        )  # fmt: skip
    starts = np.arange(count, dtype=np.int64) * seq_length
    every = min(count, math.ceil(1 / valid_fraction))
    held_out = np.arange(count) % every == every - 1
    train, valid = starts[~held_out], starts[held_out]
    return Samples(corpus.tokens, train, seq_length, seed), Samples(corpus.tokens, valid, seq_length, seed)


def _byte_corpus(documents: Iterable[bytes], source: str) -> Corpus:
    pieces: list[NDArray[np.uint16]] = []
    for document in documents:
        if document:
            pieces += [np.frombuffer(document, np.uint8).astype(np.uint16), np.array([EOD], np.uint16)]
    tokens = np.concatenate(pieces)
    return Corpus(tokens, EOD + 1, source, hashlib.sha256(tokens.tobytes()).hexdigest()[:16])


def _megatron_prefix(path: Path) -> Path | None:
    """``data`` for data, data.bin or data.idx where one of the two files is there; None for anything else."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = any(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx"))
    return prefix if pair and (prefix != path or not path.exists()) else None


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(_below(path, set()))
        if not files:
            raise DataError(
                FLAG, path, "is a directory without *.txt files", hint="name the files themselves, or rename them"
            )
        return files
    if not path.exists():
        possible = "a text file, a directory of *.txt files, or the prefix of a .bin/.idx pair"
        raise DataError(FLAG, path, "does not exist", possible=possible)
    if not path.is_file():
        raise DataError(FLAG, path, "is neither a file nor a directory")
    return [path]


def _below(directory: Path, above: set[Path]) -> Iterator[Path]:
    """The ``*.txt`` files below ``directory``, also through links, but not through a link to one of the directories ``above``."""
    try:
        real, entries = directory.resolve(), list(directory.iterdir())
    except OSError as error:
        raise DataError(FLAG, directory, f"cannot be read: {error.strerror or error}") from None
    if real in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry, {*above, real})
        elif entry.suffix == ".txt":
            if not entry.exists():
                raise DataError(FLAG, entry, "is a link to nothing", hint="remove it, or repair what it points to")
            if entry.is_file():
                yield entry


def _read_text(file: Path) -> bytes:
    content = _read(file)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        hint = f"convert it: iconv -f latin1 -t utf-8 {file}; a tokenized data set is given by its .bin/.idx prefix"
        raise DataError(
            FLAG, file, f"is not UTF-8 text (byte {content[error.start]:#04x} at {error.start})", hint=hint
        ) from None
    return content


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(FLAG, file, f"cannot be read: {error.strerror or error}") from None
