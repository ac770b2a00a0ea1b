"""DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all before attention, one after.

    q, k, v   [B, T/P, N, H]   my tokens, all heads
                 │  seq_to_heads
              [B, T, N/P, H]   all tokens, my heads
                 │  any attention, on whole sequences
    out       [B, T, N/P, H]
                 │  heads_to_seq
              [B, T/P, N, H]   my tokens, all heads

Heads that lie in P groups, [P, B, T/P, N/P, H], cross on their leading dim (`grouped_seq_to_heads`) without a permutation. A
model that projects into groups pays for none; arrays in the natural layout are grouped first.

Each device sends 4·T·N·H/P elements a layer (q, k, v and the output, of which (P−1)/P leave it), which stays constant when
T and P grow together. Inside, attention is that of one device: dense or sparse, any implementation.

`ulysses_attention_shard` is the core, for use inside a `shard_map` of the caller's; `ulysses_attention` is the door for
global arrays; `flax_layers.attention_fn` dresses it for Flax's attention layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ulysses_jax.attention import (
    BlockMask,
    Mask,
    Segments,
    Window,
    check_block_mask,
    check_heads,
    check_mask,
    check_options,
    check_sinks,
    dot_product_attention,
    in_words,
    make_mask,
    normalize_window,
    pair_of_ids,
    take_heads,
)
from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.config import deal_heads
from ulysses_jax.mesh import DATA, SEQ, axes_size
from ulysses_jax.ring import ring_attention_shard

__all__ = [
    "ShardAttention",
    "group_heads",
    "grouped_heads_to_seq",
    "grouped_seq_to_heads",
    "heads_to_seq",
    "seq_to_heads",
    "take_heads",
    "ulysses_attention",
    "ulysses_attention_shard",
    "ungroup_heads",
]


def seq_to_heads(x: Array, axis_name: str) -> Array:
    """[B, T/P, N, H] → [B, T, N/P, H] over the mesh axis `axis_name`; `heads_to_seq` undoes it.

    Device p ends with heads p·N/P … (p+1)·N/P − 1 of every token, tokens in mesh order.
    """
    _check_split(x, axis_name, dim=2, letters="[B, T/P, N, H]")
    return lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)


def heads_to_seq(x: Array, axis_name: str) -> Array:
    """[B, T, N/P, H] → [B, T/P, N, H] over the mesh axis `axis_name`; the inverse of `seq_to_heads`."""
    _check_split(x, axis_name, dim=1, letters="[B, T, N/P, H]")
    return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, tiled=True)


def grouped_seq_to_heads(x: Array, axis_name: str) -> Array:
    """[P, B, T/P, N/P, H] → [B, T, N/P, H]: group p of heads goes to device p; `grouped_heads_to_seq` undoes it.

    The exchange runs on the leading dim, where what a device sends to another is one piece of memory, and so is what it
    receives: for B = 1 nothing is copied beside the exchange, for B > 1 once, to bring the batch to the front.
    """
    _check_groups(x, axis_name)
    _, B, _, n, H = x.shape
    return jnp.moveaxis(_exchange(x, axis_name), 0, 1).reshape(B, -1, n, H)  # from [P, B, T/P, N/P, H], by sender


def grouped_heads_to_seq(x: Array, axis_name: str) -> Array:
    """[B, T, N/P, H] → [P, B, T/P, N/P, H]; the inverse of `grouped_seq_to_heads`."""
    _check_split(x, axis_name, dim=1, letters="[B, T, N/P, H]")
    B, T, n, H = x.shape
    P = _degree(axis_name)
    return _exchange(jnp.moveaxis(x.reshape(B, P, T // P, n, H), 1, 0), axis_name)


def _exchange(x: Array, axis_name: str) -> Array:
    """[P, …] → [P, …]: row p goes to device p. Rows are flat, so that XLA lays each out in one piece, whatever made it."""
    flat = x.reshape(x.shape[0], -1)
    return lax.all_to_all(flat, axis_name, split_axis=0, concat_axis=0, tiled=True).reshape(x.shape)


def group_heads(x: Array, groups: int) -> Array:
    """[B, T, N, H] → [G, B, T, N/G, H]; `ungroup_heads` undoes it."""
    B, T, N, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, groups, N // groups, H), 2, 0)


def ungroup_heads(x: Array) -> Array:
    """[G, B, T, n, H] → [B, T, G·n, H]; the inverse of `group_heads`."""
    G, B, T, n, H = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(B, T, G * n, H)


def ulysses_attention_shard(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: str = SEQ,
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: Window = None,
    segment_ids: Segments = None,
    logits_soft_cap: float | None = None,
    block_mask: BlockMask | None = None,
    sinks: Array | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
    length: int | tuple[int, int] | None = None,
    ring_axis: str | None = None,
    balanced: bool = False,
) -> Array:
    """Attention over a sequence of which this device holds T/P tokens; call it inside `shard_map`.

    Any N and K will do: heads are dealt as evenly as can be (`config.deal_heads`), and a device computes ⌈N/P⌉.

    Args:
      q: [B, T/P, N, H], this device's tokens in mesh order along `axis_name`, of size P. Or [P, B, T/P, n, H], heads dealt
        already (`config.deal_heads`), as a model that projects into groups has them: then k, v and the result are so too.
      k: [B, S/P, K, H].
      v: [B, S/P, K, H].
      axis_name: the mesh axis the sequence is divided over.
      segment_ids: for the whole sequence, [B, T] (or a pair with [B, S]), the same on every device of the axis; or this
        device's part, [B, T/P], which is then gathered (integers only). Hand over whole ids, or `mask`, to gather once for
        all layers.
      block_mask: for the whole sequence, with one layout, or one for each of the N heads of q here; each device takes those of
        the heads it is dealt.
      sinks: [N] float32, or [P, n] where q is [P, B, T/P, n, H], the same on every device of the axis; see
        `dot_product_attention`. Each device takes those of the heads it is dealt.
      mask: a `make_mask` result for the whole sequence.
      length: T, or (T, S), where P does not divide them and the last devices' parts are padded; pads are cut off before
        attention, and come out as zeros.
      ring_axis: a second mesh axis of size R that divides the sequence, outside of `axis_name`: each R-th is exchanged for
        heads, and keys and values travel around the ring (see `ring.py`). R·P may exceed N.
      balanced: tokens lie on the ring in the balanced order of `mesh.token_order`.
      is_causal, scale, local_window_size, logits_soft_cap, implementation, deterministic: as in `dot_product_attention`.

    Returns:
      [B, T/P, N, H], or [P, B, T/P, n, H], as q.

    Raises:
      ValueError: shapes that do not fit.
    """
    dealt_already = getattr(q, "ndim", 4) == 5
    plain = (q[0], k[0], v[0]) if dealt_already else (q, k, v)
    check_heads(*plain)
    check_ring(ring_axis, balanced=balanced, segment_ids=segment_ids, mask=mask)
    degree = _degree(axis_name)
    # Heads of keys may be whole on an axis that divides those of queries: their gradients are sums over it.
    q, k, v = (varying_like(x, q, k, v) for x in (q, k, v))
    T, S = _lengths(*plain[:2], degree, length, ring_axis)
    dealing = None if dealt_already else deal_heads(q.shape[2], k.shape[2], degree)
    if dealing is not None:
        heads = (dealing.queries, dealing.keys, dealing.keys)
        q, k, v = (group_heads(take_heads(x, dealt), degree) for x, dealt in zip((q, k, v), heads, strict=True))
    q_all, k_all, v_all = (grouped_seq_to_heads(x, axis_name)[:, :size] for x, size in ((q, T), (k, S), (v, S)))
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "local_window_size": local_window_size}
    options |= {"logits_soft_cap": logits_soft_cap, "implementation": implementation, "deterministic": deterministic}
    slots = tuple(range(degree * q.shape[3])) if dealing is None else dealing.queries
    if sinks is not None:
        given = ((degree, q.shape[3]), "[P, n]") if dealing is None else ((plain[0].shape[2],), "[N]")
        check_sinks(sinks, *given)
        options["sinks"] = jnp.asarray(sinks).reshape(-1)[_my_slots(slots, axis_name)]
    if ring_axis is None:
        if block_mask is not None:
            check_block_mask(block_mask, T, S, plain[0].shape[2] if dealing else len(slots))
            block_mask = _of_my_heads(block_mask, slots, axis_name)
        if isinstance(mask, Mask) and mask.blocks is not None:
            check_block_mask(mask.blocks, mask.query_length, mask.key_length, plain[0].shape[2] if dealing else len(slots))
            mask = dataclasses.replace(mask, blocks=_of_my_heads(mask.blocks, slots, axis_name))
        if segment_ids is not None:
            pair = zip(pair_of_ids(segment_ids), (q, k), (T, S), strict=True)
            segment_ids = tuple(_whole_ids(ids, x.shape[2], size, axis_name) for ids, x, size in pair)  # pyright: ignore[reportAssignmentType]
        out = dot_product_attention(
            q_all,
            k_all,
            v_all,
            segment_ids=segment_ids,
            block_mask=block_mask,
            mask=mask,
            **options,
        )
    else:
        if block_mask is not None:
            raise NotImplementedError(f"block_mask was given with ring_axis = {ring_axis!r}; leave ring_axis out.")
        _check_ring_ids(segment_ids, plain[0].shape[0], T * _degree(ring_axis, "ring_axis"))
        out = ring_attention_shard(
            q_all, k_all, v_all, axis_name=ring_axis, balanced=balanced, segment_ids=cast(Array | None, segment_ids), **options
        )
    out = jnp.pad(cast(Array, out), ((0, 0), (0, degree * q.shape[2] - T), (0, 0), (0, 0)))
    out = grouped_heads_to_seq(out, axis_name)
    return out if dealing is None else take_heads(ungroup_heads(out), dealing.slots)


def ulysses_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mesh: Mesh,
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: Window = None,
    segment_ids: Segments = None,
    logits_soft_cap: float | None = None,
    block_mask: BlockMask | None = None,
    sinks: Array | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
    seq_axis: str = SEQ,
    batch_axes: Sequence[str] = (DATA,),
    head_axis: str | None = None,
    ring_axis: str | None = None,
    balanced: bool = False,
) -> Array:
    """Attention on global arrays, the sequence divided over a mesh axis; inside or outside `jit`, differentiable.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H].
      v: [B, S, K, H].
      mesh: any `jax.sharding.Mesh`, its axes Auto or Explicit.
      seq_axis: the axis that divides T and S, of size P. Any T, S, N and K will do; where P does not divide them, a device
        holds ⌈T/P⌉ tokens and computes ⌈N/P⌉ heads.
      batch_axes: the axes that divide B.
      head_axis: an axis that already divides N and K (tensor parallelism), if any.
      segment_ids: [B, T], or ([B, T], [B, S]), in the sequence's own order, even where tokens are `balanced`. Each id should be
        one run of tokens; see `dot_product_attention`.
      block_mask: a `BlockMask`, one layout for all heads or one for each of the N; see `dot_product_attention`.
      sinks: [N] float32, a logit for each query head; see `dot_product_attention`.
      mask: a `make_mask` result, in place of `is_causal`, `local_window_size`, `segment_ids` and `block_mask`.
      ring_axis: a second axis that divides T, for degrees beyond the head count; see `ulysses_attention_shard`. T must be a
        multiple of what it and `seq_axis` divide it into.
      balanced: with `ring_axis`, the tokens of q, k and v lie in the order of `mesh.token_order`, which spreads causal work
        evenly; by default in their natural order.
      is_causal, scale, local_window_size, logits_soft_cap, implementation, deterministic: as in `dot_product_attention`.

    Returns:
      [B, T, N, H], laid out like q: batch over `batch_axes`, length over `seq_axis`, heads over `head_axis`. Where P does not
      divide T jax cannot divide such arrays, and each device holds all of their length outside of the attention: pad long ones.

    Raises:
      ValueError: an axis the mesh lacks, or a dim that its axes do not divide.

    Example:
      >>> mesh = make_mesh(data=2, seq=4)
      >>> out = ulysses_attention(q, k, v, mesh=mesh, is_causal=True)
    """
    batch_axes = axis_names(batch_axes)
    check_heads(q, k, v)
    check_axes(mesh, seq_axis, batch_axes, head_axis, ring_axis)
    mesh = _mesh_here(mesh, (seq_axis, *batch_axes, *(axis for axis in (head_axis, ring_axis) if axis)))
    check_ring(ring_axis, balanced=balanced, segment_ids=segment_ids, mask=mask)
    _check_sizes(q, k, mesh, seq_axis, batch_axes, head_axis, ring_axis)
    is_causal, scale, logits_soft_cap = check_options(is_causal, scale, logits_soft_cap, implementation)
    if segment_ids is not None:  # checks the shapes here, where the whole sizes are known
        ids = jax.eval_shape(lambda pair: make_mask(q.shape[1], k.shape[1], segment_ids=pair), pair_of_ids(segment_ids))
        check_mask(ids, q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    if block_mask is not None:
        check_block_mask(block_mask, q.shape[1], k.shape[1], q.shape[2])
    if sinks is not None:
        check_sinks(sinks, (q.shape[2],))
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[1], k.shape[1], q.shape[2])

    sequence = seq_axis if ring_axis is None else (ring_axis, seq_axis)
    layout = _Layout(mesh, batch_axes or None, sequence, head_axis)
    options = {
        "axis_name": seq_axis,
        "is_causal": is_causal,
        "scale": scale,
        "local_window_size": normalize_window(local_window_size),
        "logits_soft_cap": logits_soft_cap,
        "implementation": implementation,
        "deterministic": deterministic,
        "ring_axis": ring_axis,
        "balanced": balanced,
    }
    if ring_axis is None:
        options["length"] = (q.shape[1], k.shape[1])
    q, k, v = (_place(x, mesh, layout.given(x)) for x in (q, k, v))
    masks = segment_ids, block_mask, mask
    masks = jax.tree.map(lambda x, spec: _place(x, mesh, spec), masks, layout.masks(*masks))
    sinks = None if sinks is None else _place(sinks, mesh, layout.per_head)
    return _on_mesh(q, k, v, sinks, *masks, layout=layout, options=tuple(options.items()))


def _mesh_here(mesh: Mesh, axes: tuple[str, ...]) -> Mesh:
    """The mesh, or inside a caller's `shard_map` over other axes of it the one that says so."""
    context = jax.sharding.get_abstract_mesh()
    manual = {axis for axis, kind in zip(context.axis_names, context.axis_types, strict=True) if kind == AxisType.Manual}
    if not manual.intersection(mesh.axis_names):
        return mesh
    if used := [axis for axis in axes if axis in manual]:
        raise ValueError(
            f"mesh axis {used[0]!r} is divided already, by the shard_map around this call, and q is no global array. "
            "Call ulysses_attention_shard there, on this device's part."
        )
    return cast(Mesh, context)


