"""What a run costs, in closed form: parameters, FLOPs, bytes on the wire, bytes in memory. Units are in the names.

FLOPs are the model's own: causal attention counts the visible half once, and nothing recomputed counts; `rates` gives two
other customs beside, so that figures of others can be compared.
"""

import math

import numpy as np

from ulysses_jax.config import LayerMemory, MemoryConfig, ModelConfig, TrainConfig, deal_heads

__all__ = [
    "attention_flops",
    "exchange_elements",
    "parameter_counts",
    "peak_flops",
    "rates",
    "recomputed_flops",
    "seen_pairs",
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


def seen_pairs(positions: np.ndarray, *, is_causal: bool, window: int | None = None) -> int:
    """Pairs (query, key) that attention needs on packed documents, whose positions [B, T] begin again at 0 in each.

    A token at position p sees min(p, window) tokens before it, and itself; both ways twice as many of others.
    """
    before = int((positions if window is None else np.minimum(positions, window)).sum(dtype=np.int64))
    return positions.size + before * (1 if is_causal else 2)


def step_flops(config: ModelConfig, *, batch_size: int, seq_len: int, pairs: int | None = None) -> float:
    """Model FLOPs of one training step, forward and backward: 6 a parameter and token that is multiplied, and attention.

    Args:
      pairs: what attention needs of all sequences together (`seen_pairs`); whole sequences by default.
    """
    counts = parameter_counts(config)
    multiplied = counts["attention"] + counts["mlp"] + config.vocab_size * config.embed_dim
    if pairs is None:
        pairs = batch_size * visible_pairs(seq_len, is_causal=config.is_causal, window=config.local_window_size)
    attention = config.num_layers * attention_flops(pairs, config.num_heads, config.head_dim)
    return float(6 * multiplied * batch_size * seq_len + 3 * attention)


def recomputed_flops(config: ModelConfig, memory: MemoryConfig, *, batch_size: int, seq_len: int, named: bool = True) -> float:
    """FLOPs that a step's backward computes a second time, as `memory` says.

    Args:
      named: whether the attention's output can be kept by name; cuDNN's cannot.
    """
    D, N, K, H, F = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim
    tokens = batch_size * seq_len
    pairs = batch_size * visible_pairs(seq_len, is_causal=config.is_causal, window=config.local_window_size)

    def again(layer: LayerMemory) -> float:
        if layer.save in ("products", "all"):
            return 0 if named or layer.save == "all" else attention_flops(pairs, N, H)
        flops = 2 * tokens * D * (N * H + 2 * F)  # the output's projection, gate and up
        flops += 0 if layer.save == "projections" else 2 * tokens * D * (N + 2 * K) * H
        return flops + (attention_flops(pairs, N, H) if layer.save == "inputs" or not named else 0)

    group = memory.group(config.num_layers)
    total = config.num_layers / len(group) * sum(map(again, group))
    tiled = 4 * tokens * D * F * config.num_layers * sum(x.save == "all" for x in group) / len(group)
    return float(total + (tiled if memory.mlp_tile else 0))


# Dense bfloat16 FLOP/s of vendors' datasheets, by a part of `device_kind`; the first that fits counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by its `device_kind`; None where it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def rates(config: TrainConfig, seconds: float, device_kind: str, *, pairs: int | None = None) -> dict[str, float]:
    """What a step of so many seconds comes to, a device: tokens/s, TFLOP/s, and utilisations of its peak by three customs.

    "utilization" counts the model's FLOPs, of `pairs` only where documents are packed; "utilization_full_square" counts all
    T² pairs, visible or not, as many do; "utilization_with_recompute" counts what the device was made to do.

    Raises:
      ValueError: more than the device's peak, which says that the timing or the parallelism is at fault.
    """
    data, model, n = config.data, config.model, config.mesh.size
    sizes = {"batch_size": data.batch_size, "seq_len": data.seq_len}
    flops = step_flops(model, **sizes, pairs=pairs)
    found = {
        "tokens_per_s": data.batch_size * data.seq_len / seconds,
        "tokens_per_s_per_device": data.batch_size * data.seq_len / seconds / n,
        "model_tflops_per_device": flops / seconds / n / 1e12,
    }
    peak = peak_flops(device_kind)
    if peak is None:
        return found
    if flops / seconds / n > peak:
        raise ValueError(
            f"a step took {seconds:.3g} s, which is {flops / seconds / n / 1e12:,.0f} TFLOP/s a device, but the peak of "
            f"{device_kind} is {peak / 1e12:,.0f}; work is missing from the step or from its timing. Run ulysses verify."
        )
    square = step_flops(model, **sizes, pairs=data.batch_size * data.seq_len**2)
    again = recomputed_flops(model, config.memory, **sizes, named=config.implementation != "cudnn")
    customs = {"utilization": flops, "utilization_full_square": square, "utilization_with_recompute": flops + again}
    return found | {name: value / seconds / n / peak for name, value in customs.items()}


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
