"""Tokens, packed to length T; the global batch is a pure function of the step.

    corpus     documents: names, lengths, and a read of any span
    Packing    each epoch one long stream of documents in a shuffled order, cut into rows of T, the rows shuffled again
    batch      step → arrays [B, T]; the same on every process, at every degree, before and after a resume
    place      arrays on the mesh: each device gets its rows' part of the sequence

The whole index is lengths and two permutations, so any step is reached at once and nothing but the step needs saving.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ulysses_jax.config import DataConfig
from ulysses_jax.mesh import RING, token_order, token_spec

__all__ = ["END", "Batch", "Corpus", "Packing", "byte_entropy", "open_corpus", "place", "read_ahead"]

END = 256
"""The token after the last byte of a document read as bytes."""

ARRAYS = (".npy", ".bin")
"""Suffixes of files of tokens; every other file is text."""

type Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Document:
    """`length` tokens of a file from `start` on; for text the last one is END and not in the file."""

    path: Path
    start: int
    length: int
    dtype: np.dtype
    offset: int = 0  # bytes before the first token of the file
    ends: bool = False  # END follows the file's tokens

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens first … last−1 of this document, int32.

        Raises:
          ValueError: a uint32 token that int32 cannot hold: it would be negative, and pass for one of the vocabulary.
        """
        stored = min(last, self.length - self.ends)
        offset = self.offset + (self.start + first) * self.dtype.itemsize
        tokens = np.fromfile(self.path, self.dtype, count=max(stored - first, 0), offset=offset)
        if self.dtype == np.uint32 and (top := int(tokens.max(initial=0))) >= 2**31:
            raise ValueError(
                f"data file {self.path} holds token id {top}; it must be below 2**31. Write ids from 0 on; where a .bin file "
                "is of another dtype, set data.token_dtype."
            )
        tokens = tokens.astype(np.int32)
        return np.append(tokens, np.int32(END)) if self.ends and last == self.length else tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    is_bytes: bool
    fingerprint: str
    """hash of every file's name and size; a run refuses to resume on another corpus"""

    @property
    def vocab_size(self) -> int | None:
        """Ids it uses, where that is known without reading all of it: bytes, END, and one for masking."""
        return END + 2 if self.is_bytes else None


def open_corpus(config: DataConfig) -> Corpus:
    """List the documents of `config.source` and hold some out, by file.

    Raises:
      ValueError: a source that is not there, has no usable file, or holds less than one sequence.
    """
    root, files = _files(config)
    is_bytes = files[0].suffix not in ARRAYS
    per_file = [[_text(path)] if is_bytes else _arrays(path, config) for path in files]
    if not is_bytes and config.end_of_document is not None and not any(_ends(documents, config) for documents in per_file):
        raise ValueError(
            f"data.end_of_document is {config.end_of_document}, which no file of data.source {config.source!r} holds, so that "
            "all would be one document. Set it to the id that the tokenizer ends documents with, or leave it out."
        )
    per_file = [kept for documents in per_file if (kept := [d for d in documents if d.length > 1])]
    if not per_file:
        raise ValueError(f"data.source {config.source!r} holds no document of 2 tokens or more; name a source with text in it.")
    train, held_out = _split([str(d[0].path.relative_to(root)) for d in per_file], per_file, config.held_out)
    total = sum(d.length for d in train)
    if total <= config.seq_len:
        raise ValueError(
            f"data.source {config.source!r} has {total} tokens to train on, fewer than one sequence of data.seq_len = "
            f"{config.seq_len}. Use a shorter sequence or more text."
        )
    listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in files)
    return Corpus(train, held_out, is_bytes, hashlib.sha256(listing.encode()).hexdigest()[:16])