class _Layout(NamedTuple):
    """How global arrays lie on the caller's mesh."""

    mesh: Mesh
    batch: tuple[str, ...] | None
    sequence: str | tuple[str, str]
    heads: str | None

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch, self.sequence, self.heads)

    @property
    def whole(self) -> PartitionSpec:
        return PartitionSpec(self.batch)

    @property
    def per_head(self) -> PartitionSpec:
        return PartitionSpec(self.heads)

    @property
    def devices(self) -> int:
        """How many parts a sequence has."""
        return axes_size(self.mesh, self.sequence if isinstance(self.sequence, tuple) else (self.sequence,))

    def masks(self, segment_ids: Segments, block_mask: BlockMask | None, mask: Mask | None) -> tuple:
        """The specs of these three, leaf by leaf: all follow the batch, but layouts the heads, if there is one for each."""

        def of(tree):
            return jax.tree.map(lambda _: self.whole, tree)

        def of_blocks(blocks: BlockMask | None):
            alike = blocks is None or blocks.layout.shape[0] == 1
            return jax.tree.map(lambda _: PartitionSpec() if alike else self.per_head, blocks)

        of_mask = of(mask) if mask is None else dataclasses.replace(of(mask), blocks=of_blocks(mask.blocks))
        return of(segment_ids), of_blocks(block_mask), of_mask

    def given(self, x: Array) -> PartitionSpec:
        """Where [B, T, N, H] lies before it is padded: on one part each only if they divide T."""
        return self.tokens if x.shape[1] % self.devices == 0 else PartitionSpec(self.batch, None, self.heads)


