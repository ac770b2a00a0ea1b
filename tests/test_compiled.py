"""The compiled training step, read: it crosses devices where the design says, with the sizes it says, and nowhere else."""

import collections
import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from tests.trainers import FAST, LENGTH, Collective, collectives, compiled_step, hlo, program, tiny
from ulysses_jax import train
from ulysses_jax.attention import dot_product_attention
from ulysses_jax.config import ModelConfig, TrainConfig, deal_heads
from ulysses_jax.mesh import make_mesh
from ulysses_jax.zero import undivided

DATA, SEQ = 2, 4
MODEL = tiny().model

# All-to-alls in the body of the loop over layers, forward and backward. Each forward sends q, k and v there and the output
# back, and so does each backward with their gradients. A backward that recomputes the layer needs q, k and v on whole
# sequences again, and the output back on its tokens for the MLP's input: "attention" keeps the output as the kernel made
# it, so it recomputes the four crossings like "inputs", but not the attention between them; "projections" sends only the
# output again.
EXCHANGES = {"all": (4, 4), "products": (4, 4), "projections": (4, 5), "attention": (4, 8), "inputs": (4, 8)}


def config(save="inputs", data=DATA, seq=SEQ, **options) -> TrainConfig:
    return tiny(data, seq, memory={"save": save}, **options)


def crossings(config: TrainConfig) -> dict[str, list[Collective]]:
    found = collections.defaultdict(list)
    for c in collectives(compiled_step(config)):
        found[c.op].append(c)
    return found


