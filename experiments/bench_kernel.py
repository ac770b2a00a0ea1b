"""The attention kernel for Hopper beside its peers, on one GPU: speed, accuracy, sparsity and a million tokens.

    python -m experiments.bench_kernel --suites accuracy speed grouped variants sparse long --out experiments/results

Peers run in the same process, ours and theirs in turn, round by round, so that a clock that drifts drifts for all, each round
in an order of its own, as a GPU at its power limit is slower after one that used more: cuDNN through jax, torch's
scaled_dot_product_attention with cuDNN, and tokamax, each where it is installed. TFLOP/s count causal attention once and
nothing recomputed. Each suite writes a result file; `--draw` makes the figure from them.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the memory too

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from experiments import record
from ulysses_jax import costs
from ulysses_jax.attention import BlockMask, Mask, dot_product_attention, make_mask
from ulysses_jax.attention.reference import reference_attention

ROUNDS, ROUND_S = 9, 0.2
SHAPES = {"8K": (8192, 64), "32K": (32768, 16), "128K": (131072, 8)}  # T, heads

type Runs = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure."""

    suites: tuple[str, ...] = ("accuracy", "speed", "grouped", "variants", "sparse", "long")
    out: Path = Path("experiments/results")
    draw: bool = False
    """only draw the figure, from the result files"""


# Inputs and what is run on them.


def inputs(T: int, N: int, K: int | None = None, H: int = 128, *, B: int = 1, S: int | None = None, seed: int | None = None):
    """Fresh normal q, k, v, d_out in bfloat16."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S or T, K or N, H), (B, S or T, K or N, H), (B, T, N, H))
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 4)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


def ours(mask: Mask, **options) -> Callable:
    """Our kernel with a mask."""
    return lambda q, k, v: dot_product_attention(q, k, v, mask=mask, implementation="pallas", **options)


def both(attend: Callable) -> Callable:
    """Forward and backward: (q, k, v, …, d_out) → (out, dq, dk, dv, …)."""

    def run(*arrays):
        *arguments, d_out = arrays
        out, back = jax.vjp(attend, *arguments)
        return out, *back(d_out)

    return run


def cudnn(*, is_causal: bool) -> Callable:
    """The peer in jax."""
    return functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn")


def tokamax(*, is_causal: bool) -> Callable | None:
    """The peer in Pallas, if installed."""
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
        from absl import flags, logging
    except ImportError:
        return None
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.ERROR)
    return functools.partial(tokamax.dot_product_attention, is_causal=is_causal, implementation="mosaic")


def torch_runs(T: int, N: int, H: int, *, is_causal: bool) -> tuple[Callable, Callable] | None:
    """torch's forward and its forward and backward, on arrays of its own in its own layout [B, N, T, H], if installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    q, k, v = (torch.randn(1, N, T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d_out = torch.randn_like(q)

    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return out

    def forward_and_backward():
        forward().backward(d_out)
        q.grad = k.grad = v.grad = None

    def waited(run: Callable) -> Callable:
        def call(times: int = 1):
            for _ in range(times):
                run()
            torch.cuda.synchronize()

        return call

    return waited(lambda: forward().detach()), waited(forward_and_backward)


def compiled(functions: dict[str, tuple[Callable, tuple]]) -> dict[str, Callable]:
    """name → call(times), compiled side by side."""

    def build(item):
        name, (function, arguments) = item
        program = jax.jit(function).lower(*arguments).compile()

        def call(times: int = 1):
            result = None
            for _ in range(times):
                result = program(*arguments)
            jax.block_until_ready(result)

        return name, call

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(pool.map(build, functions.items()))


