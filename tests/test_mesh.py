"""The mesh: axes, their types, the order of devices, and refusals."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from ulysses_jax.mesh import DATA, SEQ, axes_size, make_mesh, token_spec


@pytest.mark.parametrize(("data", "seq"), [(1, 1), (1, 8), (2, 4), (4, 2), (1, 4), (2, 2)])
def test_axes_are_data_then_seq_and_auto_on_part_of_the_devices_too(data, seq):
    """`jax.make_mesh` without `axis_types` gives Explicit axes, which training does not expect."""
    mesh = make_mesh(data=data, seq=seq)
    assert mesh.axis_names == (DATA, SEQ) == ("data", "seq")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert dict(mesh.shape) == {"data": data, "seq": seq}


def test_neighbours_along_seq_are_neighbours_in_device_order():
    """Swapping the two sizes in the reshape breaks it."""
    ids = np.vectorize(lambda device: device.id)
    first = jax.devices()[0].id
    np.testing.assert_array_equal(ids(make_mesh(data=2, seq=4).devices) - first, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(ids(make_mesh(data=2, seq=2).devices) - first, [[0, 1], [2, 3]])


def test_takes_the_devices_it_is_given():
    chosen = jax.devices()[4:6]
    assert list(make_mesh(seq=2, devices=chosen).devices.flat) == chosen


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, r"data is 0; .*a mesh axis needs at least 1 device"),
        ({"seq": -1}, r"seq is -1; .*a mesh axis needs at least 1 device"),
        ({"data": 4, "seq": 4}, r"data × seq = 4 × 4 needs 16 devices, but there are 8 \(cpu\).*jax_num_cpu_devices\", 16"),
        ({"seq": 2, "devices": jax.devices()[:1] * 2}, r"devices names a device twice"),
    ],
)
def test_refuses_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_tokens_lie_over_the_axes_that_the_mesh_has():
    """Naming an axis that is not there breaks it; a ring is outside of `seq`."""
    assert token_spec(make_mesh(data=2, ring=2, seq=2)) == PartitionSpec("data", ("ring", "seq"))
    assert token_spec(make_mesh(data=2, seq=4)) == PartitionSpec("data", "seq")
    assert token_spec(Mesh(np.array(jax.devices()), ("seq",))) == PartitionSpec(None, "seq")
    assert token_spec(Mesh(np.array(jax.devices()), ("data",))) == PartitionSpec("data", None)


def test_the_size_of_several_axes_is_their_product():
    mesh = make_mesh(data=2, seq=4)
    assert [axes_size(mesh, axes) for axes in ((), ("seq",), ("data", "seq"))] == [1, 4, 8]
