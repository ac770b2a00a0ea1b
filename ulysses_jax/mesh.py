"""The device mesh: `data` over the batch, `seq` over the tokens of each sequence, and for degrees beyond the head count `ring`.

Parameters, gradients and optimizer state are divided over all of them (`zero.py`); activations over `data` on their batch dim,
over `ring` and then `seq` on their length. With a ring, tokens lie on the mesh in `token_order`.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

__all__ = ["DATA", "RING", "SEQ", "make_mesh", "sequence_axes", "token_order", "token_spec"]

DATA = "data"
SEQ = "seq"
RING = "ring"


def make_mesh(
    *,
    data: int = 1,
    seq: int = 1,
    ring: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh with axes ("data", "seq"), or ("data", "ring", "seq") where ring > 1, all of type Auto.

    Neighbours along `seq` are neighbours in jax's device order, so that the all-to-alls, which carry the most, stay within a
    host whenever `seq` divides its device count.

    Args:
      data: devices along the batch.
      seq: devices along the sequence, the Ulysses degree P.
      ring: devices around which keys and values travel, each of them `seq` devices wide.
      devices: which to use; the first data · ring · seq of `jax.devices()` by default.

    Raises:
      ValueError: a size below 1, or more devices asked for than there are.
    """
    for name, size in (("data", data), ("seq", seq), ("ring", ring)):
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be an int: a mesh axis needs at least 1 device.")
    if devices is None:
        devices = jax.devices()
    if not isinstance(devices, list | tuple | np.ndarray) or not all(isinstance(d, jax.Device) for d in devices):
        raise ValueError(f"devices is {devices!r:.60}; it must be a list of jax devices, such as jax.devices()[:2].")
    devices = list(devices)
    shape, names = ((data, seq), (DATA, SEQ)) if ring == 1 else ((data, ring, seq), (DATA, RING, SEQ))
    needed = math.prod(shape)
    if needed > len(devices):
        raise ValueError(
            f"{' × '.join(names)} = {' × '.join(map(str, shape))} needs {needed} devices, but there are {len(devices)}"
            f"{f' ({devices[0].platform})' if devices else ''}. Choose a smaller mesh, or for a trial on CPU call "
            f'jax.config.update("jax_num_cpu_devices", {needed}) before anything else.'
        )
    if len(set(devices[:needed])) < needed:
        raise ValueError(f"devices names a device twice among its first {needed}; each may be used once.")
    if needed == len(devices):
        return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)
    return Mesh(np.array(devices[:needed]).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def token_spec(mesh: Mesh) -> PartitionSpec:
    """How [B, T, …] arrays lie on a training mesh: batch over `data`, length over `sequence_axes`, of those it has."""
    return PartitionSpec(DATA if DATA in mesh.axis_names else None, sequence_axes(mesh) or None)


def sequence_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that divide the length, outermost first."""
    return tuple(axis for axis in (RING, SEQ) if axis in mesh.axis_names)


def token_order(length: int, ring: int) -> np.ndarray:
    """[T], the position of each token as tokens lie on a mesh: the natural order without a ring.

    With a ring of R the sequence is cut into 2·R chunks and device r of the ring holds chunks r and 2·R − 1 − r, so that
    each sees as much of the causal past as any other (`ring.py`).
    """
    if ring == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate([chunks[[r, 2 * ring - 1 - r]].reshape(-1) for r in range(ring)])


def axes_size(mesh: Mesh, axes: Sequence[str]) -> int:
    """The product of the sizes of some axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
