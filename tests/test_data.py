"""Tokens to batches: each token once, the same at every degree and after a resume."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ulysses_jax.config import DataConfig
from ulysses_jax.data import END, Corpus, Document, Packing, byte_entropy, open_corpus, place, read_ahead
from ulysses_jax.mesh import make_mesh

VOCAB = 1000


def write(path: Path, tokens, dtype: type[np.integer] = np.uint16) -> None:
    tokens = np.asarray(tokens, dtype)
    np.save(path, tokens) if path.suffix == ".npy" else tokens.tofile(path)


def documents(path: Path, *lengths: int) -> tuple[Document, ...]:
    """Documents of consecutive numbers from 1 on, so that a token says where it came from."""
    write(path / "tokens.bin", np.arange(1, sum(lengths) + 1))
    starts = np.cumsum([0, *lengths[:-1]])
    dtype = np.dtype(np.uint16)
    return tuple(Document(path / "tokens.bin", int(s), n, dtype) for s, n in zip(starts, lengths, strict=True))


def packing(path: Path, *lengths: int, seq_len: int = 8, batch_size: int = 4, **options) -> Packing:
    config = {name: options.pop(name) for name in ("mask_documents", "mask_rate", "seed") if name in options}
    data = DataConfig(seq_len=seq_len, batch_size=batch_size, **config)
    return Packing(documents(path, *lengths), data, VOCAB, **options)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


LENGTHS = (5, 17, 2, 40, 8, 9, 3, 16, 21)


def test_a_batch_is_exact_on_a_corpus_made_by_hand(tmp_path):
    """Documents 1 2 3 | 4 … 9 | 10 11 in rows of 4: cut at rows' ends, padded in the last."""
    batch = packing(tmp_path, 3, 6, 2, seq_len=4, batch_size=3, shuffle=False).batch(0)
    expected = {
        "tokens": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]],
        "segment_ids": [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 2, 0]],
        "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 1, 0]],
        "labels": [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 0, 0]],
        "weights": [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]],
    }
    equal(batch, {name: np.array(x) for name, x in expected.items()})
    assert {name: x.dtype.name for name, x in batch.items()} == dict.fromkeys(expected, "int32") | {"weights": "float32"}


def test_without_document_masks_positions_count_along_the_row(tmp_path):
    batch = packing(tmp_path, 3, 6, 2, seq_len=4, batch_size=3, shuffle=False, mask_documents=False).batch(0)
    assert "segment_ids" not in batch
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(4), (3, 1)))


def test_a_batch_depends_on_the_step_alone(tmp_path):
    """Trap 8; a generator that is carried from batch to batch breaks it."""
    one, other = packing(tmp_path, *LENGTHS), packing(tmp_path, *LENGTHS)
    forwards = [one.batch(step) for step in range(9)]
    for step in (8, 3, 3, 0):
        equal(other.batch(step), forwards[step])


def test_labels_are_the_successors_wherever_they_count(tmp_path):
    p = packing(tmp_path, *LENGTHS)
    counted = 0
    for step in range(4):
        batch = p.batch(step)
        counts = batch["weights"] > 0
        np.testing.assert_array_equal(batch["labels"][counts], batch["tokens"][counts] + 1)
        counted += counts.sum()
    assert counted == sum(LENGTHS) - len(LENGTHS), "all but the last token of each document, in one epoch"


def seen(batches) -> list[int]:
    return sorted(int(t) for batch in batches for t in batch["tokens"][batch["segment_ids"] > 0])


def test_every_token_is_seen_once_an_epoch(tmp_path):
    """Trap 8; rows that overlap by a token, or a last row dropped, break it. 121 tokens are 16 rows of 8."""
    p = packing(tmp_path, *LENGTHS)
    assert p.rows == 16
    for epoch in range(3):
        assert seen(p.batch(step) for step in range(4 * epoch, 4 * epoch + 4)) == list(range(1, sum(LENGTHS) + 1))
    first, second = ([p.batch(s)["tokens"] for s in range(4 * epoch, 4 * epoch + 4)] for epoch in (0, 1))
    assert not np.array_equal(first, second), "each epoch has its own order"


