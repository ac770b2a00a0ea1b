"""Block-sparse attention: the ready-made layouts, what the blocked program leaves unvisited, and each device's own layouts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from tests.oracles import TOLERANCE, Case, errors_beyond, quick_jit, relative_error
from ulysses_jax import bigbird_blocks, fixed_blocks, longformer_blocks
from ulysses_jax.attention import BlockMask, dot_product_attention, make_mask
from ulysses_jax.flax_layers import attention_fn
from ulysses_jax.mesh import make_mesh
from ulysses_jax.ulysses import ulysses_attention, ulysses_attention_shard

PATTERNS = {
    "fixed": fixed_blocks,
    "fixed_in_turns": functools.partial(fixed_blocks, local_blocks=6, global_blocks=2, heads=4),
    "bigbird": functools.partial(bigbird_blocks, heads=3),
    "longformer": functools.partial(longformer_blocks, global_tokens=(0, 900)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [1, 100, 3000, 8192])
def test_a_pattern_fits_its_length_and_every_block_sees_itself(length, name, is_causal):
    """`length // block` blocks, or a triangle without its diagonal, breaks it."""
    options = {"global_tokens": (0,)} if name == "longformer" and length < 901 else {}
    pattern = PATTERNS[name](length, is_causal=is_causal, **options)
    n = -(-length // 128)
    assert (pattern.block, pattern.layout.dtype, pattern.layout.shape[1:]) == (128, bool, (n, n))
    assert pattern.layout[:, range(n), range(n)].all()
    assert not (is_causal and np.triu(pattern.layout, 1).any())
    make_mask(length, block_mask=pattern)


@pytest.mark.parametrize("name", PATTERNS)
def test_causal_patterns_are_the_others_below_the_diagonal(name):
    """Of BigBird all but the random blocks, which are then drawn from those before."""
    options = {"random_blocks": 0} if name == "bigbird" else {}
    both = [np.asarray(PATTERNS[name](8192, is_causal=causal, **options).layout) for causal in (False, True)]
    np.testing.assert_array_equal(np.tril(both[0]), both[1])


def test_fixed_sees_its_stretch_and_the_summaries_of_all_others():
    """Summaries at a stretch's start, or taken in another order by the heads, break it."""
    assert fixed_blocks(6, block=1, local_blocks=3).layout.astype(int)[0].tolist() == [
        [1, 1, 1, 0, 0, 1],
        [1, 1, 1, 0, 0, 1],
        [1, 1, 1, 0, 0, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
    ]
    second = fixed_blocks(6, block=1, local_blocks=3, heads=5).layout
    np.testing.assert_array_equal(np.flatnonzero(second[1, 0]), [0, 1, 2, 4])
    np.testing.assert_array_equal(second[3], second[0])


@pytest.mark.parametrize(("n", "local", "summary"), [(16, 4, 1), (24, 6, 2), (64, 8, 8)])
def test_fixed_has_the_density_it_states(n, local, summary):
    pattern = fixed_blocks(n * 128, local_blocks=local, global_blocks=summary, heads=2)
    assert pattern.density == pytest.approx(local / n + summary / local - summary / n)


def test_bigbird_is_a_window_global_blocks_and_random_others():
    """Random blocks drawn among those already seen break it, and so does one draw for all heads."""
    n, w, g, r = 40, 5, 2, 3
    layout = np.asarray(bigbird_blocks(n, block=1, window_blocks=w, global_blocks=g, random_blocks=r, heads=4).layout)
    at = np.arange(n)
    certain = (abs(at[:, None] - at) <= 2) | (at < g) | (at < g)[:, None]
    assert layout[:, certain].all()
    np.testing.assert_array_equal((layout & ~certain).sum(2), np.broadcast_to(np.where(at < g, 0, r), (4, n)))
    assert len({head.tobytes() for head in layout}) == 4
    assert layout.mean() == pytest.approx((w + 2 * g + r) / n, rel=0.1)
    causal = np.asarray(bigbird_blocks(n, block=1, window_blocks=w, global_blocks=g, random_blocks=r, is_causal=True).layout)
    left = np.tril(~certain).sum(1)
    np.testing.assert_array_equal((causal[0] & ~certain).sum(1), np.minimum(left, r))


def test_bigbird_is_a_function_of_its_seed():
    """`np.random.default_rng()` breaks it."""
    make = functools.partial(bigbird_blocks, 8192, heads=2)
    assert make(seed=3) == make(seed=3)
    assert make(seed=3) != make(seed=4)


@pytest.mark.parametrize(
    "pattern", [longformer_blocks(5000, global_tokens=(0, 700, 701, 4999)), bigbird_blocks(5000, random_blocks=0)]
)
def test_window_and_global_blocks_are_symmetric(pattern):
    """Global columns without global rows, or a window of unequal sides, break it."""
    np.testing.assert_array_equal(pattern.layout, pattern.layout.swapaxes(1, 2))


def test_longformer_has_the_band_and_the_blocks_of_its_global_tokens():
    layout = longformer_blocks(8 * 128, window_blocks=3, global_tokens=(130, 200)).layout[0]
    at = np.arange(8)
    np.testing.assert_array_equal(layout, (abs(at[:, None] - at) <= 1) | (at == 1) | (at == 1)[:, None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fixed_blocks(0), "length is 0; it must be an int ≥ 1"),
        (lambda: fixed_blocks(512, block=1.5), "block is 1.5; it must be an int ≥ 1"),  # pyright: ignore[reportArgumentType]
        (lambda: fixed_blocks(512, global_blocks=3), "global_blocks is 3; it must divide local_blocks = 4"),
        (lambda: bigbird_blocks(512, window_blocks=2), "window_blocks is 2; it must be odd"),
        (lambda: bigbird_blocks(512, random_blocks=-1), "random_blocks is -1; it must be an int ≥ 0"),
        (lambda: bigbird_blocks(512, heads=0), "heads is 0; it must be an int ≥ 1"),
        (lambda: longformer_blocks(512, global_tokens=(3, 512)), r"holds 512; positions must be in \[0, 512\)"),
    ],
)
def test_refuses_patterns_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tile_that_is_dead_for_a_head_is_not_visited_by_it():
    """Each head has another block of keys that no query sees, full of NaN, which a visit would spread: 0 · NaN. Walking the
    union of the heads' tiles breaks it, and so does walking ranges, in either pass.
    """
    N, block = 4, 128  # a block of 128 is a tile
    layout = np.ones((N, 5, 5), bool)
    q, k, v, d_out = np.random.default_rng(0).standard_normal((4, 1, 5 * block, N, 8)).astype(np.float32)
    dead = np.zeros((5 * block, N), bool)
    for n in range(N):
        layout[n, :, n] = False
        dead[n * block : (n + 1) * block, n] = True
    k[:, dead] = v[:, dead] = np.nan

    @quick_jit
    def program(q, k, v, d_out):
        attend = functools.partial(dot_product_attention, block_mask=BlockMask(layout, block), implementation="xla")
        out, back = jax.vjp(lambda q, k, v: jnp.asarray(attend(q, k, v)), q, k, v)
        return out, *back(d_out)

    out, dq, dk, dv = map(np.asarray, program(q, k, v, d_out))
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))
    assert not dk[:, dead].any()
    assert not dv[:, dead].any()