def is_sequence_parallel(found: list[Collective], model: ModelConfig, degree: int, tokens: int) -> bool:
    """Trap 2: all-to-alls in sets of four, each of the T/P tokens of a device, two with N heads and two with max(K, P)."""
    sizes = collections.Counter(c.elements for c in found)
    queries, kv = (tokens // degree * n * model.head_dim for n in (model.num_heads, max(model.num_kv_heads, degree)))
    return len(found) >= 8 and sizes == collections.Counter({queries: len(found) // 2}) + collections.Counter(
        {kv: len(found) // 2}
    )


@pytest.mark.slow
@pytest.mark.parametrize("save", EXCHANGES)
def test_the_step_holds_the_all_to_alls_of_each_layer_and_no_more(save):
    """Losing the name "attention_in" breaks it: queries, keys and values then cross again."""
    found = crossings(config(save))["all-to-all"]
    by_loop = collections.Counter(c.computation for c in found)
    assert sorted(by_loop.values()) == sorted(EXCHANGES[save])
    if save == "projections":
        return
    assert is_sequence_parallel(found, MODEL, SEQ, 4 * LENGTH)
    assert {c.groups for c in found} == {found[0].groups}
    assert all(len(devices) == SEQ for devices in groups(found[0]))


def groups(c: Collective) -> list[list[int]]:
    """The device ids of each group that exchanges, from the mesh axes it names."""
    named = [axis for axis in ("data", "seq") if f"'{axis}'" in c.groups.rsplit("]", 1)[1]]
    ids = np.arange(DATA * SEQ).reshape(DATA, SEQ)
    return {"data": ids.T, "seq": ids, "data,seq": ids.reshape(1, -1)}[",".join(named)].tolist()


def weight_shapes(config: TrainConfig) -> set[tuple[int, ...]]:
    """Shapes of the parameters as they are used: a layer's without the leading dim of layers."""
    params = program(config).abstract["params"]
    shapes = {x.shape[1:] for x in jax.tree.leaves(params["layers"])}
    return shapes | {x.shape for name in params if name != "layers" for x in jax.tree.leaves(params[name])}


@pytest.mark.slow
@pytest.mark.parametrize("save", ["inputs", "products", "all"])
def test_only_weights_and_token_ids_are_gathered(save):
    """Leaving the gathers to XLA breaks it: under ZeRO-3 it gathers activations [T, F] and logits [T, V]."""
    own = config(save)
    gathered = collections.Counter(result for c in crossings(own)["all-gather"] for result in c.results)
    ids = [(dtype, shape) for dtype, shape in gathered if dtype.startswith("s")]
    assert ids == [("s32", (4, LENGTH))]
    assert gathered[ids[0]] == 1, "segment ids are gathered once a step, for all layers"
    weights = {shape for dtype, shape in gathered if (dtype, shape) not in ids}
    assert weights <= weight_shapes(own)
    assert (MODEL.embed_dim, MODEL.mlp_dim) in weights


@pytest.mark.slow
def test_gradients_are_reduce_scattered_once_for_each_divided_leaf():
    """And all-reduced for each that no stage divides; besides them only scalars are summed."""
    own = config()
    p, found = program(own), crossings(own)
    whole = undivided(p.abstract["params"], mesh=p.mesh)
    leaves = len(jax.tree.leaves(p.abstract["params"]))
    assert sum(len(c.results) for c in found["reduce-scatter"]) == leaves - len(whole)
    summed = [shape for c in found["all-reduce"] for _, shape in c.results if shape]
    assert len(summed) == len(whole) > 0
    assert {tuple(n for n in shape if n > 1) for shape in summed} <= {
        tuple(n for n in shape if n > 1) for shape in weight_shapes(own)
    }
    assert not found["collective-permute"]
    assert {devices for c in found["reduce-scatter"] for devices in map(len, groups(c))} == {DATA * SEQ}


@pytest.mark.slow
def test_no_activation_is_of_the_whole_sequence():
    """No [T, D], [T, F] or [T, V]: only the heads a device attends with have a whole sequence's length."""
    text = hlo(compiled_step(config()))
    tokens = 4 * LENGTH
    whole = {(4, LENGTH, n) for n in (MODEL.mlp_dim, MODEL.vocab_size, MODEL.embed_dim)}
    whole |= {(tokens, n) for n in (MODEL.mlp_dim, MODEL.vocab_size, MODEL.embed_dim)}
    own = {(4, LENGTH // SEQ, MODEL.mlp_dim), (tokens // SEQ, MODEL.mlp_dim)}
    assert any(f"f32[{','.join(map(str, shape))}]" in text for shape in own), "the shapes are read rightly"
    assert not [shape for shape in whole if f"f32[{','.join(map(str, shape))}]" in text]


def test_the_values_cross_once_the_output_weight_is_here():
    """A gather of it that begins with the kernel waits for the kernel's end, and the other device for it."""
    own = config()
    p, tokens, H = program(own), 4 * LENGTH // SEQ, MODEL.head_dim
    text = p.step.lower(p.abstract, train.batch_shapes(own, p.mesh)).as_text()
    shapes = [re.findall(r"tensor<(\S+)xf32>", line) for line in text.splitlines() if "optimization_barrier" in line]
    pairs = [[math.prod(map(int, shape.split("x"))) for shape in found[:2]] for found in shapes if len(found) == 2]
    values = len(deal_heads(MODEL.num_heads, MODEL.num_kv_heads, SEQ).keys)
    assert [tokens * values * H, MODEL.num_heads * H * MODEL.embed_dim] in pairs


@pytest.mark.slow
def test_without_a_seq_axis_nothing_is_exchanged():
    found = crossings(config(data=2, seq=1))
    assert not found["all-to-all"]
    assert found["reduce-scatter"], "the data axis is at work"


def own_tokens_only(q, k, v, *, mask, logits_soft_cap):
    """What a model computes whose attention knows nothing of the other devices' tokens."""
    del mask
    return dot_product_attention(q, k, v, is_causal=True, logits_soft_cap=logits_soft_cap)


@pytest.mark.slow
def test_a_step_without_sequence_parallelism_is_caught(monkeypatch):
    """Trap 2: a planted attention on each device's own tokens compiles, trains, and holds no all-to-all."""
    monkeypatch.setattr(train, "ShardAttention", lambda **options: own_tokens_only)
    own = config()
    p = train.build(own, make_mesh(data=DATA, seq=SEQ))
    found = collectives(p.step.lower(p.abstract, train.batch_shapes(own, p.mesh)).compile(FAST))
    assert not is_sequence_parallel([c for c in found if c.op == "all-to-all"], MODEL, SEQ, 4 * LENGTH)


def test_attention_without_sequence_parallelism_is_refused_its_mask(monkeypatch):
    """Trap 2: one-device attention, handed to the divided model, finds a mask for the whole sequence and says so."""
    monkeypatch.setattr(train, "ShardAttention", lambda **options: dot_product_attention)
    own = dataclasses.replace(config(), seed=1)
    p = train.build(own, make_mesh(data=DATA, seq=SEQ))
    with pytest.raises(ValueError, match=f"mask was made for T = {LENGTH}, S = {LENGTH}, but q has T = {LENGTH // SEQ}"):
        p.step.lower(p.abstract, train.batch_shapes(own, p.mesh))
