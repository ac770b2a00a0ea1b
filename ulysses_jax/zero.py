"""ZeRO (arXiv 1910.02054) by named shardings: what each device keeps, over every axis of the mesh at once.

    stage   parameters   gradients   optimizer state
    0       whole        whole       whole
    1       whole        whole       1/n
    2       whole        1/n         1/n
    3       1/n          1/n         1/n            n = all devices of the mesh

`zero_shardings` says this as shardings, and that is all that differs between stages for code which leaves the
communication to XLA. Left to itself, XLA gathers activations where it should gather weights, so the training step says also
when: inside its `shard_map` each parameter is `Stored`, and the model turns one layer at a time into what it computes with by
`unshard`. Its forward casts to the compute type and then gathers; its backward sums gradients over the devices in float32 and,
from stage 2 on, leaves each device its own piece (reduce-scatter).

Either crossing can be an all-to-all instead (`Unshard.by_copies`): of copies of a piece, or of a gradient's parts, which each
device then adds up itself, in float32 as well, so that they cross as they are, half as many bytes in bfloat16. GPUs of one
process do it with their copy engines, where NCCL's kernels would take multiprocessors from the products beside them and wait
for those of an attention kernel.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["SCOPE", "Stored", "Unshard", "hold", "undivided", "zero_shardings"]

SCOPE = "zero"
"""in the names of ZeRO's own all-to-alls"""

type Tree = Any


def zero_shardings(
    params: Tree, opt_state: Tree, *, mesh: Mesh, stage: int, stacked: str | None = "layers"
) -> tuple[Tree, Tree, Tree]:
    """Shardings of (parameters, gradients, optimizer state) for a ZeRO stage.

    Where a stage divides a leaf, it divides the leaf's first dim that the number of devices divides, over all axes of the mesh
    together: pieces that join on the leading dim lie one after the other in memory, on any other XLA transposes whole stacks
    of layers, before the loop and after it. Scalars, and leaves with no such dim (`undivided` lists them), are replicated.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      opt_state: the state optax makes for them; its moments, alike in path and shape, follow the gradients' rule.
      mesh: all of its axes are used.
      stage: 0, 1, 2 or 3.
      stacked: leaves under a key of this name have a leading dim of layers, which is never divided (it is scanned).

    Returns:
      Three trees of `NamedSharding`, shaped like `params`, `params` and `opt_state`.

    Raises:
      ValueError: an unknown stage, no mesh, or a leaf that is no array.
    """
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"stage is {stage!r}; ZeRO has stages 0, 1, 2 and 3.")
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {mesh!r:.60}; it must be a jax.sharding.Mesh, such as make_mesh(data=2, seq=4).")

    def shardings(tree: Tree, divided: bool) -> Tree:
        def one(path, leaf) -> NamedSharding:
            if not hasattr(leaf, "shape"):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(f"leaf {name} is {leaf!r:.60}; leaves must be arrays or jax.ShapeDtypeStruct.")
            dim = divided_dim(path, leaf.shape, mesh.size, stacked) if divided else None
            return NamedSharding(mesh, _spec(dim, mesh))

        return jax.tree_util.tree_map_with_path(one, tree)

    return shardings(params, stage >= 3), shardings(params, stage >= 2), shardings(opt_state, stage >= 1)


def undivided(params: Tree, *, mesh: Mesh, stacked: str | None = "layers") -> list[str]:
    """Names of the leaves that no stage divides, because the number of devices divides none of their dims."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    whole = [path for path, leaf in leaves if divided_dim(path, leaf.shape, mesh.size, stacked) is None]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in whole]


def divided_dim(path: tuple, shape: tuple[int, ...], devices: int, stacked: str | None) -> int | None:
    """The dim of a leaf that is divided over `devices`: the first that they divide; None if none."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    dims = range(1 if stacked is not None and stacked in names else 0, len(shape))
    return next((i for i in dims if shape[i] and shape[i] % devices == 0), None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["piece", "whole", "squares"], meta_fields=["dim", "axes"])
