"""Parallel against one device, on the user's own mesh: is what a run would compute what one device would compute?

The model is shrunk in depth, width and length so that one device holds it; heads, mesh, ZeRO stage and every option stay. On
random tokens, documents that end anywhere, and a part of the sequence without labels, three things are compared: the loss and
every gradient with one device's, and the all-to-alls of the compiled step with the closed form.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ulysses_jax import costs
from ulysses_jax.attention import check_platform
from ulysses_jax.config import MeshConfig, TrainConfig, deal_heads
from ulysses_jax.data import Batch, place
from ulysses_jax.mesh import make_mesh
from ulysses_jax.plan import Crossing, ledger
from ulysses_jax.train import Program, batch_shapes, build
from ulysses_jax.zero import zero_shardings

__all__ = ["Verdict", "example", "expected_exchange", "shrink", "unplanned", "verify"]

# Relative errors that rounding explains: float32 sums in another order, and bfloat16 with its 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was compared, and what is wrong."""

    config: TrainConfig
    """the shrunk run"""
    loss: tuple[float, float]
    """one device's, the mesh's"""
    errors: dict[str, float]
    """relative error of each gradient, by name"""
    crossings: list[Crossing]
    """the compiled step's collectives"""
    faults: list[str]
    """what is wrong, in words; empty if the mesh computes what one device does"""


@jax.default_matmul_precision("highest")  # GPUs would round float32 operands to TF32's 10 bits, each device's in its own sums
def verify(config: TrainConfig, mesh: Mesh) -> Verdict:
    """Compare a shrunk run of `config` on `mesh` with one device of it.

    Args:
      config: a whole run, such as a recipe.
      mesh: `make_mesh` of the config's sizes.

    Raises:
      ValueError: a mesh that is not the config's, or an implementation that its devices cannot run.
    """
    check_platform(config.implementation, mesh.devices.flat[0].platform)
    small = shrink(config)
    here = {"offload_layers": 0.0, "offload_late": False, "offload_optimizer": False, "offload_params": False}
    memory = dataclasses.replace(small.memory, **here)
    alone = dataclasses.replace(small, mesh=MeshConfig(), zero_stage=0, accumulation=1, memory=memory)
    one = build(alone, make_mesh(devices=list(mesh.devices.flat[:1])))
    many = build(small, mesh)
    batch = example(small)
    params = one.init()["params"]
    loss, grads, _ = one.gradients(params, place(batch, one.mesh))
    placed = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), params, many.abstract["params"])
    mesh_loss, mesh_grads, _ = many.gradients(placed, place(batch, mesh, balanced=small.balanced))
    found = _named(mesh_grads)
    errors = {name: _relative_error(found[name], ref) for name, ref in _named(grads).items()}
    crossings = ledger(many.step.lower(many.abstract, batch_shapes(small, mesh)).compile().as_text() or "", mesh)
    losses = float(loss), float(mesh_loss)
    return Verdict(small, losses, errors, crossings, _faults(many, losses, errors, crossings))


def shrink(config: TrainConfig) -> TrainConfig:
    """The same run with two layers, narrow heads (64 where a kernel needs it), a small vocabulary and a short sequence."""
    kernel = config.implementation in ("pallas", "cudnn")
    model = dataclasses.replace(
        config.model,
        num_layers=2,
        vocab_size=512,
        embed_dim=64,
        mlp_dim=192,
        head_dim=64 if kernel else 16,
        dtype="bfloat16" if kernel else "float32",
    )
    parts = config.mesh.parts
    data = dataclasses.replace(config.data, seq_len=parts * max(8, math.ceil(96 / parts)))
    if model.local_window_size is not None:  # so long that tokens lie in the same order as the run's
        held = data.seq_len // config.mesh.ring
        model = dataclasses.replace(model, local_window_size=max(37, held + 1) if config.balanced else min(37, held))
    data = dataclasses.replace(data, batch_size=config.mesh.data * config.accumulation)
    memory = dataclasses.replace(config.memory, loss_tile=32, mlp_tile=config.memory.mlp_tile and 20)
    for name in ("save_layers", "offload_layers"):  # two layers have halves
        memory = dataclasses.replace(memory, **{name: math.ceil(2 * getattr(memory, name)) / 2})
    return dataclasses.replace(config, model=model, data=data, memory=memory)


