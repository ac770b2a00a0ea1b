"""What a step keeps for its backward, computes again, cuts into tiles, or sends to the host: `config.MemoryConfig`, done.

The model marks by name what is worth keeping: "layer_input", "attention_in" (queries, keys and values as the kernel takes
them), "attention_out" and "attention_lse" (inside the attention itself, "pallas" and "xla", and the ring; cuDNN's kernel is run
again), "attention_exchanged", "attention_sum" and "mlp_products". A policy keeps some of these names, on the device or in the
host's pinned memory. The scan over layers has one body, so a fraction of layers is a fraction of a group of layers, the body.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.config import LayerMemory, MemoryConfig, Save

__all__ = ["HOST", "NAMES", "map_tiles", "rematerialize", "scan_layers", "stream_update", "to_host"]

type Tree = Any
type Layer = Callable[[Array, Tree], Array]

HOST = "pinned_host"
ATTENTION = ("attention_out", "attention_lse")
NAMES: dict[Save, tuple[str, ...]] = {
    "inputs": (),
    "attention": ATTENTION,
    "projections": (*ATTENTION, "attention_in"),
    "products": (*ATTENTION, "attention_in", "attention_exchanged", "attention_sum", "mlp_products"),
}
"""what each way of saving keeps beside a layer's input"""


def scan_layers(layer: Layer, x: Array, stored: Tree, memory: MemoryConfig) -> Array:
    """`layer(x, parameters)` for each of the layers stacked in `stored`, one after the other, its backward as `memory` says.

    Args:
      layer: (activations, one layer's parameters) → activations.
      x: what the first layer takes.
      stored: parameters, each with a leading dim of layers.
      memory: the policy; a fraction of layers makes the body of the scan a group of layers.
    """
    layers = jax.tree.leaves(stored)[0].shape[0]
    policies = memory.group(layers)
    size = len(policies)
    grouped = jax.tree.map(lambda a: a.reshape(layers // size, size, *a.shape[1:]), stored) if size > 1 else stored

    def member(i: int) -> Layer:
        return lambda x, own: layer(x, jax.tree.map(lambda a: a[i], own) if size > 1 else own)

    # A layer is taken from its group inside of what is computed again: outside, every layer would be saved a second time.
    bodies = [rematerialize(member(i), policy) for i, policy in enumerate(policies)]

    def group(x: Array, own: Tree) -> tuple[Array, None]:
        for body in bodies:
            x = body(x, own)
        return x, None

    return lax.scan(group, x, grouped)[0]


def rematerialize(layer: Layer, policy: LayerMemory) -> Layer:
    """`layer`, its backward recomputing what `policy` does not keep."""
    if policy.save == "all":
        return layer
    keep, policies = list(NAMES[policy.save]), jax.checkpoint_policies
    if policy.offload:
        away = ["layer_input", "attention_in"] if policy.late else ["layer_input", *keep]
        here = {"attention_sum", *keep}.difference(away) if policy.late else {"layer_input_here"}
        # The input is marked inside the body: to mark the scan's own carry would silently send nothing (jax#23869).
        what = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(here),
            names_which_can_be_offloaded=away,
            offload_src="device",
            offload_dst=HOST,
        )
    else:
        what = policies.save_only_these_names(*keep)

    def marked(x: Array, stored: Tree) -> Array:
        cut = round(policy.offload * x.shape[1])
        if not 0 < cut < x.shape[1]:
            return layer(checkpoint_name(x, "layer_input"), stored)
        away, here = checkpoint_name(x[:, :cut], "layer_input"), checkpoint_name(x[:, cut:], "layer_input_here")
        return layer(jnp.concatenate([away, here], axis=1), stored)

    return jax.checkpoint(marked, policy=what, prevent_cse=False)  # a scan's body is one region already


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def map_tiles(function: Callable[[Tree, Array], Array], weights: Tree, x: Array, tile: int) -> Array:
    """`function(weights, x)`, which treats each token alone, on `tile` tokens at a time.

    x [B, T, D] → [B, T, …]. The backward computes each tile's intermediates again, and adds up the weights' gradients over the
    tiles in float32 (in their own type the sum would lose what the tiles have in common, a bit for every doubling).
    """
    return _from_tiles(lax.map(functools.partial(function, weights), _to_tiles(x, tile)), x)


def _tiles_fwd(function, weights: Tree, x: Array, tile: int):
    return map_tiles(function, weights, x, tile), (weights, x)


def _tiles_bwd(function, tile: int, saved: tuple[Tree, Array], d_y: Array) -> tuple[Tree, Array]:
    weights, x = saved

    def one(total: Tree, xs: tuple[Array, Array]) -> tuple[Tree, Array]:
        d_weights, d_x = jax.vjp(function, weights, xs[0])[1](xs[1])
        return jax.tree.map(lambda t, d: t + d.astype(t.dtype), total, d_weights), d_x

    zeros = jax.tree.map(lambda w: varying_like(jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), w, x), weights)
    total, d_x = lax.scan(one, zeros, (_to_tiles(x, tile), _to_tiles(d_y, tile)))
    return jax.tree.map(lambda t, w: t.astype(w.dtype), total, weights), _from_tiles(d_x, x)


