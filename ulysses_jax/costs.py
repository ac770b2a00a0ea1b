"""What a run costs, in closed form: parameters, FLOPs, bytes on the wire, bytes in memory. Units are in the names.

FLOPs are the model's own: causal attention counts the visible half once, and nothing recomputed counts.
"""

import math

from ulysses_jax.config import ModelConfig, deal_heads

__all__ = [
    "attention_flops",
    "exchange_elements",
    "halo_elements",
    "parameter_counts",
    "step_flops",
    "visible_pairs",
]


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: "embedding", "attention", "mlp", "norms", "head" (0 where tied)."""
    D, N, K, H, F, L = (
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.mlp_dim,
        config.num_layers,
    )
    bias = (N + 2 * K) * H if config.projection_bias else 0
    return {
        "embedding": config.vocab_size * D,
        "attention": L * (2 * D * N * H + 2 * D * K * H + bias),
        "mlp": L * 3 * D * F,
        "norms": L * (2 * D + (2 * H if config.qk_norm else 0)) + D,
        "head": 0 if config.tie_embeddings else config.vocab_size * D,
    }


def visible_pairs(length: int, *, is_causal: bool, window: int | None = None) -> int:
    """Pairs (query, key) of one sequence that attention computes: T² in full, about T²/2 if causal."""
    T = length
    reach = T - 1 if window is None else min(window, T - 1)
    one_side = T * reach - reach * (reach + 1) // 2  # Σ_t min(t, reach)
    return T + one_side * (1 if is_causal else 2)


def attention_flops(pairs: int, heads: int, head_dim: int) -> int:
    """FLOPs of the forward's two products: 4·pairs·N·H. A convention counts causal pairs as T²/2, one row more exact here."""
    return 4 * pairs * heads * head_dim


def step_flops(config: ModelConfig, *, batch_size: int, seq_len: int) -> float:
    """Model FLOPs of one training step, forward and backward: 6 a parameter and token that is multiplied, and attention.

    Document masks make attention cheaper than this; the figure is that of whole sequences.
    """
    counts = parameter_counts(config)
    multiplied = counts["attention"] + counts["mlp"] + config.vocab_size * config.embed_dim
    pairs = visible_pairs(seq_len, is_causal=config.is_causal, window=config.local_window_size)
    attention = config.num_layers * attention_flops(pairs, config.num_heads, config.head_dim)
    return float(batch_size * (6 * multiplied * seq_len + 3 * attention))


def exchange_elements(config: ModelConfig, *, batch_size: int, seq_len: int, degree: int) -> int:
    """Elements a device hands to the all-to-alls of one layer's forward; (P−1)/P of them leave it.

    2·B·T·H·(n + m) for the n query heads and m KV heads that each device is dealt (`deal_heads`): queries and output, keys
    and values. Where P divides N and K that is 2·B·T·H·(N + K)/P, with K = N the paper's 4·T·D/P, constant when T and P grow
    together; where K < P, m is 1 and its part grows with T. The backward exchanges as much again.
    """
    if degree == 1:
        return 0
    dealing = deal_heads(config.num_heads, config.num_kv_heads, degree)
    slots = len(dealing.queries) + len(dealing.keys)  # of all devices
    return 2 * batch_size * seq_len * config.head_dim * slots // degree


def divided_bytes(leaf_sizes: dict[str, tuple[int, bool]], devices: int, itemsize: int = 4) -> int:
    """Bytes a device for leaves of `name → (size, whether it is divided)`."""
    return sum(itemsize * (math.ceil(size / devices) if divided else size) for size, divided in leaf_sizes.values())


def halo_elements(kv_heads: int, head_dim: int, *, batch_size: int, reach: int, pieces: int) -> int:
    """Elements a device hands to its neighbours in the forward of one windowed layer (`ring.halo_reach`): 2·B·W·K·H a piece.

    Keys and values of the W tokens before each piece, one piece a device or two in the balanced order; K is the device's own KV
    heads. The backward sends their gradients back, as much again. T does not appear: it is constant however long the sequence.
    """
    return 2 * batch_size * reach * kv_heads * head_dim * pieces
