"""The exchange against the link, and an attention layer against one without an exchange, on the devices present.

    python -m experiments.bench_exchange --out experiments/results
    python -m experiments.bench_exchange --tiny --out /tmp/results       # on CPU devices, to see that it runs

Any heads and lengths are compared with one device first. Then three questions, each answered beside its peer in the same run:
- What do the four crossings of a layer (Q, K, V, output) cost on the model's path, permutations included? The projections with
  their crossings less the projections alone, and the crossings of grouped heads alone, against `lax.all_to_all` on the leading
  dim of as many bytes: by the copy engines, as a training step exchanges, and by NCCL.
- What does a layer on P devices cost over the same layer on one device with 1/P of the heads and no exchange? And in chunks?
- A ring of P beside Ulysses of P.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import record
from ulysses_jax.attention import dot_product_attention
from ulysses_jax.config import MemoryConfig, ModelConfig
from ulysses_jax.mesh import SEQ, make_mesh, token_spec
from ulysses_jax.model import Attention, _contract, _project
from ulysses_jax.train import compiler_options
from ulysses_jax.ulysses import ShardAttention, grouped_heads_to_seq, grouped_seq_to_heads, ulysses_attention

LENGTHS = (65_536, 131_072, 262_144, 524_288)
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True}
COPIES = "xla_gpu_use_memcpy_local_p2p"  # exchange by copy engines, as a training step does, or by NCCL's kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to time."""

    seq: int = 2
    """P"""
    heads: int = 32
    kv_heads: int = 32
    implementation: str = "cudnn"
    lengths: tuple[int, ...] = LENGTHS
    """T of the crossings; layers are timed at the first two, the ring at the first"""
    chunks: int = 4
    tiny: bool = False
    """small sizes that a CPU can do"""
    name: str = "exchange"
    """of the result file"""
    out: Path = Path("experiments/results")

    @property
    def sizes(self) -> tuple[int, int]:
        """D and H."""
        return (64, 8) if self.tiny else (self.heads * 128, 128)


def seconds(compiled: Callable, *arguments: Any, runs: int = 10) -> float:
    """The median of runs after two, each waited for."""
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def options_on(mesh: Mesh, **more: bool) -> dict[str, Any]:
    """The flags that matter on GPUs, with those of a training step."""
    options = compiler_options(MemoryConfig(), mesh)
    return {} if options is None else OPTIONS | options | more


def compile_on(
    mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any, *arguments: Any, **flags: bool
) -> jax.stages.Compiled:
    """A function of one device's part, compiled for the mesh."""
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    return mapped.lower(*arguments).compile(compiler_options=options_on(mesh, **flags))


def normal(mesh: Mesh, spec: PartitionSpec, *shape: int, scale: float = 1.0) -> Array:
    """Random bfloat16 numbers, made where they lie."""
    make = lambda: (scale * jax.random.normal(jax.random.key(0), shape)).astype(jnp.bfloat16)  # noqa: E731
    return jax.jit(make, out_shardings=NamedSharding(mesh, spec))()