@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter as one device stores it, inside `shard_map`; a scan over layers slices it like an array.

    `piece` is differentiated: this device's 1/n where gradients are divided, everything where not. `whole` is the full
    parameter where the stage keeps one beside a divided gradient (stage 2). `dim`, counted from the end, is where the
    pieces join; None where there is nothing to join.

    A piece that waits in the host's memory is fetched when it is used, and its gradient leaves for there at once. `squares` is
    then a zero for each layer, whose "gradient" is the sum of the squares of that layer's gradient, taken as it leaves.
    """

    piece: Array
    whole: Array | None
    dim: int | None
    axes: tuple[str, ...]
    squares: Array | None = None


def hold(params: Tree, param_shardings: Tree, grad_shardings: Tree) -> Tree:
    """One device's parameters as a tree of `Stored`, to be differentiated; for use inside a `shard_map` over the whole mesh.

    Args:
      params: this device's part, as `param_shardings` divides it.
      param_shardings: the first of `zero_shardings`.
      grad_shardings: the second; the gradient of each `piece` comes out divided as it says.

    Raises:
      ValueError: shardings made for other parameters.
    """
    if not jax.tree.structure(params) == jax.tree.structure(param_shardings) == jax.tree.structure(grad_shardings):
        raise ValueError(
            "params and its shardings differ in their keys; make the shardings for these parameters: zero_shardings(params, …)."
        )

    def one(x: Array, param: NamedSharding, grad: NamedSharding) -> Stored:
        axes, dim = grad.mesh.axis_names, _dim_of(grad, x.ndim)
        if dim is None or _dim_of(param, x.ndim) is not None:
            return Stored(x, None, dim, axes, _zeros_for_squares(x, dim, axes))
        size = x.shape[dim] // grad.mesh.size
        return Stored(lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, dim + x.ndim), x, dim, axes)

    return jax.tree.map(one, params, param_shardings, grad_shardings)


@dataclasses.dataclass(frozen=True)
class Unshard:
    """The model's `unshard`: a tree of `Stored` → whole arrays, matrices in `dtype`, vectors (norms, biases) as they are."""

    dtype: str
    by_copies: bool = False
    """gather and scatter by all-to-alls, for devices that copy engines connect (`train.compiler_options`)"""

    def __call__(self, stored: Tree) -> Tree:
        return jax.tree.map(self._one, stored, is_leaf=lambda x: isinstance(x, Stored))

    def _one(self, x: Stored) -> Array:
        piece = x.piece if x.squares is None else _fetch(x.piece, x.squares)
        whole = piece if x.whole is None else x.whole
        dtype = jnp.dtype(self.dtype) if whole.ndim >= 2 else whole.dtype
        if x.dim is None:  # differentiating the pcast sums the gradient over the devices, before any cast
            return lax.pcast(piece, x.axes, to="varying").astype(dtype)
        if x.whole is None:
            return _gather(piece, dtype, x.dim, x.axes, self.by_copies)
        return _keep(piece, lax.pcast(x.whole, x.axes, to="varying"), dtype, x.dim, x.axes, self.by_copies)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(piece: Array, dtype, dim: int, axes: tuple[str, ...], by_copies: bool) -> Array:
    """Cast and gather; backward: the reduce-scatter of the gradient, in the piece's float32."""
    piece, dim = piece.astype(dtype), dim % piece.ndim
    if not by_copies:
        return lax.all_gather(piece, axes, axis=dim, tiled=True)
    pieces = _exchange(jnp.broadcast_to(piece, (lax.axis_size(axes), *piece.shape)), axes)
    return jnp.moveaxis(pieces, 0, dim).reshape(*piece.shape[:dim], -1, *piece.shape[dim + 1 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _keep(piece: Array, whole: Array, dtype, dim: int, axes: tuple[str, ...], by_copies: bool) -> Array:
    """The whole parameter that is already here; backward: as for `_gather`."""
    return whole.astype(dtype)


def _scatter(gradient: Array, dim: int, axes: tuple[str, ...], by_copies: bool) -> Array:
    dim %= gradient.ndim
    if not by_copies:
        return lax.psum_scatter(gradient.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True)
    parts = gradient.reshape(*gradient.shape[:dim], lax.axis_size(axes), -1, *gradient.shape[dim + 1 :])
    return _exchange(jnp.moveaxis(parts, dim, 0), axes).astype(jnp.float32).sum(0)


def _exchange(parts: Array, axes: tuple[str, ...]) -> Array:
    """[n, …], one for each device → [n, …], one from each; the ledger knows it by its name from the exchange of heads."""
    with jax.named_scope(SCOPE):
        return lax.all_to_all(parts, axes, split_axis=0, concat_axis=0, tiled=True)


_gather.defvjp(
    lambda piece, dtype, dim, axes, by_copies: (_gather(piece, dtype, dim, axes, by_copies), None),
    lambda dtype, dim, axes, by_copies, _, gradient: (_scatter(gradient, dim, axes, by_copies),),
)
_keep.defvjp(
    lambda piece, whole, dtype, dim, axes, by_copies: (_keep(piece, whole, dtype, dim, axes, by_copies), None),
    lambda dtype, dim, axes, by_copies, _, gradient: (_scatter(gradient, dim, axes, by_copies), None),
)


@jax.custom_vjp
def _fetch(piece: Array, squares: Array) -> Array:
    """A layer's piece, from the host; backward: its gradient to the host, and the sum of its squares on the way."""
    return jax.device_put(piece, jax.memory.Space.Device)


_fetch.defvjp(
    lambda piece, squares: (_fetch(piece, squares), None),
    lambda _, gradient: (jax.device_put(gradient, jax.memory.Space.Host), jnp.square(gradient).sum()),
)


def _zeros_for_squares(x: Array, dim: int | None, axes: tuple[str, ...]) -> Array | None:
    """[L] for L layers of a parameter on the host, divided over devices as it is; None for others."""
    if jax.typeof(x).memory_space != jax.memory.Space.Host:
        return None
    zeros = jnp.zeros(len(x), jnp.float32)
    return zeros if dim is None else lax.pcast(zeros, axes, to="varying")


def _dim_of(sharding: NamedSharding, ndim: int) -> int | None:
    """The divided dim of a leaf, counted from the end."""
    return next((i - ndim for i, axes in enumerate(sharding.spec) if axes is not None), None)


def _spec(dim: int | None, mesh: Mesh) -> PartitionSpec:
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, mesh.axis_names)
