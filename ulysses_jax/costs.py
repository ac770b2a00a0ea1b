"""What a run costs, in closed form: parameters, FLOPs, bytes on the wire, bytes in memory. Units are in the names.

FLOPs are the model's own: causal attention counts the visible half once, and nothing recomputed counts; `rates` gives two
other customs beside, so that figures of others can be compared.
"""

import dataclasses
import math

import numpy as np

from ulysses_jax.config import LayerMemory, MemoryConfig, ModelConfig, TrainConfig, deal_heads

__all__ = [
    "GPUS",
    "Gpu",
    "attention_flops",
    "device_bytes",
    "exchange_elements",
    "halo_elements",
    "host_bytes",
    "host_traffic",
    "parameter_counts",
    "peak_flops",
    "rates",
    "recomputed_flops",
    "seen_pairs",
    "step_flops",
    "step_seconds",
    "visible_pairs",
    "wire_bytes",
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
    bias = ((N + 2 * K) * H if config.projection_bias else 0) + (N if config.attention_sinks else 0)
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
        flops = 2 * tokens * D * ((0 if layer.late else N * H) + 2 * F)  # the output's projection, gate and up
        flops += 0 if layer.save == "projections" else 2 * tokens * D * (N + 2 * K) * H
        return flops + (attention_flops(pairs, N, H) if layer.save == "inputs" or not named else 0)

    group = memory.group(config.num_layers)
    total = config.num_layers / len(group) * sum(map(again, group))
    tiled = 4 * tokens * D * F * config.num_layers * sum(x.save == "all" for x in group) / len(group)
    return float(total + (tiled if memory.mlp_tile else 0))


KERNEL_HEAD_DIMS = (64, 128, 256)  # of the Pallas kernels, which pad what lies between

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


def halo_elements(kv_heads: int, head_dim: int, *, batch_size: int, reach: int, pieces: int) -> int:
    """Elements a device hands to its neighbours in the forward of one windowed layer (`ring.halo_reach`): 2·B·W·K·H a piece.

    Keys and values of the W tokens before each piece: what a device holds, or its chunks in the balanced order. K is its own KV
    heads. The backward sends their gradients back, as much again. T does not appear: it is constant however long the sequence.
    """
    return 2 * batch_size * reach * kv_heads * head_dim * pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a plan knows of a kind of GPU: memory that jax may use, and the rates at which parts of a step run."""

    name: str
    memory_bytes: float
    gemm_flops: float
    attention_flops: float
    """forward and backward together, counted as 3.5 times the forward"""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """leaving a device in an exchange"""
    host_bytes_per_s: float
    """to pinned memory or from it, each way"""


# H100: measured on 2026-11-23 (matrices 650 TFLOP/s, the kernel 575, a leading-dim exchange 310 GB/s), but for memory traffic
# (78 % of the datasheet's) and the host (PCIe 5, 80 %). H200 has the same cores and links; A100's are in the ratio of
# datasheets, and cuDNN's attention: neither is measured. 0.94 of a memory is what `runtime.reserve_memory` lets jax take.
GPUS = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=0.94 * 84978434048,
        gemm_flops=650e12,
        attention_flops=575e12,
        hbm_bytes_per_s=2.6e12,
        link_bytes_per_s=310e9,
        host_bytes_per_s=50e9,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        memory_bytes=0.94 * 150e9,
        gemm_flops=650e12,
        attention_flops=575e12,
        hbm_bytes_per_s=3.7e12,
        link_bytes_per_s=310e9,
        host_bytes_per_s=50e9,
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        memory_bytes=0.94 * 84987740160,
        gemm_flops=240e12,
        attention_flops=180e12,
        hbm_bytes_per_s=1.6e12,
        link_bytes_per_s=200e9,
        host_bytes_per_s=25e9,
    ),
}


def saved_bytes(config: TrainConfig) -> tuple[float, float]:
    """Bytes a device saves for the backward of all layers: (on the device, on the host)."""
    model, tokens, size = _as_dealt(config), _tokens(config), _itemsize(config.model)
    D, N, K, H, F = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.mlp_dim
    inputs, attention = size * D, size * N * H + 4 * N
    projections, products = size * (N + 2 * K) * H, size * (N * H + D + 2 * F)
    by_save = {"inputs": inputs, "attention": inputs + attention, "projections": inputs + attention + projections}
    by_save["products"] = by_save["projections"] + products
    by_save["all"] = by_save["products"] + size * (2 * F + 6 * D) + 4 * 2 * D  # norms in float32, and the gated products
    group = config.memory.group(model.num_layers)
    away = sum((inputs + projections if x.late else by_save[x.save]) * x.offload for x in group)
    sums = sum(inputs for x in group if x.late and x.save == "projections")  # which products are saved with
    here = sum(by_save[x.save] for x in group) + sums - away
    layers = tokens * model.num_layers / len(group)
    return here * layers, away * layers


def device_bytes(config: TrainConfig) -> dict[str, float]:
    """Bytes a device at a step's peak, by part; "working" is what a layer in its backward, or the loss, needs besides.

    The state is exact; the working set is fitted to compiled steps (`experiments/plan_check.py`): three times a layer's
    gathered weights (its own, the next one's, a gradient in float32), and the most of what attention's backward (8 arrays of
    queries' size, 5.4 where parameters wait on the host, and 6.4 of keys') and the MLP's (4 of D and 5.3 of F) have in flight.
    """
    model, memory, n, size = config.model, config.memory, config.mesh.size, _itemsize(config.model)
    tokens, counts = _tokens(config), parameter_counts(config.model)
    D, H, F, V, work = model.embed_dim, _head_dim_as_run(config), model.mlp_dim, model.vocab_size, _as_dealt(config)
    total, layer = sum(counts.values()), (counts["attention"] + counts["mlp"]) / model.num_layers
    tile = min(memory.mlp_tile or tokens, tokens)
    away = _streamed(config)
    attention = tokens * ((5.4 if away else 8) * work.num_heads + 6.4 * work.num_kv_heads) * H
    in_flight = size * max(attention, tokens * 4 * D + tile * 5.3 * F)
    loss = min(memory.loss_tile, tokens) * V * 10 + V * D * (8 + size) + 2 * tokens * D * size
    here = total - away
    fetched = 8 * layer / n if away else 0  # a layer's piece in float32 and its gradient
    update = 10 * here / n if away else 0  # of the parts that are no layers, at once
    return {
        "parameters": 4 * here / (n if config.zero_stage >= 3 else 1),
        "optimizer": 0.0 if memory.offload_optimizer else _moments(config),
        "gradients": 4 * here / (n if config.zero_stage >= 2 else 1),
        "activations": saved_bytes(config)[0],
        "working": max(3 * size * layer + fetched + in_flight, loss, update),
    }


def host_bytes(config: TrainConfig) -> dict[str, float]:
    """Bytes of the host's pinned memory for each device, by part."""
    streamed = 4 * _streamed(config) / config.mesh.size
    return {
        "activations": saved_bytes(config)[1],
        "optimizer": _moments(config) if config.memory.offload_optimizer else 0.0,
        "parameters": streamed,
        "gradients": streamed,
    }


def host_traffic(config: TrainConfig) -> dict[str, float]:
    """Bytes between a device and the host in a step, both ways together, by part.

    Activations go and come back, and so do moments and gradients; parameters in float32 are fetched by forward, backward and
    update, and written by it.
    """
    held = host_bytes(config)
    return {
        "activations": 2 * held["activations"] * config.accumulation,
        "optimizer": 2 * held["optimizer"],
        "parameters": 4 * held["parameters"],
        "gradients": 2 * held["gradients"],
    }


def _moments(config: TrainConfig) -> float:
    """Bytes of both for each device."""
    total, n = sum(parameter_counts(config.model).values()), config.mesh.size if config.zero_stage >= 1 else 1
    return 2 * total / n * (2 if config.optimizer.moment_dtype == "bfloat16" else 4)


def _streamed(config: TrainConfig) -> int:
    """Parameters that wait on the host: the layers'."""
    if not config.memory.offload_params:
        return 0
    counts = parameter_counts(config.model)
    return counts["attention"] + counts["mlp"] + counts["norms"] - config.model.embed_dim


def wire_bytes(config: TrainConfig) -> dict[str, float]:
    """Bytes that leave a device in a step: "exchange" for heads and back, "weights" gathered, "gradients" scattered.

    Gradients in float32, as NCCL adds them up; by copies (`zero.Unshard`) they cross in the compute type.
    """
    model, memory, mesh, n = config.model, config.memory, config.mesh, config.mesh.size
    size, P = _itemsize(model), config.mesh.seq
    forward = exchange_elements(
        model, batch_size=config.data.batch_size // mesh.data, seq_len=config.data.seq_len // mesh.ring, degree=P
    )
    dealing = deal_heads(model.num_heads, model.num_kv_heads, P)
    back = forward * len(dealing.queries) / (2 * (len(dealing.queries) + len(dealing.keys)))
    again = {"inputs": forward, "attention": forward, "projections": back, "products": 0, "all": 0}
    group = memory.group(model.num_layers)
    exchanged = sum(2 * forward + again[x.save] for x in group) * model.num_layers / len(group)
    total, passes = sum(parameter_counts(model).values()), config.accumulation
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * passes}[config.zero_stage] * size * total * (n - 1) / n
    scatters = 4 * total * (n - 1) / n * (2 if config.zero_stage < 2 else 1) * (passes if config.zero_stage >= 2 else 1)
    return {"exchange": size * exchanged * (P - 1) / P, "weights": gathers, "gradients": scatters}


def step_seconds(config: TrainConfig, gpu: Gpu) -> dict[str, float]:
    """What a step is predicted to take, in s a device, by part; "step" is the whole.

    "matrices", "attention", "memory" (all that is no product) and "optimizer" (with its host traffic) come one after the other;
    so does "stream" (parameters to the layers and gradients from them: XLA starts many of these copies where they are needed).
    "wire" and "host" (activations) travel while others compute, in forward and in backward; but those of a fraction of layers
    do not, which XLA also fetches late. Heads are counted as they are dealt: one that is computed twice takes time twice.
    """
    model, memory, n, size = config.model, config.memory, config.mesh.size, _itemsize(config.model)
    sizes = {"batch_size": config.data.batch_size, "seq_len": config.data.seq_len}
    pairs = config.data.batch_size * visible_pairs(
        config.data.seq_len, is_causal=model.is_causal, window=model.local_window_size
    )
    work = _as_dealt(config)
    kernel = model.num_layers * attention_flops(pairs, work.num_heads, model.head_dim)
    group, named = memory.group(model.num_layers), config.implementation != "cudnn"
    share = sum(x.save == "inputs" or (not named and x.save != "all") for x in group) / len(group)  # whose kernel runs again
    again = recomputed_flops(work, memory, **sizes, named=named) - share * kernel
    matrices = (step_flops(work, **sizes, pairs=0) + again) / n / gpu.gemm_flops
    kernel *= _head_dim_as_run(config) / model.head_dim
    attention = (3.5 + share) * kernel / n / gpu.attention_flops
    tokens = config.data.batch_size * config.data.seq_len / n
    passes = size * tokens * (60 * model.embed_dim + 30 * model.mlp_dim) * model.num_layers
    total = sum(parameter_counts(model).values()) / (n if config.zero_stage else 1)
    update = 32 * total / gpu.hbm_bytes_per_s
    crossing = host_traffic(config)
    layers = crossing["parameters"] / 4 / gpu.host_bytes_per_s
    # Fetched, then written: a layer's update waits for moments both ways, parameters both ways, gradients one.
    update += crossing["optimizer"] / gpu.host_bytes_per_s + 3 * layers
    parts = {"matrices": matrices, "attention": attention, "memory": passes / gpu.hbm_bytes_per_s, "optimizer": update}
    wire = sum(wire_bytes(config).values()) / gpu.link_bytes_per_s
    sent = saved_bytes(config)[1] * config.accumulation / gpu.host_bytes_per_s
    compute = sum(parts.values()) - update
    forward = step_flops(work, **sizes, pairs=0) / 3 / n / gpu.gemm_flops + kernel / n / gpu.attention_flops
    forward += parts["memory"] / 4
    hidden = max(forward, sent) + max(compute - forward, sent)
    step = max(hidden if len(group) == 1 else compute + 2 * sent, wire) + update + 3 * layers
    return parts | {"stream": 3 * layers, "wire": wire, "host": 2 * sent, "step": step}


def _head_dim_as_run(config: TrainConfig) -> int:
    """The size of heads in attention: the Pallas kernels pad them to the next that they have."""
    size = config.model.head_dim
    return next((n for n in KERNEL_HEAD_DIMS if n >= size), size) if config.implementation == "pallas" else size


def _as_dealt(config: TrainConfig) -> ModelConfig:
    """The model with the heads that its devices project and attend with, copies too: ⌈N/P⌉·P queries (`deal_heads`)."""
    model = config.model
    dealing = deal_heads(model.num_heads, model.num_kv_heads, config.mesh.seq)
    return dataclasses.replace(model, num_heads=len(dealing.queries), num_kv_heads=len(dealing.keys))


def _tokens(config: TrainConfig) -> float:
    """Tokens of a device and micro-batch."""
    return config.data.batch_size * config.data.seq_len / config.mesh.size / config.accumulation


def _itemsize(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4
