"""The loss of a model's features and its gradient, tile by tile: the logits [T, V] of a long sequence are never whole."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ulysses_jax.attention.blocked import varying_like
from ulysses_jax.model import Transformer

__all__ = ["token_losses"]


def token_losses(model: Transformer, features: Array, labels: Array, weights: Array, *, tile: int) -> Array:
    """Σ weight · −log softmax(features · table)[label], the logits of `tile` tokens at a time.

    features [B, T, D]; labels, weights [B, T], which are not differentiated.
    """
    tokens = labels.size
    tile = min(tile, tokens)
    flat = (features.reshape(tokens, -1), labels.reshape(tokens), weights.reshape(tokens))
    tiles = [jnp.pad(x, [(0, -tokens % tile)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, tile, *x.shape[1:]) for x in flat]
    return _tiled_losses(*tiles, model.output_table())


@jax.custom_vjp
def _tiled_losses(features: Array, labels: Array, weights: Array, table: Array) -> Array:
    """features [tiles, tile, D], labels and weights [tiles, tile], table [V, D] → the sum over all tokens."""
    used = table.astype(features.dtype)

    def one(total: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + _tile_loss(used, *tile)[0], None

    return lax.scan(one, varying_like(jnp.zeros((), jnp.float32), features, weights), (features, labels, weights))[0]


def _tile_loss(table: Array, features: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
    """(summed loss, logits, log of the sum of their exponentials), float32."""
    logits = jnp.einsum("td,vd->tv", features, table, preferred_element_type=jnp.float32)
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return (weights * (norm - picked)).sum(), logits, norm


def _tiled_losses_fwd(features: Array, labels: Array, weights: Array, table: Array):
    """The gradient too, tile by tile, while the logits are there: three products of matrices, not four as with recomputation.

    The table's gradient adds up over the tiles in float32.
    """
    used = table.astype(features.dtype)

    def one(carry: tuple[Array, Array], tile: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_table = carry
        own, labels, weights = tile
        loss, logits, norm = _tile_loss(used, *tile)
        hit = lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
        d_logits = (weights[:, None] * (jnp.exp(logits - norm[:, None]) - hit)).astype(features.dtype)
        d_table += jnp.einsum("tv,td->vd", d_logits, own, preferred_element_type=jnp.float32)
        return (total + loss, d_table), d_logits @ used

    zero, zeros = (varying_like(jnp.zeros(shape, jnp.float32), features, weights, table) for shape in ((), table.shape))
    (total, d_table), d_features = lax.scan(one, (zero, zeros), (features, labels, weights))
    return total, (d_features, d_table.astype(table.dtype))


def _tiled_losses_bwd(gradients: tuple[Array, Array], d_total: Array):
    d_features, d_table = (x * d_total.astype(x.dtype) for x in gradients)
    return d_features, None, None, d_table


_tiled_losses.defvjp(_tiled_losses_fwd, _tiled_losses_bwd)
