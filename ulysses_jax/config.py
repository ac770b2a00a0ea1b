"""What a run is, as frozen dataclasses; every rule of divisibility lives here, once.

A `TrainConfig` built is a config that can run: the rules are checked when it is made, before anything compiles.
"""

import dataclasses
import functools
import math
import types
import typing
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "Dealing",
    "LayerMemory",
    "MemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScaling",
    "TrainConfig",
    "check_chunks",
    "deal_heads",
    "from_dict",
    "to_dict",
]

type Save = Literal["inputs", "attention", "projections", "products", "all"]
type Dtype = Literal["bfloat16", "float32"]
type Implementation = Literal["pallas", "cudnn", "splash", "xla", "reference"]


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be > 0.")


def _check_types(config: Any, prefix: str = "") -> None:
    """Refuse a field whose value is not of its annotated type, or no finite number, before a rule compares it."""
    for name, annotation in typing.get_type_hints(type(config)).items():
        value, choices = getattr(config, name), [getattr(a, "__value__", a) for a in _alternatives(annotation)]
        if not any(_fits(value, choice) for choice in choices):
            wanted = " or ".join(filter(None, map(_describe, choices)))
            raise ValueError(f"{prefix}{name} is {value!r}; it must be {wanted}.")


def _alternatives(annotation: Any) -> tuple:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _fits(value: object, annotation: Any) -> bool:
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if annotation is float:  # finite, and a whole number will do
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    names = {int: "an int", float: "a finite number", bool: "true or false", str: "a string", types.NoneType: "None"}
    return names.get(annotation) or f"a {annotation.__name__}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretch of RoPE (Llama 3.1 model card): low frequencies are divided by `factor`, high ones kept.

    Wavelengths beyond `original_length / low_freq_factor` tokens are stretched whole, those under
    `original_length / high_freq_factor` not at all, and those between by linear interpolation.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        _check_types(self, "rope_scaling.")
        _at_least("rope_scaling.factor", self.factor, 1)
        _at_least("rope_scaling.original_length", self.original_length, 1)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "0 < low < high is required. Llama 3.1 uses 1 and 4."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Transformer: decoder-only and causal, or bidirectional."""

    vocab_size: int
    """V, rows of the embedding"""
    num_layers: int
    """L"""
    embed_dim: int
    """D, the model's width"""
    num_heads: int
    """N, query heads"""
    num_kv_heads: int
    """K, key/value heads; divides N"""
    head_dim: int
    """H"""
    mlp_dim: int
    """F, the MLP's hidden width"""
    is_causal: bool = True
    """false: bidirectional, trained on masked tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary embedding's wavelengths"""
    rope_scaling: RopeScaling | None = None
    """Llama 3's stretch for longer contexts"""
    local_window_size: int | None = None
    """a query sees this many tokens to its left (and right, if bidirectional); all by default"""
    logits_soft_cap: float | None = None
    """c of c·tanh(logits / c) inside attention"""
    attention_sinks: bool = False
    """a learned logit a head in attention's softmax, of a value of zero"""
    qk_norm: bool = False
    """RMSNorm on queries and keys, a head at a time"""
    projection_bias: bool = False
    """biases on the Q, K and V projections"""
    tie_embeddings: bool = False
    """one matrix for embedding and output"""
    norm_eps: float = 1e-5
    """ε of RMSNorm"""
    dtype: Dtype = "bfloat16"
    """of activations and of the weights as used; parameters are float32"""
    head_chunks: int = 1
    """attention in this many parts, by heads, one after the other; divides the KV heads of a device"""

    def __post_init__(self):
        _check_types(self, "model.")
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}; it must divide model.num_heads = {self.num_heads}, "
                "so that each KV head serves as many query heads."
            )
        check_chunks(self.head_chunks, self.num_heads, self.num_kv_heads, 1, name="model.head_chunks")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; it must be even, because RoPE turns pairs.")
        for name in ("rope_theta", "norm_eps"):
            _positive(f"model.{name}", getattr(self, name))
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(f"model.logits_soft_cap is {self.logits_soft_cap}; it must be > 0, or None for no cap.")
        if self.local_window_size is not None:
            _at_least("model.local_window_size", self.local_window_size, 0)


