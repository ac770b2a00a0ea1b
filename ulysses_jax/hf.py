"""Hugging Face weights in and out: Llama, Mistral, Qwen2 and Qwen3 folders of `config.json` and safetensors.

What these models share is `Transformer`'s own shape: RMSNorm before, RoPE on pairs half a head apart, grouped queries, SwiGLU.
A Hugging Face matrix is [outputs, inputs], ours [inputs …, outputs …], and layers are stacked. Weights are read piece by piece,
each device's own, so that a host never holds a model. The extra `hf` installs safetensors, which this needs.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from ulysses_jax.config import MemoryConfig, ModelConfig, RopeScaling
from ulysses_jax.model import Transformer
from ulysses_jax.zero import zero_shardings

__all__ = ["check", "context_length", "load", "load_params", "read_config", "save"]

type Tree = Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHAPE = ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
SHAPE += ("qk_norm", "projection_bias", "tie_embeddings")
FILE_BYTES = 5e9  # of one file of weights, as Hugging Face cuts them


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter's Hugging Face name, and how many of our leading dims are a matrix's `inputs`; 0 for what is alike."""

    name: str
    inputs: int = 0


LAYER = {
    "attention_norm.scale": Source("input_layernorm.weight"),
    "attention.query": Source("self_attn.q_proj.weight", 1),
    "attention.key": Source("self_attn.k_proj.weight", 1),
    "attention.value": Source("self_attn.v_proj.weight", 1),
    "attention.out": Source("self_attn.o_proj.weight", 2),
    "attention.query_bias": Source("self_attn.q_proj.bias"),
    "attention.key_bias": Source("self_attn.k_proj.bias"),
    "attention.value_bias": Source("self_attn.v_proj.bias"),
    "attention.query_norm.scale": Source("self_attn.q_norm.weight"),
    "attention.key_norm.scale": Source("self_attn.k_norm.weight"),
    "mlp_norm.scale": Source("post_attention_layernorm.weight"),
    "mlp.gate": Source("mlp.gate_proj.weight", 1),
    "mlp.up": Source("mlp.up_proj.weight", 1),
    "mlp.down": Source("mlp.down_proj.weight", 1),
}
OTHERS = {"embedding.table": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head.table": "lm_head.weight"}


def load(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    stage: int = 0,
    attention: Callable | None = None,
    memory: MemoryConfig | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, its parameters in float32.

    Args:
      folder: holds `config.json` and `model.safetensors`, or several files and their index.
      mesh: where the parameters go, as `zero_shardings` divides them; the first device by default.
      stage: ZeRO's; 3 divides parameters.
      attention: as for `Transformer`, such as `attention_fn(mesh)`.
      memory: as for `Transformer`.

    Raises:
      ValueError: no such folder, weights that are not safetensors, an architecture or an option that `Transformer` lacks,
        tensors that are missing, unknown, or of another shape than `config.json` says.
    """
    folder = Path(folder)
    config = read_config(folder)
    more = {} if attention is None else {"attention": attention}
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, memory=memory, rngs=nnx.Rngs(0), **more)))
    params = nnx.to_pure_dict(state)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), params)
    else:
        places = zero_shardings(params, (), mesh=mesh, stage=stage)[0]
    placed = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, places)
    return nnx.merge(graph, load_params(folder, placed))


def check(folder: str | Path, config: ModelConfig) -> None:
    """Refuse a folder whose weights a model of `config` cannot take; windows and RoPE may differ, as long contexts change them.

    Raises:
      ValueError: the first size that differs, no safetensors to read with, or as for `read_config`.
    """
    _safetensors()
    found = read_config(folder)
    for name in SHAPE:
        ours, theirs = getattr(config, name), getattr(found, name)
        _need(ours == theirs, f"model.{name} is {ours}, but in {folder} it is {theirs}; set model.{name} to that.")


def load_params(folder: str | Path, params: Tree) -> Tree:
    """The parameters of a Hugging Face folder, where `params` (shapes with shardings, of a model that passes `check`) says.

    Raises:
      ValueError: as for `load`.
    """
    with _tensors(Path(folder)) as tensors:
        _check_names(tensors, params)

        def read(path, x: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return _read(tensors, _path(path), x.shape, index)

            return jax.make_array_from_callback(x.shape, x.sharding, part)

        return jax.tree_util.tree_map_with_path(read, params)


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` that a Hugging Face `config.json` means.

    Raises:
      ValueError: no such file, or what `Transformer` has not: another family, activation or RoPE, layers of several kinds.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a Hugging Face model, with config.json and safetensors.")
    said: dict[str, Any] = json.loads(path.read_text())
    family = said.get("model_type")
    _need(family in FAMILIES, f"{path}: model_type is {family!r}; only {', '.join(FAMILIES)} are read.")
    # attention_bias would be one on the output too; Qwen2 has them on Q, K and V alone, without saying so.
    for name, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        _need(said.get(name, wanted) == wanted, f"{path}: {name} is {said.get(name)!r}; the model has only {wanted!r}.")
    heads = said["num_attention_heads"]
    return ModelConfig(
        vocab_size=said["vocab_size"],
        num_layers=said["num_hidden_layers"],
        embed_dim=said["hidden_size"],
        num_heads=heads,
        num_kv_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or said["hidden_size"] // heads,
        mlp_dim=said["intermediate_size"],
        local_window_size=_window(said, path),
        qk_norm=family == "qwen3",
        projection_bias=family == "qwen2",
        tie_embeddings=bool(said.get("tie_word_embeddings", False)),
        norm_eps=said.get("rms_norm_eps", 1e-6),
        **_rope(said, path),
    )


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _rope(said: dict[str, Any], path: Path) -> dict[str, Any]:
    """RoPE's base and stretch, from either of the two forms in which they are written."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    theta = float(said.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _need(kind in ("default", "llama3"), f"{path}: rope_type is {kind!r}; the model has 'default' and 'llama3'.")
    if kind == "default":
        return {"rope_theta": theta}
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=rope["original_max_position_embeddings"],
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _window(said: dict[str, Any], path: Path) -> int | None:
    """The tokens to its left that a query sees: Hugging Face counts itself among them."""
    size = said.get("sliding_window") if said.get("use_sliding_window", said["model_type"] == "mistral") else None
    if size is None:
        return None
    layers = said["num_hidden_layers"]
    first = 0 if said["model_type"] == "mistral" else said.get("max_window_layers", layers)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = set(said.get("layer_types") or default)
    _need(len(kinds) == 1, f"{path}: some layers slide and some do not ({kinds}); the model has layers of one kind.")
    return size - 1 if kinds == {"sliding_attention"} else None


@contextlib.contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """name → its open file, for as long as the context lasts."""
    safe_open = _safetensors().safe_open
    if (index := folder / INDEX).is_file():
        where = json.loads(index.read_text())["weight_map"]
    else:
        _need((folder / SINGLE).is_file(), f"{folder} holds neither {INDEX} nor {SINGLE}; other formats run code when read.")
        where = None
    with contextlib.ExitStack() as stack:
        names = [SINGLE] if where is None else sorted(set(where.values()))
        for name in names:
            _need((folder / name).is_file(), f"{folder / INDEX} names {name}, which is not there; download it again.")
        files = {name: stack.enter_context(safe_open(folder / name, framework="np")) for name in names}
        yield {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118 — not a dict


def _safetensors():
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ValueError("Hugging Face weights need safetensors, the extra hf; pip install safetensors.") from None
    return safetensors


def _path(path: tuple) -> str:
    return ".".join(key.key for key in path)


def _names(own: str, layers: int) -> list[tuple[str, int]]:
    """(Hugging Face name, leading dims that are inputs) of a parameter, one for each layer where it is a layer's."""
    if own in OTHERS:
        return [(OTHERS[own], 0)]
    source = LAYER[own.removeprefix("layers.")]
    return [(f"model.layers.{i}.{source.name}", source.inputs) for i in range(layers)]


def _their_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """Of one layer's array: a matrix's is [outputs, inputs]; a vector's is flat."""
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else (math.prod(shape),)


def _check_names(tensors: dict[str, Any], params: Tree) -> None:
    """Refuse before anything is read what would be missing or left over afterwards."""
    wanted = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        own = _path(path)
        for name, inputs in _names(own, x.shape[0]):
            wanted[name] = x.shape if own in OTHERS else _their_shape(x.shape[1:], inputs)
    missing = [name for name in wanted if name not in tensors]
    _need(not missing, f"{len(missing)} tensors are missing, such as {missing[:1]}; download the folder again.")
    known = {*wanted, OTHERS["head.table"]} if "head" not in params else set(wanted)
    strange = [name for name in tensors if name not in known and not name.endswith("rotary_emb.inv_freq")]
    _need(not strange, f"{len(strange)} tensors belong to no part of the model, such as {strange[:1]}.")
    for name, shape in wanted.items():
        found = tuple(tensors[name].get_slice(name).get_shape())
        _need(found == shape, f"{name} is {list(found)}; by config.json it is {list(shape)}.")


def _read(tensors: dict[str, Any], own: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter, in float32; of a stack of layers only the layers it names are read."""
    if own in OTHERS:
        name = OTHERS[own]
        return np.asarray(tensors[name].get_slice(name)[index], np.float32)
    chosen = range(shape[0])[index[0]]
    parts = []
    for name, inputs in (_names(own, shape[0])[i] for i in chosen):
        tensor, dims, at = tensors[name].get_slice(name), shape[1:], index[1:]
        if not inputs:
            parts.append(np.asarray(tensor[:], np.float32).reshape(dims)[at])
            continue
        # Of the inputs and of the outputs the range of the first dim is read, and what else is cut is cut here.
        (rows, kept_out), (columns, kept_in) = _first(dims[inputs:], at[inputs:]), _first(dims[:inputs], at[:inputs])
        part = np.asarray(tensor[rows, columns], np.float32).T.reshape(-1, *dims[1:inputs], *_after(rows, dims[inputs:]))
        parts.append(part[(*kept_in, *kept_out)])
    return np.stack(parts)


def _first(dims: tuple[int, ...], at: tuple[slice, ...]) -> tuple[slice, tuple[slice, ...]]:
    """Of flattened dims the range that the first dim's slice names, and what is left to cut."""
    start, stop, _ = at[0].indices(dims[0])
    inner = math.prod(dims[1:])
    return slice(start * inner, stop * inner), (slice(None), *at[1:])


def _after(rows: slice, dims: tuple[int, ...]) -> tuple[int, ...]:
    return ((rows.stop - rows.start) // math.prod(dims[1:]), *dims[1:])


def context_length(folder: str | Path) -> int:
    """Tokens that the model of a Hugging Face folder takes, by its `max_position_embeddings`; 0 where that cannot be read."""
    try:
        return int(json.loads((Path(folder) / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def save(model: Transformer, folder: str | Path, *, dtype: str = "bfloat16", max_length: int = 131_072) -> None:
    """Write a model as a Hugging Face folder: `config.json` and files of safetensors of up to 5 GB.

    Args:
      model: its parameters on devices of this process.
      folder: made if it is not there; it must hold no weights yet.
      dtype: of the weights written: float32, bfloat16 or float16.
      max_length: tokens that `config.json` says the model takes (`max_position_embeddings`).

    Raises:
      ValueError: a folder that holds weights, parameters of other processes, or a model that is none of the families.
    """
    folder = Path(folder)
    said = _config_of(model.config, dtype, max_length)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    _need(
        all(x.is_fully_addressable for _, x in leaves),
        "the model has parameters on devices of other processes; load its checkpoint in one process, and save there.",
    )
    _need(
        not any(folder.glob("*.safetensors")),
        f"{folder} holds weights already; choose another folder, or move them away first.",
    )
    size = jnp.dtype(dtype).itemsize
    parts, sizes = [[]], [0]  # file by file (parameter, layer or none, Hugging Face name, inputs), and bytes
    for path, x in leaves:
        own = _path(path)
        names = _names(own, model.config.num_layers)
        for i, (name, inputs) in enumerate(names):
            bytes_ = x.size // len(names) * size
            if sizes[-1] and sizes[-1] + bytes_ > FILE_BYTES:
                parts.append([])
                sizes.append(0)
            parts[-1].append((x, None if own in OTHERS else i, name, inputs))
            sizes[-1] += bytes_
    write, where = _safetensors().numpy.save_file, {}
    folder.mkdir(parents=True, exist_ok=True)
    for n, part in enumerate(parts, 1):
        file = SINGLE if len(parts) == 1 else f"model-{n:05}-of-{len(parts):05}.safetensors"
        write({name: _theirs(x, i, inputs, dtype) for x, i, name, inputs in part}, folder / file, metadata={"format": "pt"})
        where |= {name: file for _, _, name, _ in part}
    if len(parts) > 1:
        content = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")
    config = folder / "config.json"
    config.write_text(json.dumps(said, indent=1) + "\n")
    for file in folder.glob("*.safetensors"):  # which the library writes for their owner alone
        shutil.copymode(config, file)


def _theirs(x: jax.Array, layer: int | None, inputs: int, dtype: str) -> np.ndarray:
    """One tensor as Hugging Face lays it out."""
    own = np.asarray((x if layer is None else x[layer]).astype(dtype))
    if layer is None:
        return own
    outputs_inputs = _their_shape(own.shape, inputs)
    return np.ascontiguousarray(own.reshape(outputs_inputs[::-1]).T)


def _config_of(config: ModelConfig, dtype: str, max_length: int) -> dict[str, Any]:
    """`config.json` of the family that has what the model has."""
    lacking = {"is_causal": True, "logits_soft_cap": None, "attention_sinks": False}
    for name, wanted in lacking.items():
        value = getattr(config, name)
        _need(value == wanted, f"model.{name} is {value!r}; none of {', '.join(FAMILIES)} has that, so it cannot be written.")
    _need(
        not (config.qk_norm and config.projection_bias),
        "the model has qk_norm and projection_bias; Qwen3 has the first and Qwen2 the second, so it cannot be written.",
    )
    window = config.local_window_size
    family = "qwen3" if config.qk_norm else "qwen2" if config.projection_bias else "llama" if window is None else "mistral"
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    scaling = config.rope_scaling
    said = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_length,
        "torch_dtype": dtype,
    }
    if scaling is not None:
        said["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if family != "llama":
        said["sliding_window"] = None if window is None else window + 1
    if family in ("qwen2", "qwen3"):
        said |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    return said