def local_rows(batch, mesh) -> dict[str, np.ndarray]:
    """A placed batch, put together again from what each device holds."""
    whole = {}
    for name, x in place(batch, mesh).items():
        whole[name] = np.full(x.shape, -1, x.dtype)
        for shard in x.addressable_shards:
            assert shard.data.shape == (x.shape[0] // mesh.shape["data"], x.shape[1] // mesh.shape["seq"])
            whole[name][shard.index] = np.asarray(shard.data)
    return whole


def test_every_token_is_seen_once_through_a_resume_at_another_degree(tmp_path):
    """Trap 8; batches drawn a device, in place of cut from one global batch, break it."""
    before, after = make_mesh(data=2, seq=4), make_mesh(data=4, seq=2)
    p, resumed = packing(tmp_path, *LENGTHS), packing(tmp_path, *LENGTHS)
    batches = [local_rows(batch, before) for batch in read_ahead(p, range(0, 2))]
    batches += [local_rows(batch, after) for batch in read_ahead(resumed, range(2, 4))]
    assert seen(batches) == list(range(1, sum(LENGTHS) + 1))


@pytest.mark.parametrize(("data", "seq"), [(1, 8), (2, 4), (4, 2), (4, 1)])
def test_each_device_gets_its_rows_part_of_the_sequence(data, seq, tmp_path):
    mesh = make_mesh(data=data, seq=seq)
    batch = packing(tmp_path, *LENGTHS).batch(0)
    for name, x in place(batch, mesh).items():
        assert len(x.addressable_shards) == data * seq
        for shard in x.addressable_shards:
            (d,), (s,) = np.where(mesh.devices == shard.device)
            rows, columns = 4 // data, 8 // seq
            part = batch[name][d * rows : (d + 1) * rows, s * columns : (s + 1) * columns]
            np.testing.assert_array_equal(shard.data, part, err_msg=name)


def test_reading_ahead_gives_the_same_batches(tmp_path):
    p = packing(tmp_path, *LENGTHS)
    ahead = list(read_ahead(p, range(3, 11)))
    assert len(ahead) == 8
    for step, batch in zip(range(3, 11), ahead, strict=True):
        equal(batch, p.batch(step))


def test_seeds_and_epochs_shuffle(tmp_path):
    tokens = [packing(tmp_path, *LENGTHS, seed=seed).batch(0)["tokens"] for seed in (0, 1)]
    assert not np.array_equal(tokens[0], tokens[1])


def test_masked_tokens_follow_the_objective_and_the_step(tmp_path):
    """80 % masked, 10 % random, 10 % kept, of the chosen; the labels are the tokens themselves."""
    options = {"is_causal": False, "seq_len": 500, "batch_size": 8, "mask_rate": 0.3}
    p = packing(tmp_path, 450, 100, 250, **options)
    batch, plain = p.batch(1), packing(tmp_path, 450, 100, 250, **options | {"is_causal": True}).batch(1)
    equal(batch, packing(tmp_path, 450, 100, 250, **options).batch(1))
    np.testing.assert_array_equal(batch["labels"], plain["tokens"])
    chosen, real = batch["weights"] > 0, batch["segment_ids"] > 0
    assert not (chosen & ~real).any(), "padding is never chosen"
    np.testing.assert_array_equal(batch["tokens"][~chosen], plain["tokens"][~chosen])
    assert chosen[real].mean() == pytest.approx(0.3, abs=0.03)
    shown, label = batch["tokens"][chosen], batch["labels"][chosen]
    assert (shown == VOCAB - 1).mean() == pytest.approx(0.8, abs=0.05)
    assert (shown == label).mean() == pytest.approx(0.1, abs=0.04)
    assert not np.array_equal(chosen, p.batch(0)["weights"] > 0)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    """Without a size to set: the largest id of one batch is not that of the data, and the next batch would refuse it."""
    p = dataclasses.replace(packing(tmp_path, 20, 20), vocab_size=30)
    message = r"the data holds token id \d+, but model.vocab_size is 30; it must cover every id [^\d]*$"
    with pytest.raises(ValueError, match=message):
        [p.batch(step) for step in range(2)]


@pytest.mark.parametrize(("file", "options"), [("a.npy", {}), ("a.bin", {"token_dtype": "uint32"})])
def test_a_token_beyond_int32_is_refused_by_its_value(file, options, tmp_path):
    """As int32 it is negative, so that no vocabulary is too small for it; broken by a check after the conversion."""
    tokens = np.arange(1, 101)
    tokens[3] = 2**31 - 1
    write(tmp_path / file, tokens, np.uint32)
    (train,) = open_corpus(source(tmp_path / file, **options)).train
    assert train.read(0, 8).max() == 2**31 - 1
    tokens[3] = 3_000_000_000
    write(tmp_path / file, tokens, np.uint32)
    message = rf"{file} holds token id 3000000000; it must be below 2\*\*31.*data.token_dtype"
    with pytest.raises(ValueError, match=message):
        Packing((train,), source(tmp_path, batch_size=12), VOCAB).batch(0)


def texts(folder: Path, count: int = 20) -> Path:
    for i in range(count):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i} " + "é" * i)
    return folder