MAX_GROUP = 8  # layers in the body of the scan: the compiled program grows with them


class LayerMemory(NamedTuple):
    """What one layer keeps for its backward, and where."""

    save: Save
    offload: float
    """the part that goes to the host: none, all, or a fraction of the tokens"""
    late: bool = False
    """of what goes there only what the backward reads last"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What a step keeps for its backward, computes again, cuts into tiles, or sends to the host.

    A layer saves, in bytes of B·T/P tokens each of 2·(…) in bfloat16:

        inputs        D                       its input; everything else is computed again
        attention     + N·H                   attention's output and log-sum-exp, so that the kernel is not run again
        projections   + (N + 2·K)·H           queries, keys and values as attention took them: nothing is exchanged again but
                                              attention's output
        products      + N·H + D + 2·F         that output as exchanged, the sum after attention, gate and up: no product of
                                              matrices is computed again
        all           everything, unnamed intermediates too

    Fractions of layers are realised within groups of up to 8 consecutive layers, all groups alike: the first of a group go to
    the host, the last of it save `save`, the others `save_others`. Parameters on the host are sliced a layer at a time, and XLA
    would copy whole stacks of them for a group; so with `offload_params` all layers are alike, and what they save of the first
    `offload_layers` of a device's tokens goes to the host.
    """

    save: Save = "attention"
    """what layers save: inputs, attention (and inputs), projections (and those), products (and those), or all"""
    save_layers: float = 1.0
    """the fraction of layers that do; a multiple of 1/8, or of one over a smaller divisor of num_layers"""
    save_others: Save = "inputs"
    """what the other layers save"""
    offload_layers: float = 0.0
    """the fraction of layers whose saved activations wait in the host's pinned memory; with `offload_params` of tokens"""
    offload_late: bool = False
    """of those layers only what their backward reads last, the input, queries, keys and values, goes there, to come back while
    the MLP's is computed; the rest and the sum after attention stay. For save="projections" or "products" in all layers"""
    mlp_tile: int | None = None
    """tokens whose hidden activations [tile, F] exist at one time; all of a device's by default"""
    loss_tile: int = 2048
    """tokens whose logits [tile, V] exist at one time"""
    offload_optimizer: bool = False
    """the optimizer's moments wait in the host's pinned memory; the update fetches them a layer at a time"""
    offload_params: bool = False
    """so do the layers' float32 parameters, which forward and backward fetch a layer at a time, and their gradients"""

    def __post_init__(self):
        _check_types(self, "memory.")
        for name in ("save_layers", "offload_layers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it is a fraction of layers and must be in [0, 1].")
        _at_least("memory.loss_tile", self.loss_tile, 1)
        for name, layers in (("save", self.save_layers), ("save_others", 1 - self.save_layers)):
            save = getattr(self, name) if layers else "inputs"
            if save == "all" and self.offload_layers:
                raise ValueError(
                    f"memory.offload_layers is {self.offload_layers} and memory.{name} is 'all', whose activations have no "
                    "names to send them by; use 'products' or less."
                )
            if save == "all" and self.offload_params:
                raise ValueError(
                    f"memory.offload_params is True and memory.{name} is 'all', which would keep every layer's parameters "
                    "on the device once fetched; use 'products' or less."
                )
            if save == "products" and self.mlp_tile is not None:
                raise ValueError(
                    f"memory.mlp_tile is {self.mlp_tile} and memory.{name} is 'products', but tiles are there so that the "
                    "products of all tokens need not be; use 'projections', or leave out mlp_tile."
                )
        if self.offload_late and not (
            self.offload_layers and self.save_layers == 1 and self.save in ("projections", "products")
        ):
            raise ValueError(
                f"memory.offload_late is True, memory.offload_layers {self.offload_layers}, memory.save {self.save!r} and "
                f"memory.save_layers {self.save_layers}, but it chooses among what layers that save projections send to the "
                "host; use offload_layers=1, save='projections' and save_layers=1, or leave it out."
            )
        if self.mlp_tile is not None:
            _at_least("memory.mlp_tile", self.mlp_tile, 1)
        if self.offload_params and not self.offload_optimizer:
            raise ValueError(
                "memory.offload_params is True and memory.offload_optimizer False, but the moments are twice the bytes "
                "and needed once a step only; set offload_optimizer=True as well."
            )
        if self.offload_params and self.save_layers not in (0, 1):
            raise ValueError(
                f"memory.offload_params is True and memory.save_layers {self.save_layers}, but parameters on the host "
                "want layers that are all alike; use save_layers=1."
            )
        if self.offload_params and self.offload_layers not in (0, 1) and self.alike != "inputs":
            raise ValueError(
                f"memory.offload_params is True, memory.offload_layers {self.offload_layers} and memory.save {self.alike!r}, "
                "but with parameters on the host a fraction is of tokens, and only of inputs; use save='inputs', or 0 or 1."
            )

    @property
    def alike(self) -> Save:
        """what layers save where all save the same"""
        return self.save if self.save_layers else self.save_others

    def group(self, num_layers: int) -> tuple[LayerMemory, ...]:
        """The policy of each layer of a group; groups of this length, one after the other, are all layers.

        Raises:
          ValueError: fractions that no group of at most `MAX_GROUP` layers has.
        """
        if self.offload_params:
            return (LayerMemory(self.alike, self.offload_layers, self.offload_late),)
        sizes = [k for k in range(1, MAX_GROUP + 1) if num_layers % k == 0]
        fractions = {"save_layers": self.save_layers, "offload_layers": self.offload_layers}
        for k in sizes:
            saving, sent = (fraction * k for fraction in fractions.values())
            if abs(saving - round(saving)) < 1e-6 and abs(sent - round(sent)) < 1e-6:
                return tuple(
                    LayerMemory(
                        self.save if i >= k - round(saving) else self.save_others,
                        i < round(sent),
                        self.offload_late and i < round(sent),
                    )
                    for i in range(k)
                )
        has = sorted({i / k for k in sizes for i in range(k + 1)})
        name = next((n for n, f in fractions.items() if min(abs(f - x) for x in has) > 1e-6), "offload_layers")
        near = min(has, key=lambda x: abs(x - fractions[name]))
        raise ValueError(
            f"memory.{name} is {fractions[name]}, which {num_layers} layers cannot have in equal groups of at most {MAX_GROUP} "
            f"together with {fractions}; groups may be of {sizes} layers. The nearest fraction is {near:g}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the batch (`data`) and along the sequence (`seq`, the Ulysses degree P)."""

    data: int = 1
    """devices along the batch"""
    seq: int = 1
    """devices along the sequence, the Ulysses degree"""
    ring: int = 1
    """rings of such devices, for degrees beyond the head count"""

    def __post_init__(self):
        _check_types(self, "mesh.")
        _at_least("mesh.data", self.data, 1)
        _at_least("mesh.seq", self.seq, 1)
        _at_least("mesh.ring", self.ring, 1)

    @property
    def size(self) -> int:
        return self.data * self.ring * self.seq

    @property
    def parts(self) -> int:
        """What divides a sequence's length: one part a device, or two on a ring, where each holds early and late tokens."""
        return self.seq if self.ring == 1 else 2 * self.ring * self.seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are batched."""

    source: str = "stdlib"
    """"stdlib" (Python's own source, as bytes), a folder of text files, or .npy/.bin files of uint16/uint32 tokens"""
    seq_len: int = 2048
    """T, tokens of a sequence"""
    batch_size: int = 8
    """B, sequences of a step, over all devices and accumulation"""
    pattern: str = "**/*"
    """which files of a text folder (hidden ones never)"""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """of .bin files, which do not say it themselves"""
    end_of_document: int | None = None
    """the token id that ends a document in pre-tokenised arrays; a file is one document by default"""
    mask_documents: bool = True
    """tokens see only their own document"""
    held_out: float = 0.05
    """fraction of files kept for evaluation"""
    mask_rate: float = 0.15
    """bidirectional models: fraction of tokens to predict"""
    seed: int = 0
    """order of documents and rows"""

    def __post_init__(self):
        _check_types(self, "data.")
        _at_least("data.seed", self.seed, 0)
        if not self.source:
            raise ValueError("data.source is ''; name a folder of text files, a .npy or .bin file, or 'stdlib'.")
        if not self.pattern or PurePath(self.pattern).is_absolute():
            raise ValueError(f"data.pattern is {self.pattern!r}; it must be a glob below data.source, such as '**/*.txt'.")
        if self.end_of_document is not None:
            _at_least("data.end_of_document", self.end_of_document, 0)
        _at_least("data.seq_len", self.seq_len, 2)
        _at_least("data.batch_size", self.batch_size, 1)
        for name in ("held_out", "mask_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is a fraction and must lie between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) on a cosine schedule with linear warm-up, gradients clipped by their global norm."""

    learning_rate: float = 3e-4
    """at the schedule's peak"""
    final_fraction: float = 0.1
    """of the peak, where the cosine ends"""
    warmup_steps: int = 20
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """on matrices only"""
    clip_norm: float = 1.0
    """largest global norm of the gradient"""
    moment_dtype: Dtype = "float32"
    """in which both moments are kept; they are computed in float32"""

    def __post_init__(self):
        _check_types(self, "optimizer.")
        for name in ("learning_rate", "eps", "clip_norm"):
            _positive(f"optimizer.{name}", getattr(self, name))
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"optimizer.final_fraction is {self.final_fraction}; it is a fraction and must be in [0, 1].")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1).")
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        _at_least("optimizer.weight_decay", self.weight_decay, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and which saves are kept."""

    every: int = 100
    """steps between saves; the last step is always saved"""
    keep: int = 2
    """saves kept, newest first"""

    def __post_init__(self):
        _check_types(self, "checkpoint.")
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    memory: MemoryConfig = MemoryConfig()
    zero_stage: int = 3
    """0: replicate; 1: divide the optimizer's state over all devices; 2: gradients too; 3: parameters too"""
    steps: int = 1000
    accumulation: int = 1
    """micro-batches a step, one after the other"""
    implementation: Implementation | None = None
    """of attention; chosen by the hardware by default"""
    log_every: int = 10
    eval_every: int = 0
    """steps between evaluations; 0: only at the end"""
    eval_batches: int = 4
    seed: int = 0
    """of the parameters' initial values"""
    init_from: str | None = None
    """a Hugging Face folder whose weights the run starts from (extra: hf); random weights by default"""
    tensorboard: bool = False
    """also write TensorBoard events (extra: tracking)"""
    wandb: str | None = None
    """also log to this Weights & Biases project (extra: tracking)"""

    def __post_init__(self):
        _check_types(self)
        for name in ("steps", "accumulation", "log_every", "eval_batches"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3.")
        if self.wandb == "":
            raise ValueError("wandb is ''; it must be the name of a project, or None for no tracking.")
        self.memory.group(self.model.num_layers)
        self._check_offload()
        if self.data.seq_len % (parts := self.mesh.parts):
            named = f"mesh.seq = {parts}" if self.mesh.ring == 1 else f"2 × mesh.ring × mesh.seq = {parts}"
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}; it must be a multiple of {named}. "
                f"The nearest above is {-(-self.data.seq_len // parts) * parts}."
            )
        model = self.model
        check_chunks(model.head_chunks, model.num_heads, model.num_kv_heads, self.mesh.seq, name="model.head_chunks")
        rows = self.mesh.data * self.accumulation
        if self.data.batch_size % rows:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}; it must be a multiple of mesh.data × accumulation = "
                f"{self.mesh.data} × {self.accumulation}. The nearest above is {-(-self.data.batch_size // rows) * rows}."
            )

    def _check_offload(self):
        if not self.memory.offload_params:
            return
        if self.zero_stage != 3:
            raise ValueError(
                f"memory.offload_params is True and zero_stage {self.zero_stage}, which keeps them whole for each device; "
                "use zero_stage=3, so that the host holds them once."
            )
        if self.accumulation != 1:
            raise NotImplementedError(
                f"memory.offload_params is True and accumulation {self.accumulation}, but gradients on the host are not "
                "added up; use accumulation=1: with parameters on the host, a longer step costs less than two."
            )

    @property
    def balanced(self) -> bool:
        """Do tokens lie in the ring's `token_order`? Not where a causal window is no longer than what a device holds: then all
        have as much to do in the natural order, and only the window's keys travel (`ring.halo_reach`).
        """
        ring, window = self.mesh.ring, self.model.local_window_size
        return ring > 1 and (window is None or not self.model.is_causal or window > self.data.seq_len // ring)


class Dealing(NamedTuple):
    """Which heads each of P devices computes: `slots` of query heads and of KV heads, devices one after the other."""

    queries: tuple[int, ...]
    """for each of P·n slots the query head in it"""
    keys: tuple[int, ...]
    """for each of P·m slots the KV head in it; slots i·n/m … of a device's queries read its slot i"""
    slots: tuple[int, ...]
    """for each of N query heads its slot; slots that no head names hold copies, computed and dropped"""


@functools.cache
def deal_heads(heads: int, kv_heads: int, degree: int) -> Dealing:
    """Deal N query heads and the K KV heads they read to P devices, as evenly as can be.

    Attention inside a device wants the same number g of queries for each of its KV heads. So each KV head's N/K queries are
    cut into parts of at most g, and every device takes m of the K·⌈(N/K)/g⌉ parts. Of all g, the one that leaves a device
    the fewest query heads m·g is taken (time), and of those the one that sends the fewest KV heads m (bytes). The
    first is always ⌈N/P⌉, since parts of one query allow it; where P divides N and K, m is K/P, and 1 where K divides P.
    """
    group = heads // kv_heads

    def each(g: int) -> tuple[int, int]:
        parts_a_device = -(-kv_heads * -(-group // g) // degree)
        return parts_a_device * g, parts_a_device

    size = min(range(1, group + 1), key=each)
    parts = [(kv, range(start, min(start + size, group))) for kv in range(kv_heads) for start in range(0, group, size)]
    parts += [(0, range(0))] * (each(size)[1] * degree - len(parts))
    queries, slots = [], {}
    for kv, members in parts:
        for i in range(size):
            head = kv * group + (members[min(i, len(members) - 1)] if members else 0)
            if i < len(members):
                slots[head] = len(queries)
            queries.append(head)
    return Dealing(tuple(queries), tuple(kv for kv, _ in parts), tuple(slots[head] for head in range(heads)))


def check_chunks(chunks: int, heads: int, kv_heads: int, degree: int, *, name: str = "head_chunks") -> None:
    """Refuse chunks that do not divide the KV heads of each of P devices."""
    own = len(deal_heads(heads, kv_heads, degree).keys) // degree
    if chunks < 1 or own % chunks:
        raise ValueError(
            f"{name} is {chunks}; it must divide the {own} KV heads that each of {degree} devices along mesh.seq computes. "
            f"Choose one of {', '.join(str(n) for n in range(1, own + 1) if own % n == 0)}."
        )


def to_dict(config) -> dict:
    """A config as plain nested dicts, for `config.json`."""
    return dataclasses.asdict(config)


def from_dict(fields: dict[str, Any]) -> TrainConfig:
    """The config of which `to_dict` made these fields, be it by way of JSON.

    Raises:
      ValueError: a field that a config has not, or a value that it refuses.
    """
    return _made(TrainConfig, fields)


def _made(kind: type[Any], fields: dict[str, Any]) -> Any:
    annotations, values = typing.get_type_hints(kind), dict(fields)
    for name, value in fields.items():
        parts: list[Any] = (
            list(filter(dataclasses.is_dataclass, _alternatives(annotations[name]))) if name in annotations else []
        )
        if name not in annotations or (isinstance(value, dict) and not parts):
            raise ValueError(f"{kind.__name__} takes no {name} = {value!r}; its fields are {', '.join(annotations)}.")
        if isinstance(value, dict):
            values[name] = _made(parts[0], value)
    return kind(**values)
