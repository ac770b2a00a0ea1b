"""The device mesh: two axes, `data` over the batch and `seq` over the tokens of each sequence.

Parameters, gradients and optimizer state are divided over both (`zero.py`); activations over `data` on their batch dim and
over `seq` on their length.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

__all__ = ["DATA", "SEQ", "make_mesh", "token_spec"]

DATA = "data"
SEQ = "seq"


def make_mesh(*, data: int = 1, seq: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh with axes ("data", "seq"), both of type Auto.

    Neighbours along `seq` are neighbours in jax's device order, so that the all-to-alls, which carry the most, stay within a
    host whenever `seq` divides its device count.

    Args:
      data: devices along the batch.
      seq: devices along the sequence, the Ulysses degree P.
      devices: which to use; the first data · seq of `jax.devices()` by default.

    Raises:
      ValueError: a size below 1, or more devices asked for than there are.
    """
    for name, size in (("data", data), ("seq", seq)):
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be an int: a mesh axis needs at least 1 device.")
    if devices is None:
        devices = jax.devices()
    if not isinstance(devices, list | tuple | np.ndarray) or not all(isinstance(d, jax.Device) for d in devices):
        raise ValueError(f"devices is {devices!r:.60}; it must be a list of jax devices, such as jax.devices()[:2].")
    devices = list(devices)
    needed = data * seq
    if needed > len(devices):
        raise ValueError(
            f"data × seq = {data} × {seq} needs {needed} devices, but there are {len(devices)}"
            f"{f' ({devices[0].platform})' if devices else ''}. Choose a smaller mesh, or for a trial on CPU call "
            f'jax.config.update("jax_num_cpu_devices", {needed}) before anything else.'
        )
    if len(set(devices[:needed])) < needed:
        raise ValueError(f"devices names a device twice among its first {needed}; each may be used once.")
    if needed == len(devices):
        return jax.make_mesh((data, seq), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return Mesh(np.array(devices[:needed]).reshape(data, seq), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2)


def token_spec(mesh: Mesh) -> PartitionSpec:
    """How [B, T, …] arrays lie on a training mesh: batch over `data`, length over `seq`."""
    return PartitionSpec(DATA if DATA in mesh.shape else None, SEQ if SEQ in mesh.shape else None)


def axes_size(mesh: Mesh, axes: Sequence[str]) -> int:
    """The product of the sizes of some axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