def time_crossings(bench: Bench, mesh: Mesh, T: int) -> list[dict]:
    """Rows on the four crossings of one layer, forward and backward."""
    (D, H), P = bench.sizes, bench.seq
    n, m = bench.heads // P, bench.kv_heads // P
    tokens, whole, grouped = PartitionSpec(None, SEQ), PartitionSpec(), PartitionSpec(None, None, SEQ)
    x = normal(mesh, tokens, 1, T, D)
    w_in = tuple(normal(mesh, whole, D, P, heads, H, scale=D**-0.5) for heads in (n, m, m))
    w_out = normal(mesh, whole, P, n, H, D, scale=D**-0.5)

    def path(x: Array, w_in: tuple, w_out: Array, *, crosses: bool) -> tuple[Array, Array, Array]:
        """Projections into groups, there, the values times what stands for attention, back, and out."""
        _, (q, k, v) = _project(x, w_in)
        if crosses:
            q, k, v = (grouped_seq_to_heads(y, SEQ) for y in (q, k, v))
            q, k, v = lax.optimization_barrier((q, k, v))
            z = grouped_heads_to_seq(q, SEQ)
        else:
            z, k, v = lax.optimization_barrier((q, k, v))
        return _contract(jnp.zeros_like(x), z, w_out), k, v

    def both(crosses: bool, backward: bool) -> jax.stages.Compiled:
        def run(x, w_in, w_out):
            if not backward:
                return path(x, w_in, w_out, crosses=crosses)
            out, back = jax.vjp(lambda *a: path(*a, crosses=crosses), x, w_in, w_out)
            return back(out)

        third = PartitionSpec(None, None, SEQ)  # of k and v: heads where they crossed, else tokens
        out_specs = (tokens, whole, whole) if backward else (tokens, third, third)
        return compile_on(mesh, run, (tokens, whole, whole), out_specs, x, w_in, w_out)

    rows, P_bytes = [], 2 * 2 * T * H * (n + m)  # a device's, of all four crossings
    sent = P_bytes * (P - 1) / P
    alone, nccl = time_leading(bench, mesh, T)
    case = f"T={T} N={bench.heads} K={bench.kv_heads} H={H} P={P}"
    for backward in (False, True):
        times = {crosses: seconds(both(crosses, backward), x, w_in, w_out) for crosses in (True, False)}
        cost = times[True] - times[False]
        which, peer = ("forward+backward", 2 * alone) if backward else ("forward", alone)
        rows.append(record.row(f"{case} {which}", "projections and crossings less projections", "s", cost, leading=peer))
        rows.append(record.row(f"{case} {which}", "projections alone", "s", times[False]))
        rows.append(record.row(f"{case} {which}", "bandwidth of it over the leading dim's", "1", peer / max(cost, 1e-9)))
    y = [normal(mesh, grouped, P, 1, T, heads, H) for heads in (n, m, m)]

    def crossings(q, k, v):
        q, k, v = (grouped_seq_to_heads(y, SEQ) for y in (q, k, v))
        return grouped_heads_to_seq(lax.optimization_barrier(q), SEQ), k, v

    out_specs = (grouped, PartitionSpec(None, None, SEQ), PartitionSpec(None, None, SEQ))
    cost = seconds(compile_on(mesh, crossings, grouped, out_specs, *y), *y)
    peers = {"leading": alone, "leading_by_nccl": nccl}
    rows.append(record.row(case, "four crossings of grouped heads", "s", cost, **peers))
    rates = {name: sent / value / 1e9 for name, value in peers.items()}
    rows.append(record.row(case, "four crossings, leaving a device", "GB/s", sent / cost / 1e9, **rates))
    return rows


