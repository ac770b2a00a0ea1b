"""Eight virtual CPU devices for every test, and the fast tests first."""

import os

import jax
import pytest

from ulysses_jax.runtime import PATIENCE

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE}"  # read when the first device is made
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