map_tiles.defvjp(_tiles_fwd, _tiles_bwd)


def _to_tiles(x: Array, tile: int) -> Array:
    """[B, T, D] → [tiles, tile, D], padded with zeros, whose gradients are zero."""
    flat = x.reshape(-1, x.shape[-1])
    return jnp.pad(flat, ((0, -len(flat) % tile), (0, 0))).reshape(-1, tile, x.shape[-1])


def _from_tiles(tiles: Array, like: Array) -> Array:
    """[tiles, tile, D] → [B, T, D], the inverse of `_to_tiles`."""
    tokens = like.shape[0] * like.shape[1]
    return tiles.reshape(-1, tiles.shape[-1])[:tokens].reshape(*like.shape[:2], tiles.shape[-1])


def stream_update(
    optimizer: optax.GradientTransformation, grads: Tree, state: Tree, params: Tree, *, scale: Array, stacked: str = "layers"
) -> tuple[Tree, Tree]:
    """`optimizer`'s update with its state on the host: (new parameters, new state), in place, a layer at a time.

    The device holds one layer's state, and that of the parts that are no layers. The optimizer has to treat each element
    alone, given the step (AdamW, Lion, SGD); a norm over all of them has to be in `scale`.

    Args:
      grads: shaped like `params`, on the device or the host.
      state: the optimizer's, its arrays on the host, its scalars on the device.
      params: on the device or the host, where they stay; under the key `stacked`, parameters with a leading dim of layers.
      scale: of the gradients.
    """

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        fetched, before = _fetch(params), _fetch(state)
        updates, after = optimizer.update(jax.tree.map(lambda g: g * scale, _fetch(grads)), before, fetched)
        new = optax.apply_updates(fetched, updates)
        return jax.tree.map(lambda x, was: to_host(x) if _on_host(was) else x, new, params), to_host(after)

    state = to_host(state)  # where it is: said for devices that do not know their memories
    (g, s, p), others = ([_part(x, stacked, inside) for x in (grads, state, params)] for inside in (True, False))

    def one(carry: tuple[Tree, Tree], i: Array) -> tuple[tuple[Tree, Tree], None]:
        def take(x: Array) -> Array:
            return x if x.ndim == 0 else lax.dynamic_index_in_dim(x, i, keepdims=False)

        def put(x: Array, new: Array) -> Array:
            return x if x.ndim == 0 else lax.dynamic_update_index_in_dim(x, new, i, 0)

        new = update(*(jax.tree.map(take, x) for x in (g, carry[1], carry[0])))
        return jax.tree.map(put, carry, new), None

    (p, s), _ = lax.scan(one, (p, s), jnp.arange(jax.tree.leaves(p)[0].shape[0]))
    other_params, other_state = update(*others)
    return _join(p, other_params, stacked), _join(s, other_state, stacked)


def to_host(tree: Tree) -> Tree:
    """Arrays to the host's memory, or said to be there; scalars stay on the device."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jax.device_put(x, jax.memory.Space.Host), tree)


def _fetch(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree)


def _on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _part(tree: Tree, stacked: str, inside: bool) -> Tree:
    """Each dict of parameters in a tree with only what is under the key `stacked`, or without it."""
    return jax.tree.map(
        lambda x: {k: v for k, v in x.items() if (k == stacked) == inside} if _holds(x, stacked) else x,
        tree,
        is_leaf=lambda x: _holds(x, stacked),
    )


def _join(layers: Tree, others: Tree, stacked: str) -> Tree:
    """The inverse of `_part`; scalars are those of `others`, which have been updated once."""
    return jax.tree.map(
        lambda x, y: {**x, **y} if _holds(x, stacked) else y, layers, others, is_leaf=lambda x: _holds(x, stacked)
    )


def _holds(x: Any, key: str) -> bool:
    return isinstance(x, dict) and key in x