def example(config: TrainConfig) -> Batch:
    """A batch of random tokens in documents of random lengths, the last eighth of the sequence without labels."""
    rng = np.random.default_rng(0)
    shape = config.data.batch_size, config.data.seq_len
    tokens, labels = (rng.integers(0, config.model.vocab_size, shape).astype(np.int32) for _ in range(2))
    starts = rng.random(shape) < 0.04
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    weights = (rng.random(shape) < 0.9).astype(np.float32)
    weights[:, -(shape[1] // 8) :] = 0
    batch = {"tokens": tokens, "labels": labels, "positions": positions, "weights": weights}
    return batch | {"segment_ids": segments} if config.data.mask_documents else batch


def _faults(program: Program, losses, errors: dict[str, float], crossings: list[Crossing]) -> list[str]:
    config, mesh = program.config, program.mesh
    tolerance, faults = TOLERANCE[config.model.dtype], []
    if not abs(losses[1] - losses[0]) <= tolerance * abs(losses[0]):
        faults.append(f"the loss is {losses[1]:.7g}, one device's {losses[0]:.7g}")
    faults += [f"the gradient of {name} is off by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    exchanged, expected = sum(x.times * x.bytes for x in crossings if x.is_exchange), expected_exchange(config)
    if mesh.devices.flat[0].platform == "cpu" and config.model.dtype == "bfloat16":
        expected *= 2  # XLA computes bfloat16 in float32 there
    if exchanged != expected:
        faults.append(f"all-to-alls carry {exchanged:,} bytes a device and step; the closed form says {expected:,}")
    faults += [f"an unplanned {x.kind} over {x.axes} of {x.operands[0]} at {x.source}" for x in unplanned(program, crossings)]
    return faults


def expected_exchange(config: TrainConfig) -> int:
    """Bytes a device hands to the all-to-alls of one step: a forward's, as much again backward, and what is computed again."""
    local = config.data.batch_size // config.mesh.data
    elements = costs.exchange_elements(
        config.model, batch_size=local, seq_len=config.data.seq_len // config.mesh.ring, degree=config.mesh.seq
    )
    dealing = deal_heads(config.model.num_heads, config.model.num_kv_heads, config.mesh.seq)
    back = elements * len(dealing.queries) // (2 * (len(dealing.queries) + len(dealing.keys)))  # the output's share
    again = {"inputs": elements, "attention": elements, "projections": back, "products": 0, "all": 0}
    group = config.memory.group(config.model.num_layers)
    a_group = sum(2 * elements + again[layer.save] for layer in group)
    if config.model.head_chunks > 1:  # each is recomputed by itself; of one whose output is kept, that crosses back once more
        a_group += sum(elements if layer.save == "all" else back for layer in group)
    return a_group * (config.model.num_layers // len(group)) * (2 if config.model.dtype == "bfloat16" else 4)


def unplanned(program: Program, crossings: list[Crossing]) -> list[Crossing]:
    """Gathers of what is neither an integer nor a device's piece of a parameter: activations, as a rule.

    Pieces are those of stage 3, whichever the stage: 1 and 2 gather them too, after the update.
    """
    params = program.abstract["params"]
    at = zero_shardings(params, (), mesh=program.mesh, stage=3)[0]
    sizes = {math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(at), strict=True)}
    layers = program.config.model.num_layers
    sizes |= {size // layers for size in sizes}

    def planned(crossing: Crossing) -> bool:
        if crossing.kind != "all-gather":
            return True
        return all(dtype[0] in "sup" or math.prod(shape) in sizes for dtype, shape in crossing.operands)

    return [crossing for crossing in crossings if not planned(crossing)]


def _named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x, np.float64) for path, x in leaves}


def _relative_error(x: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(x - ref) / max(np.linalg.norm(ref), 1e-30))
