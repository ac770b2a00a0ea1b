"""Eight virtual CPU devices for every test, and the fast tests first."""

import os
from collections.abc import Iterator

import jax
import pytest

from ulysses_jax.attention import schedule
from ulysses_jax.runtime import PATIENCE

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENCE}"  # read when the first device is made
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True, scope="module")
def programs_go_with_their_module() -> Iterator[None]:
    """XLA maps what it compiles into memory, and Linux lets a process map 65,530 pieces: with more, compiling aborts it."""
    yield
    jax.clear_caches()


@pytest.fixture
def multiprocessors(monkeypatch):
    """`multiprocessors(n)`: so many in place of 132, for what is dealt in this test; what was dealt before is forgotten."""

    def clear() -> None:
        for cached in (schedule.in_order, schedule.dealt, schedule.spread):
            cached.cache_clear()

    clear()
    yield lambda n: monkeypatch.setattr(schedule, "multiprocessors", lambda: n)
    clear()