@functools.partial(jax.jit, static_argnames=("layout", "options"))
def _on_mesh(q, k, v, sinks, segment_ids, block_mask, mask, *, layout: _Layout, options: tuple) -> Array:
    """The core over global arrays, compiled so that a call outside `jit` runs as one program too."""
    parts = layout.devices
    padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % parts), (0, 0), (0, 0))) if x.shape[1] % parts else x for x in (q, k, v)]
    q_parts, k_parts, v_parts = (_place(x, layout.mesh, layout.tokens) for x in padded)

    def attend(q, k, v, sinks, segment_ids, block_mask, mask) -> Array:
        masks = {"segment_ids": segment_ids, "block_mask": block_mask, "mask": mask}
        return ulysses_attention_shard(q, k, v, sinks=sinks, **masks, **dict(options))

    masks = segment_ids, block_mask, mask
    in_specs = (layout.tokens, layout.tokens, layout.tokens, layout.per_head, *layout.masks(*masks))
    on_shards = jax.shard_map(attend, mesh=layout.mesh, in_specs=in_specs, out_specs=layout.tokens)
    out = on_shards(q_parts, k_parts, v_parts, sinks, *masks)
    if q.shape[1] % parts == 0:
        return out
    return _place(out, layout.mesh, layout.given(q))[:, : q.shape[1]]