@dataclasses.dataclass(frozen=True)
class Packing:
    """Documents as rows of T tokens, in an order that depends on the seed and the epoch alone.

    Every token of every document is in exactly one row of an epoch; only an epoch's last row is padded.
    """

    documents: tuple[Document, ...]
    config: DataConfig
    vocab_size: int
    is_causal: bool = True
    shuffle: bool = True

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.array([d.length for d in self.documents], np.int64)

    @functools.cached_property
    def rows(self) -> int:
        """Rows of one epoch."""
        return int(-(-self.lengths.sum() // self.config.seq_len))

    @functools.cached_property
    def _epoch(self):
        """Epoch → documents in its order, where each ends in its stream, and the order of its rows."""

        @functools.lru_cache(maxsize=4)
        def order(epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            documents, rows = np.arange(len(self.documents)), np.arange(self.rows)
            if self.shuffle:
                rng = np.random.default_rng((self.config.seed, epoch, 0))
                documents, rows = rng.permutation(documents), rng.permutation(rows)
            return documents, np.cumsum(self.lengths[documents]), rows

        return order

    def batch(self, step: int) -> Batch:
        """The global batch of a step.

        Returns:
          tokens, labels, segment_ids, positions: int32 [B, T]; weights: float32 [B, T], 1 where a label counts.
          A token's label is its successor (causal) or itself (bidirectional, only masked ones count). The segment id
          numbers the documents of a row from 1, 0 is padding; positions count from each document's first token in the row.
          Without `mask_documents` there are no segment ids and positions count along the row.
        """
        B = self.config.batch_size
        rows = [self._row(step * B + b) for b in range(B)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, example: int) -> Batch:
        epoch, index = divmod(example, self.rows)
        order, ends, row_order = self._epoch(epoch)
        T = self.config.seq_len
        start = int(row_order[index]) * T
        tokens, segments, positions = (np.zeros(T + 1, np.int32) for _ in range(3))
        document = int(np.searchsorted(ends, start, side="right"))
        filled = 0
        while filled <= T and document < len(order):
            begin = int(ends[document]) - int(self.lengths[order[document]])
            first = start + filled - begin
            last = min(first + T + 1 - filled, int(self.lengths[order[document]]))
            span = slice(filled, filled + last - first)
            tokens[span] = self.documents[order[document]].read(first, last)
            segments[span] = segments[filled - 1] + 1 if filled else 1
            positions[span] = np.arange(last - first)
            filled, document = span.stop, document + 1
        self._check(tokens)
        row = {"tokens": tokens[:-1], "segment_ids": segments[:-1], "positions": positions[:-1]}
        if self.is_causal:
            row |= {
                "labels": tokens[1:],
                "weights": ((segments[1:] == segments[:-1]) & (segments[:-1] > 0)).astype(np.float32),
            }
        else:
            row |= self._hide(example, row["tokens"], row["segment_ids"])
        if not self.config.mask_documents:
            row["positions"] = np.arange(T, dtype=np.int32)
            del row["segment_ids"]
        return row

    def _hide(self, example: int, tokens: np.ndarray, segments: np.ndarray) -> Batch:
        """BERT's objective (arXiv 1810.04805): of the chosen tokens 80 % are masked, 10 % random, 10 % left as they are."""
        rng = np.random.default_rng((self.config.seed, example, 1))
        chosen = (rng.random(tokens.size) < self.config.mask_rate) & (segments > 0)
        kind = rng.random(tokens.size)
        shown = np.where(chosen & (kind < 0.8), self.vocab_size - 1, tokens)
        shown = np.where(chosen & (kind >= 0.9), rng.integers(0, self.vocab_size - 1, tokens.size), shown)
        return {"tokens": shown.astype(np.int32), "labels": tokens, "weights": chosen.astype(np.float32)}

    def _check(self, tokens: np.ndarray) -> None:
        if (top := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"the data holds token id {top}, but model.vocab_size is {self.vocab_size}; it must cover every id of the "
                "tokenizer that wrote the data. Set it to that tokenizer's size."
            )


def read_ahead(packing: Packing, steps: range) -> Iterator[Batch]:
    """The batches of some steps, prepared a few ahead on other threads (grain)."""
    import grain  # reads ahead only: what else is here works without it

    dataset = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(packing.batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def place(batch: Batch, mesh: Mesh, *, balanced: bool = True) -> dict[str, jax.Array]:
    """A global batch on the mesh: every process holds all of it and hands its devices their parts.

    On a ring tokens lie in its `token_order`, or, not `balanced`, in their own (`TrainConfig.balanced`).
    """
    sharding = NamedSharding(mesh, token_spec(mesh))
    if balanced and (ring := mesh.shape.get(RING, 1)) > 1:
        batch = {name: x[:, token_order(x.shape[1], ring)] for name, x in batch.items()}
    return {name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for name, x in batch.items()}


def byte_entropy(documents: tuple[Document, ...]) -> float:
    """Entropy in bits of single bytes: −Σ p log₂ p over these documents."""
    counts = np.zeros(256, np.int64)
    for document in documents:
        counts += np.bincount(document.read(0, document.length - document.ends), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def _files(config: DataConfig) -> tuple[Path, list[Path]]:
    """The corpus' root, and its files in a fixed order."""
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        packages = {"site-packages", "dist-packages"}
        files = sorted(p for p in root.rglob("*.py") if not packages.intersection(p.relative_to(root).parts))
        if not files:
            raise ValueError(f"data.source is 'stdlib', but {root} holds no .py file; name a folder of text files instead.")
        return root, files
    path = Path(os.path.expanduser(config.source))  # Path's own raises RuntimeError for a user that is not there
    if not path.exists():
        raise ValueError(
            f"data.source {config.source!r} does not exist; name a folder of text files, a .npy or .bin file, or 'stdlib'."
        )
    if path.is_file():
        if path.suffix not in ARRAYS:
            raise ValueError(
                f"data.source {config.source!r} is a single file; only .npy and .bin may be. Name its folder instead."
            )
        return path.parent, [path]
    visible = (p for p in path.glob(config.pattern) if not any(x.startswith(".") for x in p.relative_to(path).parts))
    files = sorted(p for p in visible if p.is_file())
    arrays = [p for p in files if p.suffix in ARRAYS]
    texts = [p for p in files if p.suffix not in ARRAYS and p.stat().st_size > 0]  # an empty array is cut short, and said to be
    if arrays and texts:  # ids of a tokenizer and bytes have no vocabulary in common
        array, text = arrays[0].relative_to(path), texts[0].relative_to(path)
        patterns = " or ".join(f"'**/*{p.suffix}'" for p in (array, text) if p.suffix)
        raise ValueError(
            f"data.source {config.source!r} holds tokens ({array}) and text ({text}), but a run reads only one of the two; "
            f"choose by data.pattern, such as {patterns}."
        )
    if not (arrays or texts):
        raise ValueError(
            f"data.source {config.source!r} has no file that matches data.pattern = {config.pattern!r}; name another."
        )
    return path, arrays or texts


def _text(path: Path) -> Document:
    return Document(path, 0, path.stat().st_size + 1, np.dtype(np.uint8), ends=True)


def _arrays(path: Path, config: DataConfig) -> list[Document]:
    """The documents of one file of tokens."""
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):  # numpy's own words speak of pickles
            raise ValueError(
                f"data file {path} cannot be read as .npy; it is cut short or something else. Use np.save."
            ) from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f"data file {path} is an .npz archive; save one array of tokens with np.save.")
        if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"data file {path} holds {array.dtype}{list(array.shape)}; it must be one dim of uint16 or uint32. Convert it, "
                "e.g. np.save(path, tokens.astype(np.uint16))."
            )
        dtype, offset, length = np.dtype(array.dtype), array.offset, array.size  # pyright: ignore[reportAttributeAccessIssue]
    else:
        dtype, offset = np.dtype(config.token_dtype), 0
        length, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest:
            raise ValueError(
                f"data file {path} has {path.stat().st_size} bytes, "
                f"not a multiple of {dtype.itemsize} ({dtype}); set data.token_dtype."
            )
    if config.end_of_document is None:
        return [Document(path, 0, length, dtype, offset)]
    tokens = np.memmap(path, dtype, mode="r", offset=offset, shape=(length,)) if length else np.empty(0, dtype)
    ends = np.flatnonzero(tokens == config.end_of_document) + 1
    bounds = np.unique(np.concatenate([[0], ends, [length]]))
    return [Document(path, int(a), int(b - a), dtype, offset) for a, b in itertools.pairwise(bounds)]


def _ends(documents: list[Document], config: DataConfig) -> bool:
    """Whether a file's documents end as `config.end_of_document` says, one of them at least."""
    return len(documents) > 1 or any(
        d.length and d.read(d.length - 1, d.length)[0] == config.end_of_document for d in documents
    )


def _split(
    names: list[str], per_file: list[list[Document]], fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Hold out files by a hash of their names; a single file gives documents instead, a single document its end."""
    if len(per_file) == 1:
        (documents,) = per_file
        if len(documents) == 1:
            (whole,) = documents
            cut = whole.length - max(2, int(whole.length * fraction))
            if cut < 2:
                raise ValueError(f"data.source has {whole.length} tokens in all; that is too few to hold some out.")
            return (
                (dataclasses.replace(whole, length=cut, ends=False),),
                (dataclasses.replace(whole, start=whole.start + cut, length=whole.length - cut),),
            )
        names, per_file = [str(d.start) for d in documents], [[d] for d in documents]
    score = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names]
    lowest, highest = min(score), max(score)
    held = [s == lowest or (s < fraction and s != highest) for s in score]
    train, held_out = (
        tuple(d for is_held, documents in zip(held, per_file, strict=True) if is_held == wanted for d in documents)
        for wanted in (False, True)
    )
    return train, held_out