def source(path: Path, **options) -> DataConfig:
    return DataConfig(source=str(path), seq_len=8, **options)


def names(documents: tuple[Document, ...]) -> set[str]:
    return {d.path.name for d in documents}


def test_a_text_file_is_its_bytes_and_an_end(tmp_path):
    corpus = open_corpus(source(texts(tmp_path)))
    document = next(d for d in corpus.train + corpus.held_out if d.path.name == "7.txt")
    tokens = [*"text 7 ééééééé".encode(), END]
    np.testing.assert_array_equal(document.read(0, document.length), tokens)
    for first, last in ((0, 3), (5, document.length), (document.length - 1, document.length)):
        np.testing.assert_array_equal(document.read(first, last), tokens[first:last])
    assert corpus.is_bytes
    assert corpus.vocab_size == 258


def test_held_out_files_are_disjoint_and_stay_held_out_as_the_folder_grows(tmp_path):
    before = open_corpus(source(texts(tmp_path), held_out=0.3))
    assert names(before.train) & names(before.held_out) == set()
    assert len(before.train) + len(before.held_out) == 20
    assert 2 <= len(before.held_out) <= 12
    assert open_corpus(source(tmp_path, held_out=0.3)) == before
    (tmp_path / "new.txt").write_text("one more")
    after = open_corpus(source(tmp_path, held_out=0.3))
    assert names(before.train) <= names(after.train)


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    fingerprints = [open_corpus(source(texts(tmp_path))).fingerprint]
    (tmp_path / "part0" / "0.txt").write_text("longer than it was")
    fingerprints.append(open_corpus(source(tmp_path)).fingerprint)
    (tmp_path / "part0" / "0.txt").rename(tmp_path / "part0" / "renamed.txt")
    fingerprints.append(open_corpus(source(tmp_path)).fingerprint)
    assert len(set(fingerprints)) == 3
    assert open_corpus(source(tmp_path)).fingerprint == fingerprints[-1]


def test_hidden_and_empty_files_and_other_patterns_are_left_out(tmp_path):
    texts(tmp_path)
    (tmp_path / ".hidden.txt").write_text("secret secret")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("notes and notes")
    corpus = open_corpus(source(tmp_path, pattern="**/*.txt"))
    assert names(corpus.train + corpus.held_out) == {f"{i}.txt" for i in range(20)}
    assert "notes.md" in names(open_corpus(source(tmp_path)).train + open_corpus(source(tmp_path)).held_out)


@pytest.mark.parametrize("stray", [".cache/index.npy", ".git/objects/pack.bin", "part0/.index.bin"])
def test_a_hidden_array_leaves_a_folder_its_text(stray, tmp_path):
    """Broken by searching for arrays in hidden folders."""
    before = open_corpus(source(texts(tmp_path)))
    (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / stray, range(100))
    assert open_corpus(source(tmp_path)) == before


def test_a_pattern_chooses_among_arrays_and_text(tmp_path):
    """Broken by searching for arrays without the pattern."""
    before = open_corpus(source(texts(tmp_path)))
    for name in ("a.npy", "part0/b.npy", "c.bin"):
        write(tmp_path / name, range(100))
    assert open_corpus(source(tmp_path, pattern="**/*.txt")) == before
    corpus = open_corpus(source(tmp_path, pattern="**/*.npy"))
    assert (names(corpus.train + corpus.held_out), corpus.is_bytes) == ({"a.npy", "b.npy"}, False)


def test_an_empty_file_beside_arrays_is_no_text(tmp_path):
    write(tmp_path / "a.npy", range(100))
    (tmp_path / "_SUCCESS").touch()
    corpus = open_corpus(source(tmp_path))
    assert names(corpus.train + corpus.held_out) == {"a.npy"}


@pytest.mark.parametrize(
    ("file", "dtype", "options"),
    [
        ("tokens.npy", np.uint16, {}),
        ("tokens.npy", np.uint32, {}),
        ("tokens.bin", np.uint16, {}),
        ("tokens.bin", np.uint32, {"token_dtype": "uint32"}),
    ],
)
def test_arrays_are_read_as_written(file, dtype, options, tmp_path):
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max // 2, 100)
    write(tmp_path / file, tokens, dtype)
    for path in (tmp_path / file, tmp_path):
        corpus = open_corpus(source(path, **options))
        (train,), (held_out,) = corpus.train, corpus.held_out
        read = np.concatenate([d.read(0, d.length) for d in (train, held_out)])
        np.testing.assert_array_equal(read, tokens)
        assert held_out.length == 5, "one document gives its end"
        assert (corpus.is_bytes, corpus.vocab_size) == (False, None)