def _place(x: Array, mesh: Mesh, spec: PartitionSpec) -> Array:
    """`x` laid out as `spec` says, whichever of jax's three ways the moment asks for."""
    sharding = NamedSharding(mesh, spec)
    if not isinstance(x, Tracer):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardAttention:
    """`ulysses_attention_shard` as a value: two with equal fields are equal, so a model that holds one is not recompiled."""

    axis_name: str = SEQ
    ring_axis: str | None = None
    balanced: bool = False
    implementation: str | None = None

    @property
    def head_groups(self) -> int:
        """P: a model projects its heads into this many groups, one for each device, [P, B, T/P, n, H]."""
        return _degree(self.axis_name)

    def __call__(self, q: Array, k: Array, v: Array, **options) -> Array:
        return ulysses_attention_shard(q, k, v, **dataclasses.asdict(self), **options)


def _degree(axis_name: str, argument: str = "axis_name") -> int:
    """P, the size of a mesh axis inside `shard_map`."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{argument} is {axis_name!r}, but the code does not run inside a shard_map over a mesh axis of that name. Pass "
            f"{argument}= with your axis inside shard_map, or call ulysses_attention on global arrays."
        ) from None


def _check_split(x: Array, axis_name: str, *, dim: int, letters: str) -> None:
    degree = _degree(axis_name)
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}; it must be {letters}.")
    if x.shape[dim] % degree:
        raise ValueError(
            f"x has shape {list(x.shape)}, {letters}; dim {dim} must be a multiple of P = {degree}, the size of mesh axis "
            f"{axis_name!r}. Pad it, or use a smaller degree."
        )


def _check_groups(x: Array, axis_name: str) -> None:
    degree = _degree(axis_name)
    if x.ndim != 5 or x.shape[0] != degree:
        raise ValueError(
            f"x has shape {list(x.shape)}; it must be [P, B, T/P, N/P, H] with P = {degree}, the size of mesh axis "
            f"{axis_name!r}. group_heads(x, {degree}) makes it from [B, T/P, N, H]."
        )


def axis_names(batch_axes: Sequence[str] | str | None) -> tuple[str, ...]:
    return (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes or ())


def check_axes(mesh: Mesh, seq_axis: str, batch_axes: tuple[str, ...], head_axis: str | None, ring_axis: str | None) -> None:
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh is {in_words(mesh)}; it must be a jax.sharding.Mesh, such as make_mesh(data=2, seq=4).")
    named = [("seq_axis", seq_axis), *(("batch_axes", axis) for axis in batch_axes)]
    named += [(name, axis) for name, axis in (("head_axis", head_axis), ("ring_axis", ring_axis)) if axis]
    for argument, axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{argument} names {axis!r}, but the mesh has axes {mesh.axis_names}. Pass {argument}= with one of those"
                + (" (or batch_axes=() for none)." if argument == "batch_axes" else ".")
            )
    used = [axis for _, axis in named]
    if len(set(used)) < len(used):
        raise ValueError(f"seq_axis, batch_axes, head_axis and ring_axis name {used}; each mesh axis may be used once.")


def _check_sizes(
    q: Array,
    k: Array,
    mesh: Mesh,
    seq_axis: str,
    batch_axes: tuple[str, ...],
    head_axis: str | None,
    ring_axis: str | None,
) -> None:
    heads, ring = ((head_axis,) if head_axis else ()), ((ring_axis, seq_axis) if ring_axis else ())
    for what, size, axes in (
        ("batch B", q.shape[0], batch_axes),
        ("query length T", q.shape[1], ring),
        ("key length S", k.shape[1], ring),
        ("query heads N", q.shape[2], heads),
        ("KV heads K", k.shape[2], heads),
    ):
        if size % (n := axes_size(mesh, axes)):
            raise ValueError(
                f"{what} = {size} is not divisible by {n}, the size of mesh axis {' × '.join(axes)}. "
                + {
                    "batch B": "Pad it, or use batch_axes=() to keep it whole.",
                    "query heads N": "Use a smaller head_axis, or leave head_axis out.",
                    "KV heads K": "Repeat them, or leave head_axis out.",
                }.get(what, "Pad it to a multiple; without ring_axis any length will do.")
            )
    if ring_axis and q.shape[1] != k.shape[1]:
        raise NotImplementedError(
            f"query length T = {q.shape[1]} and key length S = {k.shape[1]} differ; with ring_axis they must be equal. "
            "Leave ring_axis out."
        )


def check_ring(ring_axis: str | None, *, balanced: bool, segment_ids: Segments = None, mask: Mask | None = None) -> None:
    """What goes with a ring and what does not."""
    if not isinstance(balanced, bool):
        raise ValueError(f"balanced is {in_words(balanced)}; it must be True or False, known before compiling.")
    if balanced and ring_axis is None:
        raise ValueError(
            "balanced is True, but ring_axis is None; the order is a ring's. Name its axis, or leave balanced out."
        )
    if ring_axis is not None and mask is not None:
        raise NotImplementedError(
            "mask was given together with ring_axis, where each turn makes masks of its own; pass is_causal, local_window_size "
            "and segment_ids instead."
        )
    if ring_axis is not None and isinstance(segment_ids, tuple):
        raise NotImplementedError("segment_ids is a pair; with ring_axis it must be one array [B, T], of queries and keys.")


def _check_ring_ids(segment_ids: Segments, batch: int, length: int) -> None:
    if isinstance(segment_ids, Array) and segment_ids.shape != (batch, length):
        raise ValueError(
            f"segment_ids is {in_words(segment_ids)}; with ring_axis it must be whole, [B, T] = [{batch}, {length}], in the "
            "sequence's own order. Gather it once, for all layers."
        )


def _lengths(q: Array, k: Array, degree: int, length: int | tuple[int, int] | None, ring_axis: str | None) -> tuple[int, int]:
    """(T, S) of the whole sequence, or of a ring's part of it."""
    most = degree * q.shape[1], degree * k.shape[1]
    if ring_axis is not None and most[0] != most[1]:
        raise NotImplementedError(
            f"q has {q.shape[1]} tokens a device and k {k.shape[1]}; with ring_axis they must be equal. Leave ring_axis out."
        )
    if length is None:
        return most
    if ring_axis is not None:
        raise NotImplementedError(f"length is {length!r}, which a ring cannot have; pad T, and mask by segment_ids.")
    pair = length if isinstance(length, tuple) else (length, length)
    if len(pair) != 2 or not all(isinstance(n, int | np.integer) and 1 <= n <= m for n, m in zip(pair, most, strict=True)):
        raise ValueError(
            f"length is {length!r:.60}; it must be T or (T, S), ints of at most P · T/P = {most[0]} and P · S/P = {most[1]}. "
            "Leave it out where nothing is padded."
        )
    return pair


def _of_my_heads(blocks: BlockMask, slots: tuple[int, ...], axis_name: str) -> BlockMask:
    """The layouts of the heads that this device is dealt, `slots` of all devices; one layout for all heads as it is."""
    if blocks.layout.shape[0] == 1:
        return blocks
    return BlockMask(jnp.asarray(blocks.layout)[_my_slots(slots, axis_name)], blocks.block)


def _my_slots(slots: tuple[int, ...], axis_name: str) -> Array:
    """The heads that this device is dealt, of the `slots` of all devices."""
    return jnp.asarray(slots).reshape(_degree(axis_name), -1)[lax.axis_index(axis_name)]


def _whole_ids(ids: Array, local_length: int, length: int, axis_name: str) -> Array:
    """Segment ids of the whole sequence from those of this device's part; a sequence of one token is whole already."""
    if ids.ndim == 2 and ids.shape[1] == local_length != length:
        return lax.all_gather(ids, axis_name, axis=1, tiled=True)[:, :length]
    return ids
