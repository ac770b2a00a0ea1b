"""Hugging Face folders: written, read, read onto meshes; an independent Llama in numpy says what the tensors mean."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.trainers import relative_error
from ulysses_jax import cli, hf
from ulysses_jax.config import ModelConfig, RopeScaling
from ulysses_jax.flax_layers import attention_fn
from ulysses_jax.mesh import make_mesh
from ulysses_jax.model import Transformer
from ulysses_jax.zero import zero_shardings

LLAMA = ModelConfig(
    vocab_size=40,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    dtype="float32",
    norm_eps=1e-6,
)
MODELS = {
    "llama": dataclasses.replace(LLAMA, rope_theta=500_000.0, rope_scaling=RopeScaling(original_length=8)),
    "mistral": dataclasses.replace(LLAMA, local_window_size=3),
    "qwen2": dataclasses.replace(LLAMA, projection_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
}
TOKENS = np.random.default_rng(1).integers(0, LLAMA.vocab_size, (2, 12))


def model_of(config: ModelConfig) -> Transformer:
    """Its parameters all random, scales and biases too."""
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), nnx.to_pure_dict(state))
    return nnx.merge(graph, params)


def parameters(model: Transformer) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(model)[1]))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}


def reference(said: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits as these families' descriptions have them, from a folder's own tensors; float64, a head at a time."""
    w = {name: x.astype(np.float64) for name, x in tensors.items()}
    N, K, H = said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]
    T = tokens.shape[1]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + said["rms_norm_eps"]) * scale

    frequency = said["rope_theta"] ** -(np.arange(0, H, 2) / H)
    if stretch := said["rope_scaling"]:
        old, low, high = (stretch[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
        part = np.clip((old * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        frequency = (1 - part) * frequency / stretch["factor"] + part * frequency
    angle = np.concatenate([np.arange(T)[:, None] * frequency] * 2, axis=-1)

    def rope(x):
        half = np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], axis=-1)
        return x * np.cos(angle) + half * np.sin(angle)

    t, s = np.arange(T)[:, None], np.arange(T)[None]
    seen = (s <= t) & (s > t - (said.get("sliding_window") or T))
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(said["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h, own = norm(x, w[layer + "input_layernorm.weight"]), layer + "self_attn."
        y = 0
        for n in range(N):
            head = {}
            for name, at in (("q", n), ("k", n * K // N), ("v", n * K // N)):
                rows = slice(at * H, (at + 1) * H)
                head[name] = h @ w[f"{own}{name}_proj.weight"][rows].T + w.get(f"{own}{name}_proj.bias", np.zeros(N * H))[rows]
                if f"{own}{name}_norm.weight" in w:
                    head[name] = norm(head[name], w[f"{own}{name}_norm.weight"])
            logits = np.where(seen, rope(head["q"]) @ rope(head["k"]).swapaxes(1, 2) / np.sqrt(H), -np.inf)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            z = p / p.sum(-1, keepdims=True) @ head["v"]
            y = y + z @ w[own + "o_proj.weight"][:, n * H : (n + 1) * H].T
        x = x + y
        h, own = norm(x, w[layer + "post_attention_layernorm.weight"]), layer + "mlp."
        gate = h @ w[own + "gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[own + "up_proj.weight"].T)) @ w[own + "down_proj.weight"].T
    table = w["model.embed_tokens.weight" if said["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ table.T


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_means_what_its_family_says_and_comes_back_unchanged(tmp_path, family):
    """A matrix not transposed, or a window one too wide, breaks it."""
    model = model_of(MODELS[family])
    hf.save(model, tmp_path, dtype="float32")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == family
    want = reference(said, load_file(tmp_path / "model.safetensors"), TOKENS)
    assert relative_error(np.asarray(model(jnp.asarray(TOKENS))), want) < 1e-5
    again = hf.load(tmp_path)
    assert again.config == dataclasses.replace(model.config, dtype="bfloat16")
    before, after = parameters(model), parameters(again)
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)


@pytest.mark.parametrize(("data", "seq", "stage"), [(1, 8, 3), (2, 4, 3), (4, 1, 0)])
def test_each_device_reads_its_own_part(tmp_path, data, seq, stage):
    """Reading a range of rows where columns are divided breaks it."""
    config = dataclasses.replace(MODELS["qwen2"], num_heads=8, num_kv_heads=8, embed_dim=20, mlp_dim=24)
    model = model_of(config)  # 8 divides neither 20 nor, of some leaves, the first dim
    hf.save(model, tmp_path, dtype="float32")
    mesh = make_mesh(data=data, seq=seq, devices=jax.devices()[: data * seq])
    read = hf.load(tmp_path, mesh=mesh, stage=stage, attention=attention_fn(mesh))
    before, after = parameters(model), parameters(read)
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    params = nnx.to_pure_dict(nnx.split(read)[1])
    places = zero_shardings(params, (), mesh=mesh, stage=stage)[0]
    assert jax.tree.all(jax.tree.map(lambda x, at: x.sharding == at, params, places))


def test_several_files_and_half_the_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "FILE_BYTES", 1500)
    model = model_of(MODELS["llama"])
    hf.save(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert all((tmp_path / name).stat().st_size < 1500 + 2000 for name in files)
    for name, x in parameters(hf.load(tmp_path)).items():
        np.testing.assert_array_equal(x, parameters(model)[name].astype("bfloat16").astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": None}, {"rope_theta": 7.0}),
        ({"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": False}, {"local_window_size": None}),
        ({"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": True}, {"local_window_size": None}),
        (
            {"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
            {"local_window_size": 3},
        ),
        ({"model_type": "mistral", "sliding_window": None}, {"local_window_size": None}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 4, "num_kv_heads": 4}),
    ],
)
def test_what_config_json_may_say(tmp_path, said, means):
    hf.save(model_of(LLAMA), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    config = hf.read_config(tmp_path)
    assert {name: getattr(config, name) for name in means} == means


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only llama, mistral, qwen2, qwen3 are read"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the model has only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; the model has only False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type is 'yarn'; the model has 'default' and 'llama3'"),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "some layers slide and some do not",
        ),
        ({"intermediate_size": 32}, "model.layers.0.mlp.down_proj.weight is [16, 24]; by config.json it is [16, 32]"),
        ({"num_hidden_layers": 3}, "tensors are missing, such as ['model.layers.2."),
        ({"num_hidden_layers": 1}, "tensors belong to no part of the model, such as ['model.layers.1."),
    ],
)
def test_what_the_model_has_not_is_refused(tmp_path, said, message):
    hf.save(model_of(LLAMA), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.load(tmp_path)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist; give the folder of a Hugging Face model"):
        hf.load(tmp_path / "nowhere")
    hf.save(model_of(LLAMA), tmp_path)
    with pytest.raises(ValueError, match="holds weights already; choose another folder"):
        hf.save(model_of(LLAMA), tmp_path)
    (tmp_path / hf.SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds neither model.safetensors.index.json nor model.safetensors"):
        hf.load(tmp_path)
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"names model-00001-of-00002.safetensors, which is not there"):
        hf.load(tmp_path)


def test_without_safetensors_nothing_is_begun(tmp_path, monkeypatch):
    """A run is refused before it compiles, and a folder that cannot be filled is not made."""
    hf.save(model_of(LLAMA), tmp_path / "here")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="need safetensors, the extra hf"):
        hf.check(tmp_path / "here", LLAMA)
    with pytest.raises(ValueError, match="need safetensors, the extra hf"):
        hf.save(model_of(LLAMA), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_tied_output_that_is_written_all_the_same_is_passed_over(tmp_path):
    hf.save(model_of(MODELS["qwen2"]), tmp_path, dtype="float32")
    path = tmp_path / hf.SINGLE
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    hf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": False}, "model.is_causal is False; none of llama, mistral, qwen2, qwen3 has that"),
        ({"logits_soft_cap": 30.0}, "model.logits_soft_cap is 30.0; none of"),
        ({"qk_norm": True, "projection_bias": True}, "Qwen3 has the first and Qwen2 the second"),
    ],
)
def test_a_model_of_no_family_is_not_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.save(model_of(dataclasses.replace(LLAMA, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


RUN = [
    "train",
    "demo",
    *("--mesh.data", "2", "--mesh.seq", "2", "--data.seq-len", "64", "--data.batch-size", "4", "--steps", "2"),
]
RUN += ["--model.vocab-size", "258", "--model.num-layers", "2", "--model.embed-dim", "16", "--model.num-heads", "4"]
RUN += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.mlp-dim", "24", "--optimizer.learning-rate", "1e-30"]


@pytest.mark.slow
def test_a_run_starts_from_a_folder_and_is_exported_to_another(tmp_path, monkeypatch, capsys):
    """With steps too small to see, what comes out is what went in. Starting from random weights breaks it."""
    monkeypatch.chdir(tmp_path)
    model = model_of(dataclasses.replace(LLAMA, vocab_size=258))
    hf.save(model, "there", dtype="float32", max_length=4096)
    assert cli.main([*RUN, "--out", "run", "--init-from", "there"]) == 0
    assert cli.main(["export", "run", "back", "--dtype", "float32"]) == 0
    said = json.loads(Path("back/config.json").read_text())
    assert said["max_position_embeddings"] == 4096, "of the model it began with, which is more than the run's sequences"
    modes = {path.stat().st_mode for path in Path("back").iterdir()}
    assert len(modes) == 1, "safetensors leaves its files to their owner alone"
    for name, x in parameters(hf.load("back")).items():
        np.testing.assert_allclose(x, parameters(model)[name], rtol=1e-6, err_msg=name)
    Path("there").rename("elsewhere")
    assert cli.main(["export", "run", "short"]) == 0
    assert "there could not be read, so its context length is the run's" in " ".join(capsys.readouterr().out.split())
    Path("elsewhere").rename("there")
    assert cli.main([*RUN, "--out", "other", "--init-from", "there", "--model.num-kv-heads", "4"]) == 2
    assert "model.num_kv_heads is 4, but in there it is 2; set model.num_kv_heads to that." in capsys.readouterr().err
    assert cli.main(["export", "there", "away"]) == 2
    assert "there is no run of ulysses" in capsys.readouterr().err
