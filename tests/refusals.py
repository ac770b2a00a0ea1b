"""Misuses of the public functions and of configs, for `test_refusals.py`: what provokes each, and what it must be told."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from tests import conftest as conftest  # the same 8 devices when this file is run by itself
from ulysses_jax import (
    BlockMask,
    ModelConfig,
    TrainConfig,
    Transformer,
    attention_fn,
    bigbird_blocks,
    dot_product_attention,
    fixed_blocks,
    heads_to_seq,
    longformer_blocks,
    make_mask,
    make_mesh,
    recipes,
    seq_to_heads,
    ulysses_attention,
    ulysses_attention_shard,
    zero_shardings,
)
from ulysses_jax.checkpoint import Checkpoints
from ulysses_jax.config import MemoryConfig
from ulysses_jax.zero import hold


@dataclasses.dataclass(frozen=True)
class Row:
    """A misuse, and what its message must name: the value, the relation required, the way out."""

    misuse: str
    provoke: Callable[[], object] | str  # a call, or a command line after `ulysses`
    says: tuple[str, ...]
    setup: Callable[[], object] = lambda: None  # files in the current folder that the misuse is about
    error: type[Exception] = ValueError


def x(B=2, T=8, N=4, H=8, dtype=jnp.float32) -> Any:
    return jnp.zeros((B, T, N, H), dtype)


def attend(q: Any = None, k: Any = None, **options: Any) -> object:
    q = x() if q is None else q
    k = q if k is None else k
    return jax.eval_shape(lambda: dot_product_attention(q, k, k, **options))


def attend_on_mesh(q: Any = None, k: Any = None, **options: Any) -> object:
    q = x() if q is None else q
    k = q if k is None else k
    options.setdefault("mesh", make_mesh(data=2, seq=4))
    return ulysses_attention(q, k, k, **options)


def on_shards(local: Callable, array: Any) -> object:
    spec = PartitionSpec(None, "seq")
    return jax.eval_shape(jax.shard_map(local, mesh=make_mesh(seq=4), in_specs=spec, out_specs=spec), array)


def attend_on_ring(q: Any = None, k: Any = None, **options: Any) -> object:
    return attend_on_mesh(q, k, batch_axes=(), ring_axis="data", **options)


def attend_on_heads(q: Any, k: Any = None) -> object:
    return attend_on_mesh(q, k, batch_axes=(), seq_axis="data", head_axis="seq")


def on_ring(local: Callable) -> object:
    spec = PartitionSpec(None, ("ring", "seq"))
    return jax.eval_shape(jax.shard_map(local, mesh=make_mesh(ring=2, seq=2), in_specs=spec, out_specs=spec), x())


def traced(call: Callable[[Any], object]) -> object:
    return jax.jit(call)(1.0)


def ids(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jnp.zeros(shape, dtype)


def blocks(*shape: int, block: Any = 4, dtype: Any = bool) -> BlockMask:
    return BlockMask(np.ones(shape, dtype), block)


NARROW_MODEL = ModelConfig(vocab_size=32, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8)


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(NARROW_MODEL, **changes)


def apply(tokens: Any, **options: Any) -> object:
    """A model on concrete tokens; nothing is compiled."""
    return jax.eval_shape(lambda: Transformer(NARROW_MODEL, rngs=nnx.Rngs(0))(tokens, **options))


def memory(**fields: Any) -> MemoryConfig:
    return MemoryConfig(**fields)


def train(**changes: Any) -> TrainConfig:
    return dataclasses.replace(recipes.recipe("demo"), **changes)


def shardings(params: Any, **options: Any) -> object:
    options = {"mesh": make_mesh(seq=2), "stage": 3} | options
    return zero_shardings(params, (), **options)


def mismatched_hold() -> object:
    at = zero_shardings({"w": x()}, (), mesh=make_mesh(seq=2), stage=3)
    return hold({"v": x()}, at[0], at[1])


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def a(value: object) -> Any:
    """A value of a type that the signature does not allow, on purpose."""
    return cast(Any, value)


ATTENTION = [
    Row("q is no array", lambda: attend([1], x()), ("q is [1]", "must be an array", "[batch, length, heads, head size]")),
    Row("q is None", lambda: dot_product_attention(a(None), x(), x()), ("q is None", "must be an array")),
    Row("q without heads", lambda: attend(x()[0]), ("q has shape [8, 4, 8]", "must be [batch, length, heads, head size]")),
    Row("q of integers", lambda: attend(x(dtype=jnp.int32)), ("q has dtype int32", "must be bfloat16", "astype")),
    Row("q of float8", lambda: attend(x(dtype=jnp.float8_e4m3fn)), ("q has dtype float8_e4m3fn", "astype(jnp.bfloat16)")),
    Row("no tokens", lambda: attend(x(T=0)), ("[2, 0, 4, 8]", "at least 1", "Leave empty batches out")),
    Row("k unlike v", lambda: dot_product_attention(x(), x(T=4), x()), ("k has shape [2, 4, 4, 8]", "must be equal")),
    Row("other head sizes", lambda: attend(x(), x(H=4)), ("k [2, 8, 4, 4]", "head size must be equal")),
    Row("K does not divide N", lambda: attend(x(), x(N=3)), ("N = 4", "K = 3", "K must divide N")),
    Row("mixed dtypes", lambda: attend(x(), x(dtype=jnp.bfloat16)), ("float32, bfloat16", "must be equal", "Cast them")),
    Row("is_causal a string", lambda: attend(is_causal="no"), ("is_causal is 'no'", "must be True or False")),
    Row("is_causal traced", lambda: traced(lambda c: attend(is_causal=c)), ("is_causal is an array", "before compiling")),
    Row("scale traced", lambda: traced(lambda s: attend(scale=s)), ("scale is an array float32[]", "multiply q by it")),
    Row("scale an array", lambda: attend(scale=jnp.ones(3)), ("scale is an array float32[3]", "must be a finite number")),
    Row("scale NaN", lambda: attend(scale=float("nan")), ("scale is nan", "must be a finite number")),
    Row("cap negative", lambda: attend(logits_soft_cap=-1.0), ("logits_soft_cap is -1.0", "> 0", "Leave it out")),
    Row(
        "sinks a float", lambda: attend(sinks=1.0), ("sinks is 1.0", "must be float32[4], [N]", "one logit for each query head")
    ),
    Row("sinks of KV heads", lambda: attend(k=x(N=2), sinks=jnp.ones(2)), ("float32[2]", "must be float32[4], [N]")),
    Row("sinks in bfloat16", lambda: attend(sinks=jnp.ones(4, jnp.bfloat16)), ("bfloat16[4]", "Cast it", "leave it out")),
    Row("window negative", lambda: attend(local_window_size=-1), ("local_window_size is -1", "≥ 0", "Leave it out")),
    Row("window of three", lambda: attend(local_window_size=(1, 2, 3)), ("(1, 2, 3)", "int or (left, right)")),
    Row("window a float", lambda: attend(local_window_size=1.5), ("local_window_size is 1.5", "must be an int")),
    Row("window half None", lambda: attend(local_window_size=(4, None)), ("(4, None)", "int or (left, right)")),
    Row("segment_ids a list", lambda: attend(segment_ids=[[0] * 8] * 2), ("a list of 2", "integer array", "jnp.asarray")),
    Row("segment_ids three", lambda: attend(segment_ids=(ids(2, 8),) * 3), ("a tuple of 3", "a pair")),
    Row("segment_ids without batch", lambda: attend(segment_ids=ids(8)), ("int32[8]", "integers [B, T]", "T = 8")),
    Row("segment_ids float", lambda: attend(segment_ids=ids(2, 8, dtype=float)), ("float32[2, 8]", "must be integers")),
    Row("segment_ids of another length", lambda: attend(segment_ids=ids(2, 9)), ("int32[2, 9]", "T = 8", "pass a pair")),
    Row("segment_ids of another batch", lambda: attend(segment_ids=ids(3, 8)), ("batch of 3", "B = 2", "one row for each")),
    Row("a pair of two batches", lambda: attend(segment_ids=(ids(2, 8), ids(1, 8))), ("2 sequences", "1 of keys", "must be B")),
    Row("segment_ids beyond int32", lambda: attend(segment_ids=np.full((2, 8), 2**40)), ("1099511627776", "fit in int32")),
    Row("a dense mask", lambda: attend(mask=jnp.ones((8, 8))), ("mask is an array", "must come from make_mask", "segment_ids")),
    Row("mask of another length", lambda: attend(mask=make_mask(16)), ("T = 16", "q has T = 8", "make_mask(8, 8)")),
    Row("mask of another batch", lambda: attend(mask=make_mask(8, segment_ids=ids(3, 8))), ("batch of 3", "B = 2")),
    Row("mask and is_causal", lambda: attend(mask=make_mask(8), is_causal=True), ("together with is_causal", "make_mask")),
    Row("unknown implementation", lambda: attend(implementation="flash"), ("'flash'", "None or one of", "xla, reference")),
    Row("cuDNN without a GPU", lambda: attend(x(dtype=jnp.bfloat16), implementation="cudnn"), ("'cpu'", "use 'xla'")),
    Row(
        "cuDNN in float32",
        lambda: attend(implementation="cudnn"),
        ("cannot do dtype float32", "use implementation='xla'"),
        error=NotImplementedError,
    ),
    Row("splash without a TPU", lambda: attend(implementation="splash"), ("needs a TPU", "'cpu'", "use 'xla'")),
    Row(
        "splash in float16",
        lambda: attend(x(dtype=jnp.float16), implementation="splash"),
        ("cannot do dtype float16", "only bfloat16 and float32", "use implementation='xla'"),
        error=NotImplementedError,
    ),
    Row(
        "splash with block_mask",
        lambda: attend(implementation="splash", block_mask=blocks(1, 2, 2)),
        ("cannot do block_mask", "use implementation='xla'"),
        error=NotImplementedError,
    ),
    Row(
        "splash with return_residual",
        lambda: attend(implementation="splash", return_residual=True),
        ("cannot do return_residual (its log-sum-exp has no gradient)", "use implementation='xla'"),
        error=NotImplementedError,
    ),
    Row(
        "cuDNN with sinks",
        lambda: attend(x(dtype=jnp.bfloat16), implementation="cudnn", sinks=jnp.ones(4)),
        ("cannot do sinks", "has no gradient", "use implementation='xla'"),
        error=NotImplementedError,
    ),
    Row("make_mask of 0 tokens", lambda: make_mask(0), ("query_length is 0", "int ≥ 1", "q.shape[1]")),
    Row("make_mask of an array", lambda: make_mask(a(x())), ("query_length is an array", "q.shape[1]")),
    Row("make_mask of a float", lambda: make_mask(8, a(8.5)), ("key_length is 8.5", "int ≥ 1")),
    Row("a layout without its block", lambda: attend(block_mask=np.ones((1, 2, 2))), ("block_mask is an array", "a BlockMask")),
    Row("a layout of floats", lambda: attend(block_mask=blocks(1, 2, 2, dtype=float)), ("float64[1, 2, 2]", "a bool array")),
    Row("a layout of a list", lambda: attend(block_mask=BlockMask(a([[[1]]]), 8)), ("layout is a list of 1", "np.asarray")),
    Row("a layout without heads", lambda: attend(block_mask=blocks(2, 2)), ("shape [2, 2]", "[1 or N, 2, 2]", "layout[None]")),
    Row("a layout of another length", lambda: attend(block_mask=blocks(1, 3, 2)), ("[1, 3, 2]", "T = 8", "[1 or N, 2, 2]")),
    Row("a layout of other heads", lambda: attend(block_mask=blocks(3, 2, 2)), ("for 3 heads", "N = 4", "one for each")),
    Row("blocks of 0 tokens", lambda: attend(block_mask=blocks(1, 2, 2, block=0)), ("block is 0", "int ≥ 1", "128")),
    Row("blocks of 1.5 tokens", lambda: attend(block_mask=blocks(1, 2, 2, block=1.5)), ("block is 1.5", "int ≥ 1")),
    Row(
        "mask and block_mask",
        lambda: attend(mask=make_mask(8), block_mask=blocks(1, 2, 2)),
        ("together with block_mask", "make_mask"),
    ),
    Row(
        "fixed blocks out of turn",
        lambda: fixed_blocks(512, global_blocks=3),
        ("global_blocks is 3", "divide local_blocks = 4"),
    ),
    Row("an even window of blocks", lambda: bigbird_blocks(512, window_blocks=2), ("window_blocks is 2", "must be odd")),
    Row("a negative count of blocks", lambda: bigbird_blocks(512, random_blocks=-1), ("random_blocks is -1", "int ≥ 0")),
    Row("a global token past the end", lambda: longformer_blocks(8, global_tokens=(8,)), ("global_tokens holds 8", "[0, 8)")),
]

MESH = [
    Row("a mesh of 0", lambda: make_mesh(data=0), ("data is 0", "at least 1 device")),
    Row("a ring of 0", lambda: make_mesh(ring=0), ("ring is 0", "at least 1 device")),
    Row("a mesh of 2.0", lambda: make_mesh(data=a(2.0)), ("data is 2.0", "must be an int")),
    Row("more devices than there are", lambda: make_mesh(data=4, seq=4), ("4 × 4 needs 16", "there are 8", "smaller mesh")),
    Row(
        "more devices than there are, with a ring",
        lambda: make_mesh(seq=4, ring=4),
        ("data × ring × seq", "1 × 4 × 4 needs 16"),
    ),
    Row("no devices", lambda: make_mesh(devices=[]), ("needs 1 devices", "there are 0", "Choose")),
    Row("devices by number", lambda: make_mesh(devices=a([0])), ("devices is [0]", "list of jax devices", "jax.devices()[:2]")),
    Row("a device twice", lambda: make_mesh(seq=2, devices=[jax.devices()[0]] * 2), ("twice", "each may be used once")),
    Row("mesh is None", lambda: attend_on_mesh(mesh=None), ("mesh is None", "must be a jax.sharding.Mesh", "make_mesh")),
    Row("mesh a tuple", lambda: attend_on_mesh(mesh=(2, 4)), ("mesh is (2, 4)", "must be a jax.sharding.Mesh")),
    Row("mesh without the axis", lambda: attend_on_mesh(seq_axis="sp"), ("seq_axis names 'sp'", "('data', 'seq')", "Pass")),
    Row("no such batch axis", lambda: attend_on_mesh(batch_axes="dp"), ("batch_axes names 'dp'", "batch_axes=()")),
    Row("no such head axis", lambda: attend_on_mesh(head_axis="tp"), ("head_axis names 'tp'", "Pass head_axis=")),
    Row("no such ring axis", lambda: attend_on_mesh(ring_axis="ring"), ("ring_axis names 'ring'", "Pass ring_axis=")),
    Row("an axis used twice", lambda: attend_on_mesh(batch_axes="seq"), ("['seq', 'seq']", "may be used once")),
    Row("batch not divisible", lambda: attend_on_mesh(x(B=3)), ("B = 3", "not divisible by 2", "Pad it")),
    Row("a length that the ring does not divide", lambda: attend_on_ring(x(T=12)), ("T = 12", "by 8", "without ring_axis any")),
    Row("a key length that the ring does not divide", lambda: attend_on_ring(x(), x(T=12)), ("S = 12", "by 8", "Pad it")),
    Row(
        "two lengths on a ring",
        lambda: attend_on_ring(x(), x(T=16)),
        ("T = 8", "S = 16", "must be equal", "Leave ring_axis out"),
        error=NotImplementedError,
    ),
    Row(
        "a mask on a ring",
        lambda: attend_on_ring(mask=make_mask(8)),
        ("mask was given together with ring_axis", "pass is_causal"),
        error=NotImplementedError,
    ),
    Row(
        "a pair of ids on a ring",
        lambda: attend_on_ring(segment_ids=(ids(2, 8), ids(2, 8))),
        ("segment_ids is a pair", "one array [B, T]"),
        error=NotImplementedError,
    ),
    Row(
        "a balanced order without a ring",
        lambda: attend_on_mesh(balanced=True),
        ("balanced is True", "ring_axis is None", "Name"),
    ),
    Row("balanced a string", lambda: attend_on_ring(balanced="no"), ("balanced is 'no'", "True or False")),
    Row(
        "a length that the balanced order does not halve",
        lambda: attend_on_mesh(x(), mesh=make_mesh(ring=8), ring_axis="ring", balanced=True),
        ("T = 8", "8 devices", "an even number", "multiple of 16"),
    ),
    Row("heads that head_axis does not divide", lambda: attend_on_heads(x(N=6)), ("N = 6", "by 4", "leave head_axis out")),
    Row("KV heads that head_axis does not divide", lambda: attend_on_heads(x(), x(N=2)), ("K = 2", "by 4", "Repeat them")),
    Row("ids of another batch, on a mesh", lambda: attend_on_mesh(segment_ids=ids(4, 8)), ("batch of 4", "B = 2")),
    Row("a shard's ids for the whole", lambda: attend_on_mesh(segment_ids=ids(2, 2)), ("int32[2, 2]", "T = 8")),
    Row("mask of another length, on a mesh", lambda: attend_on_mesh(mask=make_mask(2)), ("T = 2", "make_mask(8, 8)")),
    Row(
        "scale traced, on a mesh", lambda: traced(lambda s: attend_on_mesh(scale=s)), ("scale is an array", "before compiling")
    ),
    Row("unknown implementation, on a mesh", lambda: attend_on_mesh(implementation="flash"), ("'flash'", "one of")),
    Row(
        "the shard core outside shard_map",
        lambda: ulysses_attention_shard(x(), x(), x()),
        ("axis_name is 'seq'", "inside a shard_map", "ulysses_attention on global arrays"),
    ),
    Row(
        "the shard core over another axis",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, axis_name="sp"), x()),
        ("axis_name is 'sp'", "Pass axis_name="),
    ),
    Row(
        "the shard core with a shard's mask",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, mask=make_mask(2)), x()),
        ("T = 2", "q has T = 8", "make_mask(8, 8)"),
    ),
    Row(
        "the shard core of a longer length",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, length=9), x()),
        ("length is 9", "at most P · T/P = 8", "Leave it out"),
    ),
    Row(
        "the shard core of a length of three",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, length=a((8, 8, 8))), x()),
        ("length is (8, 8, 8)", "T or (T, S)"),
    ),
    Row(
        "the shard core of a length, on a ring",
        lambda: on_ring(lambda q: ulysses_attention_shard(q, q, q, ring_axis="ring", length=7)),
        ("length is 7", "pad T", "segment_ids"),
        error=NotImplementedError,
    ),
    Row(
        "the shard core over a ring that is not there",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, ring_axis="ring"), x()),
        ("ring_axis is 'ring'", "inside a shard_map", "Pass ring_axis="),
    ),
    Row(
        "the shard core with a shard's ids, on a ring",
        lambda: on_ring(lambda q: ulysses_attention_shard(q, q, q, ring_axis="ring", segment_ids=ids(2, 2))),
        ("int32[2, 2]", "[B, T] = [2, 8]", "Gather it once"),
    ),
    Row(
        "the shard core of two lengths, on a ring",
        lambda: on_ring(lambda q: ulysses_attention_shard(q, q[:, :1], q[:, :1], ring_axis="ring")),
        ("2 tokens", "k 1", "must be equal"),
        error=NotImplementedError,
    ),
    Row("seq_to_heads outside shard_map", lambda: seq_to_heads(x(), "seq"), ("axis_name is 'seq'", "inside a shard_map")),
    Row(
        "seq_to_heads of too few heads",
        lambda: on_shards(lambda q: seq_to_heads(q, "seq"), x(N=3)),
        ("[2, 2, 3, 8]", "multiple of P = 4", "smaller degree"),
    ),
    Row(
        "heads_to_seq without heads",
        lambda: on_shards(lambda q: heads_to_seq(q, "seq"), x()[:, :, 0]),
        ("[2, 2, 8]", "must be [B, T, N/P, H]"),
    ),
    Row("sinks of other heads, on a mesh", lambda: attend_on_mesh(sinks=jnp.ones(2)), ("float32[2]", "float32[4], [N]")),
    Row(
        "the shard core with a device's own sinks",
        lambda: on_shards(lambda q: ulysses_attention_shard(q, q, q, sinks=jnp.ones(1)), x()),
        ("float32[1]", "must be float32[4], [N]"),
    ),
    Row(
        "sinks that are not dealt as the heads are",
        lambda: on_shards(lambda q: ulysses_attention_shard(*[q[None].repeat(4, 0)] * 3, sinks=jnp.ones(4))[0], x()),
        ("float32[4]", "must be float32[4, 4], [P, n]"),
    ),
    Row("a layout of other heads, on a mesh", lambda: attend_on_mesh(block_mask=blocks(2, 2, 2)), ("for 2 heads", "N = 4")),
    Row(
        "block_mask on a ring",
        lambda: attend_on_mesh(block_mask=blocks(1, 2, 2), ring_axis="data", batch_axes=()),
        ("block_mask was given with ring_axis = 'data'", "leave ring_axis out"),
        error=NotImplementedError,
    ),
]

FLAX = [
    Row("attention_fn without a mesh", lambda: attention_fn(a(3)), ("mesh is 3", "make_mesh")),
    Row(
        "attention_fn of no such option",
        lambda: attention_fn(make_mesh(), causal=True),
        ("no option 'causal'", "is_causal"),
    ),
    Row(
        "attention_fn of a missing axis",
        lambda: attention_fn(make_mesh(), seq_axis="sp"),
        ("seq_axis names 'sp'", "('data', 'seq')"),
    ),
    Row(
        "attention_fn of no such implementation",
        lambda: attention_fn(make_mesh(), implementation="flash"),
        ("'flash'", "one of"),
    ),
    Row(
        "attention_fn of a balanced order without a ring",
        lambda: attention_fn(make_mesh(), balanced=True),
        ("balanced is True", "ring_axis is None"),
    ),
    Row(
        "a boolean mask in a Flax layer",
        lambda: attention_fn(make_mesh())(x(), x(), x(), mask=a(jnp.ones((2, 1, 8, 8), bool))),
        ("mask is an array bool[2, 1, 8, 8]", "must come from make_mask"),
    ),
    Row(
        "a bias in a Flax layer",
        lambda: attention_fn(make_mesh())(x(), x(), x(), bias=x()),
        ("bias is set", "Leave it out"),
        error=NotImplementedError,
    ),
    Row(
        "dropout in a Flax layer",
        lambda: attention_fn(make_mesh())(x(), x(), x(), dropout_rate=0.1, deterministic=False),
        ("dropout_rate is set", "Set dropout_rate=0"),
        error=NotImplementedError,
    ),
    Row("a model of a whole run's config", lambda: Transformer(a(train()), rngs=nnx.Rngs(0)), ("a TrainConfig", "ModelConfig")),
    Row("a seed for rngs", lambda: Transformer(NARROW_MODEL, rngs=a(0)), ("rngs is 0", "nnx.Rngs(0)")),
    Row(
        "attention by name",
        lambda: Transformer(NARROW_MODEL, attention=a("xla"), rngs=nnx.Rngs(0)),
        ("attention is 'xla'", "attention_fn(mesh)"),
    ),
    Row("tokens of floats", lambda: apply(ids(2, 8, dtype=float)), ("tokens is an array float32[2, 8]", "integer array")),
    Row("tokens without batch", lambda: apply(ids(8)), ("int32[8]", "[B, T]")),
    Row("tokens a list", lambda: apply([[1, 2]]), ("tokens is a list of 1", "integer array")),
    Row("tokens beyond the vocabulary", lambda: apply(ids(2, 8) + 40), ("the id 40", "[0, 32)", "Raise vocab_size")),
    Row("positions of another length", lambda: apply(ids(2, 8), positions=ids(1, 7)), ("int32[1, 7]", "Leave it out")),
    Row("positions without batch", lambda: apply(ids(2, 8), positions=ids(8)), ("int32[8]", "[B, T] = [2, 8]")),
    Row("segment_ids without batch, in a model", lambda: apply(ids(2, 8), segment_ids=ids(8)), ("int32[8]", "[B, T]")),
    Row("a mask of another length, in a model", lambda: apply(ids(2, 8), mask=make_mask(7)), ("T = 7", "make_mask(8, 8)")),
    Row(
        "mask and segment_ids, in a model",
        lambda: apply(ids(2, 8), mask=make_mask(8), segment_ids=ids(2, 8)),
        ("together with segment_ids", "make_mask"),
    ),
    Row("ZeRO-4", lambda: shardings({"w": x()}, stage=4), ("stage is 4", "0, 1, 2 and 3")),
    Row("ZeRO-True", lambda: shardings({"w": x()}, stage=True), ("stage is True", "0, 1, 2 and 3")),
    Row("ZeRO without a mesh", lambda: shardings({"w": x()}, mesh=8), ("mesh is 8", "make_mesh")),
    Row("ZeRO of a number", lambda: shardings({"w": 3.0}), ("leaf w is 3.0", "must be arrays")),
    Row("ZeRO's shardings of other parameters", mismatched_hold, ("differ in their keys", "zero_shardings(params")),
    Row("keep no checkpoint", lambda: Checkpoints(Path("saves"), keep=0), ("keep is 0", "at least 1")),
    Row(
        "a checkpoint folder that is a file",
        lambda: Checkpoints(Path("saves"), keep=1),
        ("saves is a file", "name a folder"),
        setup=lambda: write("saves", ""),
    ),
]