def test_memory_stays_linear_in_length():
    """A layout written out to [T, S], or heads batched with all their tiles, breaks it: T·S·4 bytes are 64 MiB here."""

    def temporaries(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        blocks = bigbird_blocks(length, heads=2)
        loss = lambda *x: jnp.sum(jnp.asarray(dot_product_attention(*x, block_mask=blocks, implementation="xla")))  # noqa: E731
        analysis = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporaries(4096), temporaries(8192)
    assert short < 4096 * 4096 * 4 / 4
    assert long < 2.2 * short


# Prime lengths, grouped and uneven heads, a layout for each head.
ON_MESH = {
    "shared": Case(B=2, T=32, N=8, H=4, block=4, is_causal=True),
    "per_head": Case(B=2, T=32, N=8, K=2, H=4, block=4, layouts=8),
    "packed_gqa": Case(B=2, T=37, N=16, K=4, H=4, block=8, layouts=16, segments="packed"),
    "uneven": Case(B=2, T=37, S=41, N=6, K=2, H=4, block=4, layouts=6, local_window_size=(20, 9)),
    "uneven_kv": Case(B=2, T=29, N=7, K=1, H=4, block=4, layouts=7, is_causal=True),
}
MESHES = [(1, 8), (2, 4)]


def run(case: Case, attend, **options: Any) -> dict[str, Any]:
    """Output and gradients by name, the masks as arguments of the compiled program."""
    q, k, v, d_out, _ = case.arrays().values()
    masks = {name: x for name, x in case.mask_options().items() if name in ("segment_ids", "block_mask")}
    static = {name: x for name, x in case.mask_options().items() if name not in masks} | case.score_options() | options

    @quick_jit
    def program(q, k, v, d_out, masks):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, **masks, **static), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *back(d_out)), strict=True))

    return program(q, k, v, d_out, masks)


def assert_right(case: Case, got: dict[str, Any]) -> None:
    want = case.expected(lse_cotangent=False)
    assert errors_beyond(TOLERANCE["float32"], got, {name: want[name] for name in got}) == {}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("data", "seq"), MESHES)
@pytest.mark.parametrize("name", ON_MESH)
def test_each_device_uses_the_layouts_of_its_heads(name, data, seq, implementation):
    """Device p taking layouts p·N/P …, not those of the heads it is dealt, breaks the uneven rows; device 0's for all, the
    others.
    """
    attend = functools.partial(ulysses_attention, mesh=make_mesh(data=data, seq=seq), implementation=implementation)
    assert_right(ON_MESH[name], run(ON_MESH[name], attend))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("prepared", [False, True], ids=["options", "mask"])