@pytest.mark.parametrize("file", ["tokens.npy", "tokens.bin"])
def test_an_end_of_document_divides_an_array(file, tmp_path):
    """The end belongs to its document; a document of one token has nothing to predict and is left out."""
    write(tmp_path / file, [5, 6, 0, 7, 8, 9, 0, 0, 1, 2, 3, 0, 4, 4, 4, 4])
    corpus = open_corpus(source(tmp_path / file, end_of_document=0, held_out=0.01))
    read = sorted(tuple(d.read(0, d.length)) for d in corpus.train + corpus.held_out)
    assert read == [(1, 2, 3, 0), (4, 4, 4, 4), (5, 6, 0), (7, 8, 9, 0)]
    assert len(corpus.held_out) == 1, "a single file holds out documents"


def test_a_single_text_gives_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = open_corpus(source(tmp_path, held_out=0.1))
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert (train.length, held_out.length) == (91, 10)
    assert bytes(train.read(0, 91).astype(np.uint8)) == b"0123456789" * 9 + b"0"
    np.testing.assert_array_equal(held_out.read(0, 10), [*b"123456789", END])


def test_a_tilde_is_the_home_folder_and_stays_in_the_config(tmp_path, monkeypatch):
    """A shell leaves it in `--data.source=~/x`; broken by opening the source as given."""
    (tmp_path / "x").mkdir()
    texts(tmp_path / "x")
    write(tmp_path / "tokens.npy", range(100))
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DataConfig(source="~/x", seq_len=8)
    assert open_corpus(config) == open_corpus(source(tmp_path / "x"))
    assert config.source == "~/x"
    assert open_corpus(DataConfig(source="~/tokens.npy", seq_len=8)).vocab_size is None


def test_the_standard_library_is_there():
    corpus = open_corpus(DataConfig())
    assert sum(d.length for d in corpus.train) > 1_000_000
    assert all(d.path.suffix == ".py" and "site-packages" not in d.path.parts for d in corpus.train)


def spoil(folder: Path, kind: str) -> Path:
    match kind:
        case "missing":
            return folder / "nowhere"
        case "single text":
            (folder / "a.txt").write_text("text")
            return folder / "a.txt"
        case "floats":
            np.save(folder / "a.npy", np.zeros(100))
        case "matrix":
            np.save(folder / "a.npy", np.zeros((10, 10), np.uint16))
        case "not npy":
            (folder / "a.npy").write_bytes(b"no array at all")
        case "pickle":
            np.save(folder / "a.npy", np.array([{}] * 100), allow_pickle=True)
        case "odd bytes":
            (folder / "a.bin").write_bytes(b"123")
        case "two kinds":
            write(texts(folder) / "part1" / "a.npy", range(100))
        case "too short":
            (folder / "a.txt").write_text("123456")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist; name a folder"),
        ("empty", "has no file that matches data.pattern"),
        ("single text", "is a single file; only .npy and .bin may be"),
        ("floats", r"holds float64\[100\]; it must be one dim of uint16 or uint32"),
        ("matrix", r"holds uint16\[10, 10\]; it must be one dim"),
        ("not npy", r"cannot be read as .npy"),
        ("pickle", r"cannot be read as .npy"),
        ("odd bytes", r"has 3 bytes, not a multiple of 2 \(uint16\); set data.token_dtype"),
        ("two kinds", r"tokens \(part1/a.npy\) and text \(part0/0.txt\).*'\*\*/\*.npy' or '\*\*/\*.txt'"),
        ("too short", "fewer than one sequence of data.seq_len = 8"),
    ],
)
def test_unusable_sources_are_refused(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_corpus(source(spoil(tmp_path, kind)))


def test_byte_entropy_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"aaaabbcd")
    (tmp_path / "b.txt").write_bytes(b"aaaabbcd" * 3)
    corpus: Corpus = open_corpus(source(tmp_path))
    assert byte_entropy(corpus.train + corpus.held_out) == pytest.approx(0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3)


def test_one_batch_serves_every_mesh(tmp_path):
    """The global batch that eight devices hold is the one that a single device holds."""
    batch = packing(tmp_path, *LENGTHS).batch(2)
    whole = jax.tree.map(np.asarray, place(batch, make_mesh()))
    for data, seq in ((1, 8), (4, 2)):
        equal(jax.tree.map(np.asarray, place(batch, make_mesh(data=data, seq=seq))), whole)
    assert math.prod(whole["tokens"].shape) == 32