def time_leading(bench: Bench, mesh: Mesh, T: int) -> tuple[float, float]:
    """Seconds of `lax.all_to_all` on the leading dim for as many bytes as a layer's four crossings: as ours cross, and by NCCL.

    All four are one program, as ours are: apart, each would pay for a dispatch of its own. Both ways give the same bits.
    """
    (_, H), P, there = bench.sizes, bench.seq, PartitionSpec(SEQ)
    sizes = [T // P * heads // P * H for heads in (bench.heads, bench.kv_heads, bench.kv_heads)]
    q, k, v = (normal(mesh, there, P * P, size) for size in sizes)

    def crossings(q, k, v):
        q, k, v = (lax.all_to_all(x, SEQ, split_axis=0, concat_axis=0, tiled=True) for x in (q, k, v))
        return lax.all_to_all(lax.optimization_barrier(q), SEQ, split_axis=0, concat_axis=0, tiled=True), k, v

    programs = [compile_on(mesh, crossings, there, there, q, k, v, **{COPIES: by_copies}) for by_copies in (True, False)]
    same = jax.jit(lambda a, b: jnp.array([(x == y).all() for x, y in zip(a, b, strict=True)]).all())
    if not same(*(program(q, k, v) for program in programs)):
        raise RuntimeError(f"at T={T} copy engines and NCCL exchange differently")
    copies, nccl = (seconds(program, q, k, v) for program in programs)
    return copies, nccl


def layer(
    bench: Bench, mesh: Mesh, T: int, *, heads: int, kv_heads: int, chunks: int = 1, recomputes: bool = True
) -> tuple[float, int]:
    """Seconds and temporary bytes of an attention layer, forward and backward."""
    D, H = bench.sizes
    config = ModelConfig(
        vocab_size=64,
        num_layers=1,
        embed_dim=D,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=H,
        mlp_dim=64,
        head_chunks=chunks,
    )
    attention = ShardAttention(implementation=bench.implementation)
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(config, attention, (), rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda s: normal(mesh, PartitionSpec(), *s.shape, scale=D**-0.5), state)
    tokens = token_spec(mesh)
    x = normal(mesh, tokens, 1, T, D)
    positions = jax.device_put(np.arange(T, dtype=np.float32)[None], NamedSharding(mesh, tokens))
    wavelengths = 10_000 ** (np.arange(0, H, 2, dtype=np.float32) / H)

    def attend(params, x, positions):
        return nnx.merge(graph, params)(x, positions[..., None] / wavelengths, None, None)

    if chunks == 1 and recomputes:  # chunks recompute themselves
        attend = jax.checkpoint(attend)

    def run(params, x, positions):
        y, back = jax.vjp(lambda params, x: attend(params, x, positions), params, x)
        return y, back(y)

    specs = (PartitionSpec(), tokens, tokens), (tokens, (PartitionSpec(), tokens))
    compiled = compile_on(mesh, run, *specs, params, x, positions)
    memory = compiled.memory_analysis()
    assert memory is not None
    return seconds(compiled, params, x, positions, runs=5), memory.temp_size_in_bytes


def time_layers(bench: Bench, mesh: Mesh, T: int) -> list[dict]:
    """Rows on a layer: on P devices, on one with 1/P of heads and no exchange, and in chunks."""
    P, alone = bench.seq, make_mesh(devices=list(mesh.devices.flat[:1]))
    heads: Any = {"heads": bench.heads, "kv_heads": bench.kv_heads}
    # The same products and attention: T tokens by 1/P of the heads are T/P tokens by all of them.
    fewer: Any = {name: count // P for name, count in heads.items()}
    plain, _ = layer(bench, mesh, T, recomputes=False, **heads)
    one, _ = layer(bench, alone, T, recomputes=False, **fewer)
    many, many_bytes = layer(bench, mesh, T, **heads)
    chunked, chunked_bytes = layer(bench, mesh, T, **heads, chunks=bench.chunks)
    plain_case = f"layer T={T} N={bench.heads} K={bench.kv_heads} P={P} {bench.implementation} forward+backward"
    case = f"{plain_case}, recomputed"
    return [
        record.row(plain_case, "time", "s", plain, one_device_1_P_of_the_heads=one),
        record.row(plain_case, "time over that of one device without an exchange", "1", plain / one),
        record.row(f"{case}, {bench.chunks} chunks", "time", "s", chunked, unchunked=many),
        record.row(f"{case}, {bench.chunks} chunks", "temporaries", "bytes a device", chunked_bytes, unchunked=many_bytes),
        record.row(f"{case}, {bench.chunks} chunks", "time over unchunked", "1", chunked / many),
        record.row(f"{case}, {bench.chunks} chunks", "temporaries over unchunked", "1", chunked_bytes / many_bytes),
    ]


def time_ring(bench: Bench, mesh: Mesh, T: int) -> list[dict]:
    """A row on causal attention over a ring of P beside Ulysses of P, forward and backward."""
    (_, H), P = bench.sizes, bench.seq
    ring = make_mesh(ring=P, devices=list(mesh.devices.flat))
    implementation = "xla" if bench.tiny else "pallas"  # cuDNN cannot attend to pieces of a sequence
    figures = {}
    for name, where, more in (("ulysses", mesh, {}), ("ring", ring, {"ring_axis": "ring", "balanced": True})):
        q, k, v = (normal(where, token_spec(where), 1, T, h, H) for h in (bench.heads, bench.kv_heads, bench.kv_heads))
        options = {"mesh": where, "is_causal": True, "implementation": implementation, **more}

        def run(q, k, v, options=options):
            out, back = jax.vjp(lambda q, k, v: ulysses_attention(q, k, v, **options), q, k, v)
            return out, back(out)

        figures[name] = seconds(jax.jit(run, compiler_options=options_on(where)).lower(q, k, v).compile(), q, k, v, runs=5)
    case = f"attention T={T} N={bench.heads} K={bench.kv_heads} P={P} {implementation} causal forward+backward"
    return [record.row(case, "time", "s", figures["ulysses"], ring=figures["ring"])]


def check(bench: Bench, mesh: Mesh) -> list[dict]:
    """The relative difference of attention through the groups from attention on one device, at a length both can do."""
    (_, H), T = bench.sizes, 64 * bench.seq if bench.tiny else 4096
    alone = make_mesh(devices=list(mesh.devices.flat[:1]))
    q, k, v = (normal(mesh, token_spec(mesh), 1, T, h, H) for h in (bench.heads, bench.kv_heads, bench.kv_heads))
    many = ulysses_attention(q, k, v, mesh=mesh, is_causal=True, implementation=bench.implementation)
    q, k, v = (jax.device_put(np.asarray(x), NamedSharding(alone, PartitionSpec())) for x in (q, k, v))
    one = dot_product_attention(q, k, v, is_causal=True, implementation=bench.implementation)
    many, one = (np.asarray(x, np.float32) for x in (many, one))
    error = float(np.linalg.norm(many - one) / np.linalg.norm(one))
    rows = [record.row(f"attention T={T}", "‖P devices − one‖ / ‖one‖", "1", error)]
    # Products of groups, whose copies XLA folds into a stride, beside the plain product.
    (D, H), P, spec = bench.sizes, bench.seq, PartitionSpec()
    x, w = normal(alone, spec, 1, T, D), normal(alone, spec, D, P, bench.heads // P, H, scale=D**-0.5)
    w_out = jnp.moveaxis(w, 0, -1)

    def grouped(x, w, w_out):
        _, (y,) = _project(x, (w,))
        return _contract(jnp.zeros_like(x), y, w_out)

    def plain(x, w, w_out):
        return jnp.einsum("btgnh,gnhd->btd", jnp.einsum("btd,dgnh->btgnh", x, w), w_out)

    for name, run in (
        ("out", lambda f: f),
        ("dx", lambda f: jax.grad(lambda *given: (f(*given).astype(jnp.float32) ** 2).sum())),
    ):
        a, b = (np.asarray(jax.jit(run(f))(x, w, w_out), np.float32) for f in (grouped, plain))
        rows.append(
            record.row(
                f"products of groups, {name}", "relative difference", "1", float(np.linalg.norm(a - b) / np.linalg.norm(b))
            )
        )
    return rows


def sample(bench: Bench, mesh: Mesh) -> list[dict]:
    """Any heads and any length, on these devices: the worst relative error of the output and of a gradient, in float32, from
    plain attention on one device.
    """
    rows, P = [], bench.seq
    for N, K, T in ((7, 1, 1021), (6, 2, 1), (5, 5, max(P - 1, 1)), (28, 4, 509)):
        for name in ("segments", "window"):
            q, k, v = (normal(mesh, PartitionSpec(), 1, T, heads, 64).astype(jnp.float32) for heads in (N, K, K))
            ids = jnp.asarray(np.sort(np.random.default_rng(T).integers(0, 4, (1, T)), axis=1), jnp.int32)
            options: dict[str, Any] = {"segment_ids": ids} if name == "segments" else {"local_window_size": (100, 20)}

            def run(q, k, v, attend):
                out, back = jax.vjp(attend, q, k, v)
                return out, *back(jnp.cos(out))

            there = partial(ulysses_attention, mesh=mesh, implementation="xla", **options)
            here = partial(dot_product_attention, implementation="reference", **options)
            with jax.default_matmul_precision("highest"):
                many, one = (
                    jax.jit(partial(run, attend=attend), compiler_options=options_on(mesh))(q, k, v) for attend in (there, here)
                )
            pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(many, one, strict=True)]
            worst = max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs if np.any(b))
            case = f"attention T={T} N={N} K={K} P={P}, {name}"
            rows.append(record.row(case, "worst relative error of the output and gradients, float32", "1", worst))
    return rows


def main(bench: Bench) -> None:
    """Time everything and record it."""
    if bench.tiny:
        bench = dataclasses.replace(bench, heads=8, kv_heads=8, implementation="xla", lengths=(128,))
    mesh = make_mesh(seq=bench.seq)
    rows, start = [], time.perf_counter()
    steps = [(check, None), *((time_layers, T) for T in bench.lengths[:2]), (time_ring, bench.lengths[0])]
    steps += [*((time_crossings, T) for T in bench.lengths), (sample, None)]
    for step, T in steps:
        found = step(bench, mesh) if T is None else step(bench, mesh, T)
        rows += found
        record.save(bench.name, rows, bench.out)  # what is measured stays, whatever comes
        print(f"{math.floor(time.perf_counter() - start)} s", step.__name__, T, flush=True)
        for r in found:
            print("  ", r["case"], r["metric"], r["ours"], r["peers"], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Bench))
