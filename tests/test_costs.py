"""Closed forms against counting and against compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainers import FAST, MODEL, collectives
from ulysses_jax import costs, recipes
from ulysses_jax.attention.hopper import HEAD_DIMS
from ulysses_jax.config import DataConfig, MemoryConfig, MeshConfig, TrainConfig
from ulysses_jax.mesh import make_mesh
from ulysses_jax.ulysses import ulysses_attention


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 1, 3, 6, 7, 50])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_visible_pairs_equal_a_count(length, window, is_causal):
    count = sum(
        (s <= t or not is_causal) and (window is None or abs(t - s) <= window) for t in range(length) for s in range(length)
    )
    assert costs.visible_pairs(length, is_causal=is_causal, window=window) == count


def test_step_flops_are_six_a_parameter_and_token_and_attention():
    """A layer's matrices by hand, forward 2 a weight and token, backward twice that; attention's two products alike."""
    model, B, T = recipes.tiny(), 3, 100
    layer = 4 * 128 * 128 + 3 * 128 * 384  # Q, K, V, output; gate, up, down
    attention = 2 * (2 * 2 * (T * (T + 1) // 2) * 128)  # 2 layers of Q·Kᵀ and P·V over the visible half
    head = 320 * 128  # the embedding is looked up, not multiplied
    assert costs.step_flops(model, batch_size=B, seq_len=T) == B * (6 * (2 * layer + head) * T + 3 * attention)


def test_step_flops_count_a_tied_head_and_a_window():
    model, B, T = dataclasses.replace(recipes.tiny(), tie_embeddings=True), 1, 100
    whole = costs.step_flops(recipes.tiny(), batch_size=B, seq_len=T)
    assert costs.step_flops(model, batch_size=B, seq_len=T) == whole
    windowed = costs.step_flops(dataclasses.replace(model, local_window_size=0), batch_size=B, seq_len=T)
    assert whole - windowed == 3 * 2 * 4 * 128 * (T * (T + 1) // 2 - T)
    both_ways = costs.step_flops(dataclasses.replace(model, is_causal=False), batch_size=B, seq_len=T)
    assert both_ways - whole == 3 * 2 * 4 * 128 * (T * T - T * (T + 1) // 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2])
def test_pairs_of_packed_documents_add_up(window, is_causal):
    """Counting positions of the row in place of those in the document breaks it."""
    lengths = [[5, 1, 4], [10]]
    positions = np.stack([np.concatenate([np.arange(n, dtype=np.int32) for n in row]) for row in lengths])
    alone = sum(costs.visible_pairs(n, is_causal=is_causal, window=window) for row in lengths for n in row)
    assert costs.seen_pairs(positions, is_causal=is_causal, window=window) == alone


def test_recomputed_flops_are_those_of_the_products_run_again():
    """Per token and layer of `tiny`, by hand; counting the down projection, whose output no gradient needs, breaks it."""
    model = recipes.tiny()
    kernel = costs.attention_flops(3 * 100 * 101 // 2, 4, 32)
    qkv, out, gate_up = (2 * 3 * 100 * 128 * n for n in (3 * 128, 128, 2 * 384))
    expected = {"all": 0, "products": 0, "projections": out + gate_up, "attention": out + gate_up + qkv}
    expected["inputs"] = expected["attention"] + kernel
    for save, flops in expected.items():
        assert costs.recomputed_flops(model, MemoryConfig(save=save), batch_size=3, seq_len=100) == 2 * flops  # pyright: ignore[reportArgumentType]
    half = MemoryConfig(save="products", save_layers=0.5)
    assert costs.recomputed_flops(model, half, batch_size=3, seq_len=100) == expected["inputs"]
    assert costs.recomputed_flops(model, MemoryConfig(), batch_size=3, seq_len=100, named=False) == 2 * expected["inputs"]


def test_rates_by_three_customs():
    config = TrainConfig(model=recipes.llama_7b(), mesh=MeshConfig(seq=2), data=DataConfig(seq_len=65536, batch_size=1))
    found = costs.rates(config, 8.0, "NVIDIA H100 80GB HBM3")
    flops = costs.step_flops(config.model, batch_size=1, seq_len=65536)
    assert found["tokens_per_s"] == 8192 == 2 * found["tokens_per_s_per_device"]
    assert found["utilization"] == pytest.approx(flops / 16 / 989e12)
    whole = costs.step_flops(dataclasses.replace(config.model, is_causal=False), batch_size=1, seq_len=65536)
    assert found["utilization_full_square"] == pytest.approx(whole / 16 / 989e12)
    assert found["utilization"] < found["utilization_with_recompute"] < found["utilization_full_square"]
    packed = costs.rates(config, 8.0, "NVIDIA H100 80GB HBM3", pairs=16 * costs.visible_pairs(4096, is_causal=True))
    assert packed["utilization"] < found["utilization"]
    assert packed["utilization_full_square"] == found["utilization_full_square"]
    assert "utilization" not in costs.rates(config, 8.0, "cpu")


def test_a_rate_above_the_peak_is_refused():
    """Trap 2; Megatron-Bridge#2667 reported 1,937 TFLOP/s of such a chip. Comparing all devices' rate with it breaks it."""
    config = TrainConfig(model=recipes.llama_7b(), mesh=MeshConfig(seq=2), data=DataConfig(seq_len=65536, batch_size=1))
    assert costs.rates(config, 4.0, "NVIDIA H100 80GB HBM3")["model_tflops_per_device"] < 989
    with pytest.raises(
        ValueError, match=r"took 1.5 s, which is 1,9\d\d TFLOP/s a device, but the peak of NVIDIA H100 .* is 989"
    ):
        costs.rates(config, 1.5, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_exchange_elements_equal_the_compiled_all_to_alls(kv_heads, degree):
    """MHA, GQA, and KV heads fewer than devices; repeating them to N heads in place of P breaks it."""
    B, T, N, H = 2, 16, 8, 4
    mesh = make_mesh(seq=degree)
    q, kv = (jax.ShapeDtypeStruct((B, T, n, H), jnp.float32) for n in (N, kv_heads))
    exchange = jax.jit(lambda q, k, v: ulysses_attention(q, k, v, mesh=mesh, implementation="reference"))
    crossings = collectives(exchange.lower(q, kv, kv).compile(FAST))
    assert [c.op for c in crossings] == ["all-to-all"] * 4
    model = dataclasses.replace(MODEL, num_heads=N, num_kv_heads=kv_heads, head_dim=H)
    handed_over = sum(c.elements for c in crossings)
    assert handed_over == costs.exchange_elements(model, batch_size=B, seq_len=T, degree=degree)


def test_exchange_is_the_papers_formula_where_every_head_has_its_kv_and_constant_with_the_mesh():
    """4·T·D/P, unchanged when T and P grow together; nothing on one device."""
    model = dataclasses.replace(MODEL, num_heads=16, num_kv_heads=16)
    sent = {P: costs.exchange_elements(model, batch_size=1, seq_len=1024 * P, degree=P) for P in (2, 4, 8)}
    assert set(sent.values()) == {4 * 1024 * 16 * model.head_dim}
    assert costs.exchange_elements(model, batch_size=1, seq_len=1024, degree=1) == 0


def test_divided_bytes_round_up_and_leave_the_rest_whole():
    assert costs.divided_bytes({"a": (80, True), "b": (9, True), "c": (5, False)}, devices=8, itemsize=2) == 2 * (10 + 2 + 5)


@pytest.mark.parametrize(("heads", "fewer", "more"), [((32, 8), 32, 64), ((32, 8), 16, 24), ((6, 6), 3, 4)])
def test_devices_without_a_head_of_their_own_make_attention_no_faster(heads, fewer, more):
    """A device computes ⌈N/P⌉ heads: alike with both numbers of devices. Dividing by all devices breaks it."""
    model = dataclasses.replace(recipes.llama3_8b(), num_heads=heads[0], num_kv_heads=heads[1])
    data = DataConfig(seq_len=196608, batch_size=1)

    def seconds(degree: int) -> dict[str, float]:
        return costs.step_seconds(TrainConfig(model=model, mesh=MeshConfig(seq=degree), data=data), costs.GPUS["h100"])

    assert seconds(more)["attention"] == pytest.approx(seconds(fewer)["attention"])


def test_copies_of_heads_are_projected_too():
    """32 heads over 8 KV heads on 64 devices: each token is projected to 64 and 64. Counting N and K breaks it."""
    config = TrainConfig(
        model=recipes.llama3_8b(),
        mesh=MeshConfig(seq=64),
        data=DataConfig(seq_len=131072, batch_size=1),
        memory=MemoryConfig(save="products"),
    )
    gpu, model = costs.GPUS["h100"], config.model
    plain = costs.step_flops(model, batch_size=1, seq_len=131072, pairs=0)
    copies = 6 * 131072 * 32 * 2 * 4096 * 128 * ((64 - 32) + (64 - 8))  # of queries and output, of keys and values
    assert costs.step_seconds(config, gpu)["matrices"] == pytest.approx((plain + copies) / 64 / gpu.gemm_flops)


def test_copies_of_heads_are_saved_too():
    """What attention saves lies as it was exchanged, 64 heads on 64 devices. Counting the model's 32 breaks it."""
    sizes = {"model": recipes.llama3_8b(), "mesh": MeshConfig(seq=64), "data": DataConfig(seq_len=131072, batch_size=1)}
    per_token = 2 * 4096 + 2 * 64 * 128 + 4 * 64  # a layer's input, attention's output and its log of sums
    config = TrainConfig(**sizes, memory=MemoryConfig(save="attention"))
    assert costs.device_bytes(config)["activations"] == 32 * 131072 / 64 * per_token


@pytest.mark.parametrize(("save", "beside"), [("projections", 0), ("products", 2 * (4096 + 2 * 11008))])
def test_of_what_is_read_last_the_rest_stays(save, beside):
    """Of 7B at 65,536 tokens on two devices a layer's input, q, k and v go; attention's output, its lse and the sum stay,
    and with products the exchanged output, gate and up.
    """
    config, memory = recipes.recipe("llama-7b-64k"), MemoryConfig(save=save, offload_layers=1.0, offload_late=True)
    config = dataclasses.replace(config, mesh=MeshConfig(seq=2), memory=memory)
    of_all = 32 * config.data.seq_len // 2
    assert costs.saved_bytes(config) == (of_all * (2 * 4096 + 4 * 32 + 2 * 4096 + beside), of_all * 2 * 4 * 4096)
    again, whole = (
        costs.recomputed_flops(config.model, dataclasses.replace(memory, offload_late=late), batch_size=1, seq_len=65536)
        for late in (True, False)
    )
    assert whole - again == (2 * 65536 * 4096 * 4096 * 32 if save == "projections" else 0)


@pytest.mark.parametrize(("head_dim", "as_run"), [(128, 128), (96, 128), (64, 64), (320, 320)])
def test_the_kernels_that_pad_heads_take_the_time_and_memory_of_what_they_run(head_dim, as_run):
    """Their FLOPs and their backward's arrays are padded, and neither those of other implementations nor what is saved."""
    config, gpu = recipes.recipe("gpt-30b-128k"), costs.GPUS["h100"]
    model = dataclasses.replace(config.model, head_dim=head_dim, vocab_size=1024)  # no loss above attention's backward
    config = dataclasses.replace(config, model=model, implementation="pallas")
    other = dataclasses.replace(config, implementation="xla")
    seconds = [costs.step_seconds(x, gpu)["attention"] for x in (config, other)]
    assert seconds[0] / seconds[1] == pytest.approx(as_run / head_dim)
    tokens = config.data.batch_size * config.data.seq_len / config.mesh.size
    kept, tiled = (dataclasses.replace(config, memory=x) for x in (MemoryConfig(save="attention"), MemoryConfig(mlp_tile=1024)))
    working = [costs.device_bytes(dataclasses.replace(tiled, implementation=x))["working"] for x in ("pallas", "xla")]
    more = 2 * tokens * (8 * model.num_heads + 6.4 * model.num_kv_heads) * (as_run - head_dim)
    assert working[0] - working[1] == pytest.approx(more)
    each = 2 * model.embed_dim + 2 * model.num_heads * head_dim + 4 * model.num_heads
    assert costs.saved_bytes(kept)[0] == pytest.approx(each * tokens * model.num_layers)


def test_the_heads_that_kernels_have_are_these():
    assert tuple(HEAD_DIMS) == costs.KERNEL_HEAD_DIMS