def seconds(calls: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of one call of each, measured round by round."""
    times: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        times[name] = max(1, round(ROUND_S / (time.perf_counter() - start)))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for name in order.permutation(list(calls)).tolist():
            call = calls[name]
            start = time.perf_counter()
            call(times[name])
            measured[name].append((time.perf_counter() - start) / times[name])
    return {name: statistics.median(values) for name, values in measured.items()}


def visible_flops(T: int, N: int, H: int, *, is_causal: bool) -> float:
    """FLOPs of a forward; forward and backward are 3.5 times that."""
    return costs.attention_flops(T * T, N, H) / (2 if is_causal else 1)


# Suites.


def speed() -> Iterator[list[dict]]:
    """TFLOP/s, causal and full, forward and forward+backward, beside every peer."""
    cases = [(f"{name} N={N} H=128", T, N, 128) for name, (T, N) in SHAPES.items()]
    cases += [("32K N=32 H=64", 32768, 32, 64), ("32K N=8 H=256", 32768, 8, 256)]
    rows = []
    for label, T, N, H in cases:
        arrays = inputs(T, N, H=H)
        for is_causal in (True, False) if H == 128 else (True,):
            kinds = {"ours": ours(make_mask(T, is_causal=is_causal)), "cudnn": cudnn(is_causal=is_causal)}
            if peer := tokamax(is_causal=is_causal):
                kinds["tokamax"] = peer
            forward = compiled({name: (f, arrays[:3]) for name, f in kinds.items()})
            whole = compiled({name: (both(f), arrays) for name, f in kinds.items()})
            if torch := torch_runs(T, N, H, is_causal=is_causal):
                forward["torch"], whole["torch"] = torch
            flops = visible_flops(T, N, H, is_causal=is_causal)
            mask = "causal" if is_causal else "full"
            for metric, calls, share in (("forward", forward, 1.0), ("forward+backward", whole, 3.5)):
                rates = {name: share * flops / took / 1e12 for name, took in seconds(calls).items()}
                rows.append(record.row(f"{label} {mask}", metric, "TFLOP/s", rates.pop("ours"), **rates))
                print(_line(rows[-1]), flush=True)
            yield rows


def grouped() -> Iterator[list[dict]]:
    """Grouped heads beside as many heads ungrouped: the same FLOPs."""
    rows = []
    for T, N, K in ((32768, 16, 4), (8192, 64, 8)):
        mask, flops = make_mask(T, is_causal=True), visible_flops(T, N, 128, is_causal=True)
        plain, few = inputs(T, N), inputs(T, N, K)
        attend = ours(mask)
        for metric, share, f, count in (("forward", 1.0, attend, 3), ("forward+backward", 3.5, both(attend), 4)):
            took = seconds(compiled({"ours": (f, few[:count]), "ungrouped": (f, plain[:count])}))
            rates = {name: share * flops / value / 1e12 for name, value in took.items()}
            rows.append(
                record.row(f"T={T} N={N} K={K} H=128 causal", metric, "TFLOP/s", rates["ours"], ungrouped=rates["ungrouped"])
            )
            print(_line(rows[-1]), flush=True)
            yield rows


def variants() -> Iterator[list[dict]]:
    """What an option costs: TFLOP/s beside the same attention without it."""
    T, rows = 32768, []
    mask = make_mask(T, is_causal=True)
    soft_cap: dict[str, dict[str, Any]] = {"soft cap": {"logits_soft_cap": 30.0}}
    others: dict[str, dict[str, Any]] = {"deterministic": {"deterministic": True}, "sinks": {"sinks": jnp.zeros(16)}}
    for H, N, options in ((128, 16, soft_cap | others), (256, 8, soft_cap)):
        flops, arrays = visible_flops(T, N, H, is_causal=True), inputs(T, N, H=H)
        kinds = {"plain": ours(mask), **{name: ours(mask, **own) for name, own in options.items()}}
        for metric, share, wrap, count in (("forward", 1.0, lambda f: f, 3), ("forward+backward", 3.5, both, 4)):
            programs = compiled({name: (wrap(attend), arrays[:count]) for name, attend in kinds.items()})
            rates = {name: share * flops / took / 1e12 for name, took in seconds(programs).items()}
            for name in options:
                case = f"T={T} N={N} H={H} causal, {name}"
                rows.append(record.row(case, metric, "TFLOP/s", rates[name], plain=rates["plain"]))
                print(_line(rows[-1]), flush=True)
            yield rows


def documents(T: int, mean: int, seed: int = 0) -> list[int]:
    """Lengths of packed documents, lognormal of that mean (σ = 1), that fill T."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < T:
        lengths.append(int(min(max(16, rng.lognormal(np.log(mean) - 0.5, 1.0)), T - sum(lengths))))
    return lengths


def stacked(attend: Callable) -> Callable:
    """(q, k, v, k, v, …) → out: layers that share a mask, each one's output the next one's queries, with keys of its own."""

    def run(q, *keys_and_values):
        for k, v in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            q = attend(q, k, v)
        return q

    return run


def sparse() -> Iterator[list[dict]]:
    """Time over that of the whole causal (or full) mask, divided by the share of its tiles that are live: 1 is proportional.

    Of `layers` in one program, so that a mask's preparation is shared as it is in a model, and no dispatch counts. Each has its
    own keys and values: the gradients of shared ones would be added up, in time that is not attention's.
    """
    T, N, layers = 32768, 16, 8
    rng, (q, k, v, d_out) = np.random.default_rng(0), inputs(T, N, layers * N)
    keys, values = (jnp.split(x, layers, axis=2) for x in (k, v))
    arrays = q, *(x for layer in zip(keys, values, strict=True) for x in layer)
    masks: dict[str, tuple[Mask, str]] = {"causal": (make_mask(T, is_causal=True), "causal"), "full": (make_mask(T), "full")}
    for density in (0.5, 0.25, 0.125, 0.06):
        layout = rng.random((1, T // 128, T // 128)) < density
        masks[f"blocks of 128, {density:.1%}"] = make_mask(T, block_mask=BlockMask(layout, 128)), "full"
    for window in (8192, 4096, 1024):
        masks[f"causal, window {window}"] = make_mask(T, is_causal=True, local_window_size=(window - 1, 0)), "causal"
    for mean in (8192, 2048):
        lengths = documents(T, mean)
        ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None], jnp.int32)
        masks[f"causal, documents of mean {mean} {lengths}"] = make_mask(T, is_causal=True, segment_ids=ids), "causal"
    rows = []
    live = {name: int(np.asarray(mask.tile_tables(128, 128)[0]).sum()) for name, (mask, _) in masks.items()}
    for metric, wrap, given in (("forward", lambda f: f, arrays), ("forward+backward", both, (*arrays, d_out))):
        programs = {name: (wrap(stacked(jax.jit(ours(mask)))), given) for name, (mask, _) in masks.items()}  # traced once
        took = {name: value / layers for name, value in seconds(compiled(programs)).items()}
        for name, (_, whole) in masks.items():
            proportional = took[whole] * live[name] / live[whole]
            case = f"T={T} N={N} H=128 {name}"  # a layer's
            rows.append(record.row(case, f"{metric}, time over proportional", "1", took[name] / proportional))
            rows.append(record.row(case, f"{metric}, time", "ms", took[name] * 1e3, whole=took[whole] * 1e3))
            print(
                f"{case[:70]:70} {metric:18} {took[name] * 1e3:8.3f} ms, {took[name] / proportional:.3f} of proportional",
                flush=True,
            )
        yield rows


def accuracy() -> Iterator[list[dict]]:
    """Relative errors against the float32 reference on fresh inputs, beside cuDNN's own on the same."""
    ids = np.repeat(np.arange(6, dtype=np.int32), [100, 37, 300, 250, 13, 333])[None]
    blocks = BlockMask(np.random.default_rng(1).random((4, 9, 9)) < 0.5, 128)
    causal: dict[str, Any] = {"is_causal": True}
    cases: dict[str, tuple[dict, dict, dict]] = {}  # sizes, mask, options
    cases["window T=1032"] = {"T": 1032}, {**causal, "local_window_size": (200, 0)}, {}
    cases["window both sides"] = {}, {"local_window_size": (100, 250)}, {}
    cases["T=700 S=1033"] = {"T": 700, "S": 1033}, {}, {}
    cases["T=1033 S=300, dead rows"] = {"S": 300}, {"local_window_size": (100, 5)}, {}
    cases["soft cap"] = {"K": 2}, causal, {"logits_soft_cap": 3.0}
    cases["scale"] = {}, causal, {"scale": 0.3}
    cases["deterministic"] = {"K": 2}, causal, {"deterministic": True}
    cases["documents"] = {"K": 2}, {**causal, "segment_ids": ids}, {}
    cases["documents, window"] = {"K": 2}, {**causal, "segment_ids": ids, "local_window_size": (90, 0)}, {}
    # 128 tiles of keys add to each row of dQ.
    cases["one document T=16384, full"] = {"T": 16384, "N": 1}, {"segment_ids": np.zeros((1, 16384), np.int32)}, {}
    cases["blocks a head"] = {"K": 2}, {**causal, "block_mask": blocks}, {}
    cases["blocks, deterministic"] = {}, {"block_mask": blocks}, {"deterministic": True}
    cases["soft cap H=64"] = {"H": 64, "K": 2}, causal, {"logits_soft_cap": 3.0}
    cases["deterministic H=64"] = {"H": 64, "K": 2}, causal, {"deterministic": True}
    for H in (128, 64, 256):  # the slowest to compile last
        cases[f"causal H={H}"] = {"H": H}, causal, {}
        cases[f"causal H={H} T=1032"] = {"H": H, "T": 1032}, causal, {}  # cuDNN takes even lengths only
        cases[f"full H={H} T=1032"] = {"H": H, "T": 1032}, {}, {}
        if H <= 128:  # so many tiles that each block works off several, in clusters where the mask allows it
            many: dict[str, Any] = {"H": H, "T": 2048, "N": 36, "K": 12}
            cases[f"causal, many tiles H={H}"], cases[f"full, many tiles H={H}"] = (many, causal, {}), (many, {}, {})
            cases[f"window, many tiles H={H}"] = many, {**causal, "local_window_size": (300, 0)}, {}
            # Documents dealt and evened out, and on 132 multiprocessors 4 of 532 tiles that are left over, cut for all.
            each = np.repeat(np.arange(7, dtype=np.int32), [100, 37, 300, 250, 13, 333, 1015])[None]
            cases[f"documents, many tiles H={H}"] = many, {**causal, "segment_ids": each}, {}
            cases[f"full, tiles left over H={H}"] = {"H": H, "T": 512, "S": 5376, "N": 133}, {}, {}
        cases[f"full, grouped H={H}"] = {"H": H, "K": 2, "B": 2}, {}, {}
        cases[f"window, grouped H={H}"] = {"H": H, "K": 2}, {**causal, "local_window_size": (200, 0)}, {}
    rows = []
    context = multiprocessing.get_context("spawn")  # most of the time is tracing and compiling, which threads would not share
    with concurrent.futures.ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        found = [
            pool.submit(_errors, name, {"T": 1033, "N": 4, "H": 128, **sizes}, mask, options)
            for name, (sizes, mask, options) in cases.items()
        ]
        for case in concurrent.futures.as_completed(found):
            rows += case.result()
            yield rows


def _errors(name: str, sizes: dict[str, int], mask_options: dict, options: dict) -> list[dict]:
    arrays = inputs(**sizes)  # pyright: ignore[reportArgumentType]
    q, k = arrays[:2]
    mask, scale = make_mask(q.shape[1], k.shape[1], **mask_options), options.get("scale", q.shape[3] ** -0.5)
    reference = lambda q, k, v: reference_attention(  # noqa: E731
        q, k, v, mask, scale=scale, logits_soft_cap=options.get("logits_soft_cap")
    )[0]
    functions = {"ours": (both(ours(mask, **options)), arrays)}
    functions["reference"] = both(reference), tuple(x.astype(jnp.float32) for x in arrays)
    plain = set(mask_options) <= {"is_causal", "local_window_size"} and set(options) <= {"scale"}
    left = mask_options.get("local_window_size", (0, 0))
    if plain and left[1] == 0 and q.shape[1] == k.shape[1] and q.shape[1] % 2 == 0:
        peer = functools.partial(cudnn(is_causal="is_causal" in mask_options), scale=scale)
        window = mask_options.get("local_window_size")
        functions["cudnn"] = both(functools.partial(peer, local_window_size=window)), arrays
    results = {}
    with jax.default_matmul_precision("highest"):
        for which, (f, x) in functions.items():
            results[which] = [np.asarray(y, np.float64) for y in jax.jit(f)(*x)]
    rows = []
    for i, what in enumerate(("out", "dq", "dk", "dv")):
        error = {which: _relative(found[i], results["reference"][i]) for which, found in results.items()}
        peers = {"cudnn": error["cudnn"]} if "cudnn" in error else {}
        rows.append(record.row(name, f"relative error of {what}", "1", error["ours"], **peers))
        print(_line(rows[-1], "{:.2e}"), flush=True)
    return rows


def _relative(x: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(x - ref) / max(np.linalg.norm(ref), 1e-30))


def long() -> Iterator[list[dict]]:
    """A million tokens of 20 heads: offsets pass 2³¹ elements. Sampled rows against float32."""
    T, N, H, window = 2**20, 20, 128, 4096
    q, k, v, d_out = inputs(T, N, H=H)
    rng, scale, rows = np.random.default_rng(0), H**-0.5, []
    chosen = np.sort(np.concatenate([[0, 1, T // 2, T - 2, T - 1], rng.integers(0, T, 11)]))

    @jax.jit
    def exact(x: Array, g: Array, k: Array, v: Array, t: Array, left: Array) -> tuple[Array, Array]:
        """Output and gradient of query t, each [N, H], whose rows of q and d_out are x and g."""
        s = jnp.arange(T)[:, None]
        # Sums of products, which fuse: products of matrices would hold k and v in float32.
        along = lambda y, rows: (y * rows[0].astype(jnp.float32)).sum(-1)  # noqa: E731
        over = lambda weights, rows: (weights[..., None] * rows[0].astype(jnp.float32)).sum(0)  # noqa: E731
        p = jax.nn.softmax(jnp.where((s <= t) & (s >= t - left), along(x * scale, k), -jnp.inf), axis=0)
        dp = along(g, v)
        return over(p, v), over(p * (dp - (p * dp).sum(0)), k) * scale

    def worst(what: str, found: Array, left: int) -> float:
        errors = []
        for t in map(jnp.asarray, chosen[what == "dq" :]):  # of the first query, which sees one key, dq is zero
            x, g = (y[0, t].astype(jnp.float32) for y in (q, d_out))
            truth = exact(x, g, k, v, t, jnp.asarray(left))[("out", "dq").index(what)]
            errors.append(_relative(np.asarray(found[0, t], np.float64), np.asarray(truth, np.float64)))
        return max(errors)

    with jax.default_matmul_precision("highest"):
        near = make_mask(T, is_causal=True, local_window_size=(window - 1, 0))
        out, dq = jax.jit(lambda *x: both(ours(near))(*x)[:2])(q, k, v, d_out)
        for what, found in (("out", out), ("dq", dq)):
            case, error = f"T={T} N={N} window {window}", worst(what, found, window - 1)
            rows.append(record.row(case, f"worst relative error of {what} in sampled rows", "1", error))
            print(_line(rows[-1], "{:.2e}"), flush=True)
            yield rows
        del dq
        start = time.perf_counter()
        out = jax.block_until_ready(jax.jit(ours(make_mask(T, is_causal=True)))(q, k, v))
        took = time.perf_counter() - start
        rows.append(record.row(f"T={T} N={N} causal", "worst relative error of out in sampled rows", "1", worst("out", out, T)))
        rows.append(record.row(f"T={T} N={N} causal", "forward, compiling included", "s", took))
        print(_line(rows[-2], "{:.2e}"), f"{took:.1f} s", flush=True)
    yield rows


def _line(row: dict, form: str = "{:.1f}") -> str:
    peers = "  ".join(f"{name} {form.format(value)}" for name, value in row["peers"].items())
    return f"{row['case'][:44]:44} {row['metric']:28} ours {form.format(row['ours'])}  {peers}"


def draw(folder: Path) -> Path:
    """Bars of `speed`, from its result file."""
    import matplotlib.pyplot as plt

    content = json.loads((folder / "kernel_speed.json").read_text())
    rows = [row for row in content["rows"] if "H=128" in row["case"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, metric in zip(axes, ("forward", "forward+backward"), strict=True):
        mine = {row["case"]: {"ours": row["ours"], **row["peers"]} for row in rows if row["metric"] == metric}
        names = list(mine[cases[0]])
        for i, name in enumerate(names):
            at = np.arange(len(cases)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            axis.bar(at, [mine[case].get(name, 0) for case in cases], 0.8 / len(names), label=name)
        axis.set_xticks(range(len(cases)), [case.replace(" H=128 ", "\n") for case in cases], fontsize=8)
        axis.set_title(f"{metric}, bf16, {content['device'].removeprefix('1 × ')}", fontsize=10)
    axes[0].set_ylabel("TFLOP/s")
    axes[0].legend(ncols=4, fontsize=8, loc="lower left")
    figure.tight_layout()
    path = folder / "kernel_speed.png"
    figure.savefig(path, dpi=130)
    return path


SUITES = {
    "accuracy": accuracy,
    "speed": speed,
    "grouped": grouped,
    "variants": variants,
    "sparse": sparse,
    "long": long,
}


def main(bench: Bench) -> None:
    """Run the suites asked for, each into a file of its own, written again as its rows come."""
    if bench.draw:
        print(draw(bench.out))
        return
    for name in bench.suites:
        for rows in SUITES[name]():
            record.save(f"kernel_{name}", rows, bench.out)


if __name__ == "__main__":
    main(tyro.cli(Bench))
