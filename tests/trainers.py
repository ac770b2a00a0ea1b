"""A tiny trainer for the tests: one model, hand-made batches, programs compiled once a process, and a reader of HLO."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ulysses_jax import train
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from ulysses_jax.data import place
from ulysses_jax.mesh import make_mesh
from ulysses_jax.train import build

FAST = {"xla_backend_optimization_level": 0}  # the same program, its machine code not optimised: compiles in half the time
MESHES = [(1, 8), (2, 4), (4, 2)]  # data × seq

# Leaves of every kind: divided or not, decayed or not; KV heads fewer than most degrees; D, F, V and T all different.
MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=40,
    qk_norm=True,
    projection_bias=True,
    dtype="float32",
)
LENGTH = 24


def tiny(
    data: int = 1,
    seq: int = 1,
    *,
    model: dict | None = None,
    memory: dict | None = None,
    mask_documents: bool = True,
    **options: Any,
) -> TrainConfig:
    """A run of the tiny model; the loss's tiles do not fit the tokens of a device."""
    defaults = {
        "model": dataclasses.replace(MODEL, **model or {}),
        "mesh": MeshConfig(data=data, seq=seq),
        "memory": MemoryConfig(**{"save": "inputs", "loss_tile": 10} | (memory or {})),
        "data": DataConfig(seq_len=LENGTH, batch_size=8, mask_documents=mask_documents),
        "optimizer": OptimizerConfig(warmup_steps=5, learning_rate=3e-3),
        "steps": 20,
        "implementation": "xla",
    }
    return TrainConfig(**defaults | options)


def make_batch(config: TrainConfig, step: int = 0) -> dict[str, np.ndarray]:
    """Learnable tokens in documents of random lengths, which begin on and off the edges of shards; labels are successors."""
    B, T = config.data.batch_size, config.data.seq_len
    rng = np.random.default_rng(step)
    text = np.cumsum(rng.integers(0, 3, (B, T + 1)), axis=1).astype(np.int32)
    starts = rng.random((B, T)) < 0.1
    starts[:, 0] = True
    starts[0, T // 2] = True
    t = np.arange(T, dtype=np.int32)
    first = np.maximum.accumulate(np.where(starts, t, 0), axis=1)
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "weights": np.append(~starts[:, 1:], np.ones((B, 1), bool), axis=1).astype(np.float32),
        "positions": (t - first).astype(np.int32),
        "segment_ids": np.cumsum(starts, axis=1).astype(np.int32),
    }
    if not config.model.is_causal:
        batch |= {"labels": batch["tokens"], "weights": (rng.random((B, T)) < 0.2).astype(np.float32)}
        batch["tokens"] = np.where(batch["weights"] > 0, 263, batch["tokens"]).astype(np.int32)
    if not config.data.mask_documents:
        batch["positions"] = np.broadcast_to(t, (B, T))
        del batch["segment_ids"]
    return batch


@functools.cache
def program(config: TrainConfig) -> train.Program:
    return build(config, make_mesh(data=config.mesh.data, seq=config.mesh.seq))


@functools.cache
def compiled_step(config: TrainConfig) -> jax.stages.Compiled:
    p = program(config)
    return p.step.lower(p.abstract, train.batch_shapes(config, p.mesh)).compile(FAST)


@functools.cache
def compiled_evaluate(config: TrainConfig) -> jax.stages.Compiled:
    p = program(config)
    arguments = p.abstract["params"], train.batch_shapes(config, p.mesh)
    return jax.jit(p.evaluate).lower(*arguments).compile(FAST)


def compiled(function: Callable, *arguments: Any) -> Callable:
    """`function` compiled for arguments like these, fast."""
    return jax.jit(function).lower(*arguments).compile(FAST)


@functools.cache
def _first_state(model: ModelConfig) -> Any:
    p = program(tiny(model=dataclasses.asdict(model)))
    return jax.tree.map(np.asarray, compiled(p.init)())


def first_state(config: TrainConfig) -> train.State:
    """The first state, made on one device and laid out as the config says."""
    return jax.tree.map(
        lambda x, like: jax.device_put(x.copy(), like.sharding), _first_state(config.model), program(config).abstract
    )


def take_steps(config: TrainConfig, batches: list[dict[str, np.ndarray]]) -> tuple[train.State, list[dict[str, float]]]:
    """The state after one step on each batch, and every step's metrics."""
    state, metrics = first_state(config), []
    for batch in batches:
        state, m = compiled_step(config)(state, place(batch, program(config).mesh))
        metrics.append({name: float(x) for name, x in m.items()})
    return state, metrics


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """A tree's leaves on the host, under their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def relative_error(x: Any, reference: Any) -> float:
    """‖x − ref‖ / ‖ref‖."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One crossing of a compiled program: per device, `results` are its (dtype, shape)s."""

    op: str
    results: tuple[tuple[str, tuple[int, ...]], ...]
    groups: str
    """the devices that exchange: mesh axes, or lists of ids"""
    computation: str
    """the computation it is in; the body of a loop over layers is one"""

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.results)


_OPS = "all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute|ragged-all-to-all|collective-broadcast"
_INSTRUCTION = re.compile(rf"= (?P<type>.*?) (?P<op>{_OPS})(?:-start)?\(.*?replica_groups=(?P<groups>.*?), \w+=")


def hlo(program: jax.stages.Compiled) -> str:
    """The text of a compiled program, as one device runs it."""
    text = program.as_text()
    assert text is not None
    return text


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Every collective of a compiled program, once each, in the order of its text."""
    found, computation = [], ""
    for line in hlo(program).splitlines():
        if line and not line.startswith((" ", "}")):
            computation = line.split("(")[0].strip()
        if match := _INSTRUCTION.search(line):
            results = re.findall(r"(\w+)\[([\d,]*)\]", match["type"])
            shapes = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in results)
            found.append(Collective(match["op"], shapes, match["groups"], computation))
        elif re.search(rf" ({_OPS})(-start)?\(", line):
            raise AssertionError(f"a collective that this reader does not understand: {line[:300]}")
    return found
