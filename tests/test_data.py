"""Text for the main job: what is read, what is refused, and that a batch depends on seed and position alone."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.pretrain.data import EOD, Corpus, DataError, load_corpus, python_corpus, split_samples


def row(n: int) -> Corpus:
    """Tokens 0, 1, 2, ..., so that a token says where it stands."""
    return Corpus(np.arange(n), n, "a row", "")


def test_python_brings_its_own_text():
    topics = pytest.importorskip("pydoc_data.topics", reason="this Python has no pydoc_data").topics
    corpus = python_corpus()
    first = topics[min(topics)].encode()
    assert bytes(corpus.tokens[: len(first)].tolist()) == first
    assert corpus.tokens[len(first)] == EOD
    assert (corpus.tokens == EOD).sum() > len(topics)
    assert corpus.tokens.max() == EOD
    assert corpus.vocab_size == 257
    assert corpus.padded_vocab_size() == 264
    assert corpus.digest == python_corpus().digest


def test_text_files_and_directories_are_joined_in_order(tmp_path):
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("bé")
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "deeper" / "c.txt").write_text("c")
    (tmp_path / "texts" / "no.md").write_text("not this one")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "last").write_text("z")
    corpus = load_corpus([str(tmp_path / name) for name in ("texts", "empty.txt", "last")])
    expected = [*b"a", EOD, *"bé".encode(), EOD, *b"c", EOD, *b"z", EOD]
    assert corpus.tokens.tolist() == expected
    assert corpus.vocab_size == 257


def test_another_text_has_another_digest(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    one, two = (load_corpus([str(tmp_path / name)]) for name in ("one", "two"))
    assert one.digest != two.digest


def write_pair(prefix: Path, sequences: list[list[int]], dtype: str = "<u2", code: int = 8) -> None:
    """A Megatron data set, byte by byte after the description of the format."""
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    lengths = [len(s) for s in sequences]
    offsets = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    documents = range(len(sequences) + 1)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


@pytest.mark.parametrize(("dtype", "code"), [("u1", 1), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
@pytest.mark.parametrize("given", ["data.v1", "data.v1.bin", "data.v1.idx"])
def test_megatron_pair(tmp_path, given, dtype, code):
    write_pair(tmp_path / "data.v1", [[5, 6, 7], [], [8], [100, 2]], dtype, code)
    corpus = load_corpus([str(tmp_path / given)])
    assert corpus.tokens.tolist() == [5, 6, 7, 8, 100, 2]
    assert corpus.vocab_size == 101
    assert corpus.padded_vocab_size() == 104


@pytest.mark.filterwarnings("ignore")
def test_megatrons_own_writer_is_read_alike(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    documents = [torch.arange(3), torch.tensor([9, 400, 1, 2]), torch.tensor([7])]
    prefix = str(tmp_path / "data")
    builder = indexed.IndexedDatasetBuilder(prefix + ".bin", dtype=indexed.DType.optimal_dtype(500))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(prefix + ".idx")
    theirs = indexed.IndexedDataset(prefix)
    corpus = load_corpus([prefix])
    assert corpus.tokens.tolist() == torch.cat(documents).tolist()
    assert corpus.tokens.tolist() == np.concatenate([theirs[i] for i in range(len(theirs))]).tolist()


def _missing(folder: Path) -> None:
    pass


def _empty(folder: Path) -> None:
    (folder / "data").write_text("")


def _latin1(folder: Path) -> None:
    (folder / "data").write_bytes("à la carte".encode("latin1"))


def _no_text_files(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "a.md").write_text("a")


def _bin_alone(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"12")


def _idx_alone(folder: Path) -> None:
    (folder / "data.idx").write_bytes(b"12")


def _not_an_index(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"12")
    (folder / "data.idx").write_bytes(b"x" * 50)


def _float_tokens(folder: Path) -> None:
    write_pair(folder / "data", [[1, 2]], "<f4", 7)


def _cut_index(folder: Path) -> None:
    write_pair(folder / "data", [[1, 2], [3]])
    (folder / "data.idx").write_bytes((folder / "data.idx").read_bytes()[:-20])


def _cut_bin(folder: Path) -> None:
    write_pair(folder / "data", [[1, 2], [3]])
    (folder / "data.bin").write_bytes((folder / "data.bin").read_bytes()[:-1])


def _wrong_offsets(folder: Path) -> None:
    write_pair(folder / "data", [[1, 2], [3]])
    index = bytearray((folder / "data.idx").read_bytes())
    index[34 + 2 * 4 + 8] += 1
    (folder / "data.idx").write_bytes(index)


def _negative(folder: Path) -> None:
    write_pair(folder / "data", [[1, -2]], "<i4", 4)


def _no_tokens(folder: Path) -> None:
    write_pair(folder / "data", [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "data: does not exist; possible: a text file, a directory"),
        (_empty, "holds no text"),
        (_latin1, r"is not UTF-8 text \(byte 0xe0 at 0\); hint: convert it: iconv"),
        (_no_text_files, r"is a directory without \*.txt files"),
        (_bin_alone, r"there is \S*data.bin, but not \S*data.idx"),
        (_idx_alone, r"there is \S*data.idx, but not \S*data.bin"),
        (_not_an_index, "is not a Megatron index"),
        (_float_tokens, "token type 7; possible: version 1 and token types 1, 2, 3, 4, 5, 8"),
        (_cut_index, "is cut short"),
        (_cut_bin, "has 5 bytes, but its index describes 6"),
        (_wrong_offsets, "do not follow one another"),
        (_negative, "negative token ids"),
        (_no_tokens, "holds no tokens"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus([str(tmp_path / "data")])
    assert str(caught.value).startswith("--data-path ")
    assert "\n" not in str(caught.value)


def test_a_pair_beside_other_paths_is_refused(tmp_path):
    write_pair(tmp_path / "data", [[1, 2]])
    (tmp_path / "text").write_text("text")
    with pytest.raises(DataError, match=r"one \.bin/\.idx prefix alone"):
        load_corpus([str(tmp_path / "data"), str(tmp_path / "text")])


def test_a_text_shorter_than_two_sequences_is_refused():
    with pytest.raises(DataError, match=r"--seq-length 10: is too long for the text, which has 20 tokens.* 1 to 9"):
        split_samples(row(20), seq_length=10, seed=1)
    train, valid = split_samples(row(21), seq_length=10, seed=1)
    assert (len(train), len(valid)) == (1, 1)


@given(st.integers(3, 400), st.integers(1, 20), st.integers(0, 5), st.floats(0.01, 0.5))
def test_every_sequence_is_trained_on_or_held_out(n, seq_length, seed, fraction):
    if (n - 1) // seq_length < 2:
        return
    train, valid = split_samples(row(n), seq_length=seq_length, seed=seed, valid_fraction=fraction)
    both = [samples.batch(0, len(samples)) for samples in (train, valid)]
    starts = torch.cat(both)[:, 0].sort().values
    assert starts.tolist() == list(range(0, (n - 1) // seq_length * seq_length, seq_length))
    for batch in both:
        assert torch.equal(batch, batch[:, :1] + torch.arange(seq_length + 1))
    assert len(valid) >= 1
    assert len(valid) <= max(1, fraction * (len(train) + len(valid)))


def test_a_batch_depends_on_the_position_alone():
    samples, _ = split_samples(row(301), seq_length=10, seed=3)
    again, _ = split_samples(row(301), seq_length=10, seed=3)
    run = torch.cat([samples.batch(position, 7) for position in range(0, 84, 7)])
    assert run.dtype == torch.int64
    assert run.shape == (84, 11)
    for position, size in ((80, 4), (0, 1), (27, 5), (14, 60)):  # also backwards, and over the end of an epoch
        assert torch.equal(again.batch(position, size), run[position : position + size])


def test_every_epoch_has_each_sequence_once_in_its_own_order():
    samples, _ = split_samples(row(301), seq_length=10, seed=3)
    epochs = samples.batch(0, 3 * len(samples))[:, 0].view(3, -1)
    assert all(torch.equal(epoch.sort().values, epochs[0].sort().values) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    other, _ = split_samples(row(301), seq_length=10, seed=4)
    assert not torch.equal(other.batch(0, len(other))[:, 0], epochs[0])


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts")
    corpus = load_corpus([str(tmp_path / "texts")])
    assert corpus.tokens.tolist() == [*b"a", EOD, *b"b", EOD]
    (tmp_path / "texts" / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match="link to nothing"):
        load_corpus([str(tmp_path / "texts")])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_pair_is_refused_in_one_line_or_read(tmp_path, data):
    write_pair(tmp_path / "data", [[5, 6, 7], [8], [100, 2]], "<i4", 4)
    for name in ("data.idx", "data.bin"):
        path = tmp_path / name
        raw = bytearray(path.read_bytes())
        for at, byte in data.draw(
            st.dictionaries(st.integers(0, len(raw) - 1), st.integers(0, 255), max_size=2)
        ).items():
            raw[at] = byte
        path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, 5]))])
    try:
        corpus = load_corpus([str(tmp_path / "data")])
    except DataError as error:
        assert "data" in str(error)
    else:
        assert 0 <= corpus.tokens.min() <= corpus.tokens.max() < corpus.vocab_size <= 1 << 24