def test_layouts_follow_the_heads_of_a_tensor_axis(kind, prepared):
    """A layout placed whole on each device of `head_axis` breaks it, given by itself or within a prepared mask."""
    case = Case(B=2, T=32, N=8, K=4, H=4, block=4, layouts=8, segments="packed")
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(kind,) * 3)
    attend = functools.partial(ulysses_attention, mesh=mesh, head_axis="tensor")

    def with_mask(q, k, v, *, is_causal, local_window_size, segment_ids, block_mask, **options):
        mask = make_mask(
            case.T,
            is_causal=is_causal,
            local_window_size=local_window_size,
            segment_ids=segment_ids,
            block_mask=block_mask,
        )
        return attend(q, k, v, mask=mask, **options)

    with jax.set_mesh(mesh):
        assert_right(case, run(case, with_mask if prepared else attend))


@pytest.mark.parametrize("prepared", [False, True], ids=["options", "mask"])
def test_outside_jit_and_in_a_shard_map_of_the_callers(prepared):
    """In the core, checking a mask's layout against a device's heads and not against all breaks it."""
    case = ON_MESH["per_head"]
    mesh, options = make_mesh(data=2, seq=4), case.mask_options()
    q, k, v, *_ = map(jnp.asarray, case.arrays().values())
    given: dict[str, Any] = {"mask": make_mask(case.T, **options)} if prepared else {"block_mask": options["block_mask"]}
    want = case.expected()["out"]
    assert relative_error(ulysses_attention(q, k, v, mesh=mesh, **given), want) <= TOLERANCE["float32"]
    tokens = PartitionSpec("data", "seq")
    core = lambda q, k, v: ulysses_attention_shard(q, k, v, **given)  # noqa: E731
    out = quick_jit(jax.shard_map(core, mesh=mesh, in_specs=tokens, out_specs=tokens))(q, k, v)
    assert relative_error(out, want) <= TOLERANCE["float32"]


def test_a_flax_layer_takes_a_block_mask_and_is_not_recompiled_for_an_equal_one():
    """Dropping `block_mask` from what the layer hands on breaks it; so does hashing layouts by identity."""
    mesh, x = make_mesh(data=2, seq=4), jax.random.normal(jax.random.key(0), (2, 32, 32))

    def layer(**options):
        return nnx.MultiHeadAttention(8, 32, attention_fn=attention_fn(mesh, **options), decode=False, rngs=nnx.Rngs(0))

    sparse, again = (nnx.split(layer(block_mask=longformer_blocks(32, block=4, window_blocks=1))) for _ in range(2))
    assert sparse[0] == again[0]
    assert hash(sparse[0]) == hash(again[0])
    dense = nnx.split(layer())
    out, full = (quick_jit(lambda x, parts=parts: nnx.merge(*parts)(x))(x) for parts in (sparse, dense))
    np.testing.assert_allclose(out[:, :4], full[:, :4], rtol=1e-4, atol=1e-6)  # the global block sees all
    assert relative_error(out[:, 4:], full[:, 4:]) > 0.1


BLOCKS = BlockMask(np.ones((4, 2, 2), bool), 16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"block_mask": BLOCKS},
            ValueError,
            "layout is for 4 heads, but q has N = 8; give one layout for all heads, or one for",
        ),
        ({"mask": make_mask(32, block_mask=BLOCKS)}, ValueError, "layout is for 4 heads, but q has N = 8"),
        ({"block_mask": BlockMask(BLOCKS.layout, 8)}, ValueError, r"for T = 32, S = 32, block = 8 it must be \[1 or N, 4, 4\]"),
        ({"block_mask": BLOCKS.layout}, ValueError, "block_mask is an array .* it must be a BlockMask"),
        ({"mask": make_mask(32), "block_mask": longformer_blocks(32)}, ValueError, "mask was given together with block_mask"),
        (
            {"block_mask": longformer_blocks(32), "ring_axis": "data", "batch_axes": ()},
            NotImplementedError,
            "block_mask was given with ring_axis = 'data'; leave ring_axis out",
        ),
    ],
)
def test_refuses_block_masks_that_do_not_fit(options, error, message):
    x = jnp.zeros((2, 32, 8, 4))
    with pytest.raises(error, match=message):
        ulysses_attention(x, x, x, mesh=make_mesh(data=2, seq=4), **options)


@pytest.mark.parametrize(
    ("implementation", "block", "lacking"),
    [("cudnn", 128, "block_mask"), ("pallas", 64, r"blocks of 64 \(only multiples of 128\)")],
)
def test_an_implementation_that_lacks_block_masks_says_so(implementation, block, lacking, monkeypatch):
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"'{implementation}' cannot do {lacking}.*use implementation='xla'"):
        dot_product_attention(x, x, x, block_mask=longformer_blocks(256, block=block), implementation=implementation)
