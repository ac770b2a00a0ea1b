"""The device mesh: `data` over the batch, `seq` over the tokens of each sequence, and for degrees beyond the head count `ring`.

Parameters, gradients and optimizer state are divided over all of them (`zero.py`); activations over `data` on their batch dim,
over `ring` and then `seq` on their length. With a ring, tokens lie on the mesh in `token_order`.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

__all__ = ["DATA", "RING", "SEQ", "early_chunks", "make_mesh", "sequence_axes", "token_order", "token_spec"]

DATA = "data"
SEQ = "seq"
RING = "ring"
TILE = 128  # tokens of a kernel's tile: chunks that are multiples of it cut none
# Most chunks that a device holds of a half of the sequence. With as many, all of 120 random packings of documents, T/64 tokens
# long in the mean or longer, left the busiest device within 10 % of the mean, on rings of 2, 4 and 8; with half, not all.
MOST_CHUNKS = 64


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

    With a ring of R the sequence is cut into 2·m·R chunks (`early_chunks`). Device r of the ring holds chunks r, r + R, …,
    r + (m − 1)·R of the first half and their mirror images in the second, in rising order: by the mirror each sees as much of
    the causal past as any other, by the stride each meets documents at all their places. With m = 1 that is "zigzag", without
    the mirror striped attention (arXiv 2311.09431).
    """
    if ring == 1:
        return np.arange(length)
    m = early_chunks(length, ring)
    early = np.arange(m * ring).reshape(m, ring).T
    held = np.concatenate([early, (2 * m * ring - 1 - early)[:, ::-1]], axis=1)
    return np.arange(length).reshape(2 * m * ring, -1)[held].reshape(-1)


def early_chunks(length: int, ring: int) -> int:
    """m, the chunks that each device of a ring of R holds of the sequence's first half; as many of the second.

    The largest of at most 64 for which a chunk is a multiple of a kernel's tile; 1 where T/2R is none itself.
    """
    tiles, rest = divmod(length, 2 * ring * TILE)
    return 1 if rest else max(m for m in range(1, MOST_CHUNKS + 1) if tiles % m == 0)


def axes_size(mesh: Mesh, axes: Sequence[str]) -> int:
    """The product of the sizes of some axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
