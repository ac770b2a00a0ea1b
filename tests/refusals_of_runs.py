"""Misuses of configs, run folders and the command line, for `test_refusals.py`."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests import conftest as conftest  # the same 8 devices when this file is run by itself
from tests.refusals import Row, memory, model, train, write
from ulysses_jax import (
    TrainConfig,
    cli,
    make_mesh,
    runtime,
)
from ulysses_jax.checkpoint import Checkpoints
from ulysses_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, RopeScaling
from ulysses_jax.data import open_corpus
from ulysses_jax.report import claim
from ulysses_jax.train import build
from ulysses_jax.verify import verify

NARROW = "--model.num-layers 1 --model.embed-dim 16 --model.head-dim 4 --model.mlp-dim 16"
TINY = f"train demo --out run --steps 3 --data.seq-len 64 --data.batch-size 4 --data.source corpus {NARROW}"


def text() -> None:
    for name in "abc":
        write(f"corpus/{name}.txt", name * 3000)


def in_turn(*steps: Callable[[], object]) -> Callable[[], object]:
    return lambda: [step() for step in steps]


def array(path: str, content: Any) -> Callable[[], None]:
    return lambda: np.save(path, content)


def config_of(line: str) -> TrainConfig:
    name, *rest = shlex.split(line)[1:]
    return cli._parse(name, rest).config


def claimed(line: str = TINY) -> None:
    text()
    config = config_of(line)
    claim(Path("run"), config, open_corpus(config.data).fingerprint)


def claimed_then(path: str, content: str) -> Callable[[], object]:
    return in_turn(claimed, lambda: write(path, content))


def grown() -> None:
    claimed()
    write("corpus/d.txt", "more")


def broken_checkpoints() -> None:
    claimed()
    with Checkpoints(Path("run/checkpoints"), keep=2) as saves:
        saves.save(2, {"w": np.arange(64.0)})
    for file in Path("run/checkpoints/2").rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            file.write_bytes(b"rot" + file.read_bytes())


def without(package: str) -> Callable[[], object]:
    return in_turn(text, lambda: mock.patch.dict(sys.modules, {package: None}).start())  # undone by `message`


def without_login() -> None:
    text()
    login = mock.Mock(side_effect=RuntimeError("No API key configured. Use `wandb login` to log in."))
    mock.patch.dict(sys.modules, {"wandb": mock.Mock(Error=RuntimeError, login=login)}).start()


def sixteen_gib() -> None:
    mock.patch.object(runtime, "host_memory", return_value=16 * 2**30).start()  # undone by `message`
    mock.patch("ulysses_jax.train.run").start()  # which would fill this host's memory, were it not refused


CONFIG = [
    Row("a float for an int", lambda: model(num_layers=2.0), ("model.num_layers is 2.0", "must be an int")),
    Row("a bool for an int", lambda: model(vocab_size=True), ("model.vocab_size is True", "must be an int")),
    Row("an int for a bool", lambda: model(is_causal=1), ("model.is_causal is 1", "true or false")),
    Row("no layers", lambda: model(num_layers=0), ("model.num_layers is 0", "at least 1")),
    Row("K does not divide N, in a config", lambda: model(num_kv_heads=3), ("is 3", "must divide model.num_heads = 2")),
    Row("an odd head size", lambda: model(head_dim=5), ("model.head_dim is 5", "must be even")),
    Row("unknown save", lambda: memory(save="half"), ("memory.save is 'half'", "one of inputs, attention, projections")),
    Row("a fraction beyond 1", lambda: memory(offload_layers=2.0), ("memory.offload_layers is 2.0", "in [0, 1]")),
    Row(
        "a fraction of no group",
        lambda: train(memory=memory(save_layers=0.3)),
        ("memory.save_layers is 0.3", "nearest"),
    ),
    Row(
        "everything to the host",
        lambda: memory(save="all", offload_layers=0.5),
        ("memory.offload_layers is 0.5 and memory.save is 'all'", "use 'products'"),
    ),
    Row(
        "what is read last, of nothing",
        lambda: memory(save="attention", offload_layers=1.0, offload_late=True),
        ("memory.offload_late is True", "memory.save 'attention'", "save='projections'", "or leave it out"),
    ),
    Row(
        "products of tiles",
        lambda: memory(save="products", mlp_tile=64),
        ("memory.mlp_tile is 64 and memory.save is 'products'", "leave out mlp_tile"),
    ),
    Row(
        "parameters on the host, moments on the device",
        lambda: memory(offload_params=True),
        ("memory.offload_params is True and memory.offload_optimizer False", "set offload_optimizer=True"),
    ),
    Row(
        "everything kept, parameters on the host",
        lambda: memory(save="all", offload_params=True, offload_optimizer=True),
        ("memory.offload_params is True and memory.save is 'all'", "use 'products'"),
    ),
    Row(
        "layers that differ, parameters on the host",
        lambda: memory(save_layers=0.5, offload_params=True, offload_optimizer=True),
        ("memory.offload_params is True and memory.save_layers 0.5", "use save_layers=1"),
    ),
    Row(
        "a fraction of tokens of more than inputs",
        lambda: memory(save="attention", offload_layers=0.5, offload_params=True, offload_optimizer=True),
        ("memory.offload_layers 0.5 and memory.save 'attention'", "use save='inputs'"),
    ),
    Row(
        "whole parameters on the host",
        lambda: train(zero_stage=2, memory=memory(offload_params=True, offload_optimizer=True)),
        ("memory.offload_params is True and zero_stage 2", "use zero_stage=3"),
    ),
    Row(
        "gradients added up on the host",
        lambda: train(accumulation=2, memory=memory(offload_params=True, offload_optimizer=True)),
        ("memory.offload_params is True and accumulation 2", "use accumulation=1"),
        error=NotImplementedError,
    ),
    Row("tiles of nothing", lambda: memory(mlp_tile=0), ("memory.mlp_tile is 0", "at least 1")),
    Row("unknown dtype", lambda: model(dtype="float16"), ("model.dtype is 'float16'", "one of bfloat16, float32")),
    Row("a negative window, in a config", lambda: model(local_window_size=-1), ("local_window_size is -1", "at least 0")),
    Row("a cap of 0", lambda: model(logits_soft_cap=0.0), ("model.logits_soft_cap is 0.0", "> 0", "None for no cap")),
    Row("norm_eps of 0", lambda: model(norm_eps=0.0), ("model.norm_eps is 0.0", "must be > 0")),
    Row("chunks that do not divide KV heads", lambda: model(head_chunks=4), ("model.head_chunks is 4", "Choose one of 1, 2.")),
    Row(
        "chunks that do not divide a device's KV heads",
        lambda: TrainConfig(model=model(head_chunks=2), mesh=MeshConfig(seq=2)),
        ("model.head_chunks is 2", "the 1 KV heads that each of 2 devices", "Choose one of 1."),
    ),
    Row("a RoPE that shrinks", lambda: RopeScaling(factor=0.5), ("rope_scaling.factor is 0.5", "at least 1")),
    Row("RoPE's bounds reversed", lambda: RopeScaling(low_freq_factor=9.0), ("9.0", "0 < low < high", "Llama 3.1 uses")),
    Row("a mesh of no data axis", lambda: MeshConfig(data=0), ("mesh.data is 0", "at least 1")),
    Row("a mesh of no ring", lambda: MeshConfig(ring=0), ("mesh.ring is 0", "at least 1")),
    Row("sequences of one token", lambda: DataConfig(seq_len=1), ("data.seq_len is 1", "at least 2")),
    Row("nothing held out", lambda: DataConfig(held_out=0.0), ("data.held_out is 0.0", "between 0 and 1")),
    Row("a negative seed", lambda: DataConfig(seed=-1), ("data.seed is -1", "at least 0")),
    Row("an empty source", lambda: DataConfig(source=""), ("data.source is ''", "name a folder")),
    Row("an absolute pattern", lambda: DataConfig(pattern="/x/*"), ("data.pattern is '/x/*'", "'**/*.txt'")),
    Row("a NaN learning rate", lambda: OptimizerConfig(learning_rate=float("nan")), ("learning_rate is nan", "finite number")),
    Row("a learning rate of 0", lambda: OptimizerConfig(learning_rate=0.0), ("optimizer.learning_rate is 0.0", "> 0")),
    Row("b1 of 1", lambda: OptimizerConfig(b1=1.0), ("optimizer.b1 is 1.0", "[0, 1)")),
    Row("a final fraction of 2", lambda: OptimizerConfig(final_fraction=2.0), ("final_fraction is 2.0", "[0, 1]")),
    Row("save never", lambda: CheckpointConfig(every=0), ("checkpoint.every is 0", "at least 1")),
    Row("no steps", lambda: train(steps=0), ("steps is 0", "at least 1")),
    Row("ZeRO-4 in a run", lambda: train(zero_stage=4), ("zero_stage is 4", "0, 1, 2 or 3")),
    Row("unknown implementation in a run", lambda: train(implementation="flash"), ("'flash'", "one of", "None")),
    Row("a project without a name", lambda: train(wandb=""), ("wandb is ''", "None for no tracking")),
    Row("a number for a part", lambda: train(mesh=8), ("mesh is 8", "a MeshConfig")),
    Row(
        "a run of another mesh",
        lambda: build(train(), make_mesh(seq=8)),
        ("'data': 1, 'seq': 8", "config says data=2, seq=4", "make_mesh(data=2, seq=4)"),
    ),
    Row(
        "a comparison on another mesh",
        lambda: verify(train(mesh=MeshConfig(ring=2, seq=2)), make_mesh(seq=4)),
        ("'data': 1, 'seq': 4", "make_mesh(data=1, seq=2, ring=2)"),
    ),
]

COMMANDS = [
    Row("unknown command", "trian demo", ("no command 'trian'", "train", "ulysses --help")),
    Row("a plan of no such model", "plan --model llama9", ("--model is 'llama9'", "gpt-7b", "llama3-8b")),
    Row("a plan for no such GPU", "plan --model gpt-7b --gpu tpu", ("--gpu is 'tpu'", "h100, h200, a100")),
    Row("a plan for no devices", "plan --model gpt-7b --devices 0", ("--devices is 0", "at least 1")),
    Row(
        "a plan of an uneven length",
        "plan --model gpt-7b --length 65537",
        ("--length is 65537;", "a multiple of --devices = 8", "above is 65544"),
    ),
    Row(
        "a plan for devices that do not share the default length",
        "plan --model gpt-7b --devices 7",
        ("--length is 131072 by default", "a multiple of --devices = 7", "above is 131075"),
    ),
    Row("a plan of one token", "plan --model gpt-7b --length 1", ("--length is 1;", "at least 2")),
    Row(
        "a plan of a length and of the longest",
        "plan --model gpt-7b --length 65536 --longest",
        ("--length is 65536", "--longest searches", "leave out one"),
    ),
    Row("a plan with less than no host", "plan --model gpt-7b --host-gib -1", ("--host-gib is -1", "at least 0")),
    Row(
        "a plan that cannot be",
        "plan --model gpt-30b --devices 1",
        ("131,072 tokens does not fit 1 × NVIDIA H100", "more devices, a shorter --length, or --longest."),
    ),
    Row(
        "a plan that cannot be of any length",
        "plan --model gpt-30b --devices 1 --longest",
        ("4,096 tokens does not fit 1 × NVIDIA H100", "Use more devices or a smaller model."),
    ),
    Row("a mistyped option", "plan --modle gpt-7b", ("ulysses plan has no argument '--modle'", "Did you mean --model")),
    Row("a mistyped option of export", "export run folder --dtyp=x", ("no argument '--dtyp=x'", "Did you mean --dtype?")),
    Row("unknown recipe", "train dmeo", ("no recipe 'dmeo'", "demo, demo-bidirectional")),
    Row("unknown field", "train demo --data.seqlen 64", ("'--data.seqlen'", "Did you mean --data.seq-len", "--help")),
    Row("a field without its part", "train demo --seq-len 64", ("'--seq-len'", "Did you mean --data.seq-len")),
    Row("a stray word", "train demo fast", ("no argument 'fast'", "--field value", "--help")),
    Row("a word for a number", "train demo --steps ten", ("--steps is 'ten'", "a whole number", "--help")),
    Row("a word for a float", "train demo --optimizer.b1 x", ("--optimizer.b1 is 'x'", "a number")),
    Row("not among the choices", "train demo --model.dtype float16", ("'float16'", "'bfloat16', 'float32'", "--help")),
    Row("not true or false", "train demo --tensorboard maybe", ("'maybe'", "'True', 'False'")),
    Row("no value", "train demo --steps", ("--steps has no value", "one must follow")),
    Row("a NaN learning rate, typed", "train demo --optimizer.learning-rate nan", ("learning_rate is nan", "finite")),
    Row("no steps, typed", "train demo --steps 0", ("steps is 0", "at least 1")),
    Row("length not divisible, typed", "train demo --data.seq-len 63", ("63", "multiple of mesh.seq = 4", "above is 64")),
    Row(
        "length that the ring does not halve, typed",
        "train demo --mesh.ring 2 --data.seq-len 72",
        ("72", "2 × mesh.ring × mesh.seq = 16", "above is 80"),
    ),
    Row("batch not divisible, typed", "train demo --data.batch-size 3", ("is 3", "mesh.data × accumulation = 2 × 1", "is 4")),
    Row(
        "more devices than there are, typed",
        f"{TINY} --mesh.data 16 --data.batch-size 16",
        ("16 × 4 needs 64", "there are 8", "smaller mesh"),
        setup=text,
    ),
    Row(
        "more devices than there are, with a ring, typed",
        f"{TINY} --mesh.ring 4",
        ("data × ring × seq = 2 × 4 × 4 needs 32", "there are 8", "smaller mesh"),
        setup=text,
    ),
    Row(
        "a run for GPUs where there are none",
        "train gpt-7b-64k",
        ("gpt-7b-64k needs 102.", "no GPU was found", "has 16.0 GiB", "cuda13", "ulysses verify gpt-7b-64k", "--dry-run"),
        setup=sixteen_gib,
    ),
    Row("verify without a recipe", "verify --mesh.seq 2", ("verify needs a recipe first", "demo, demo-bidirectional")),
    Row("verify of an unknown recipe", "verify dmeo", ("no recipe 'dmeo'", "demo, demo-bidirectional")),
    Row("verify with a run's folder", "verify demo --out run", ("ulysses verify demo has no argument '--out'", "--help")),
    Row("verify of no such field", "verify demo --seq-len 64", ("'--seq-len'", "Did you mean --data.seq-len")),
    Row(
        "verify with more devices than there are", "verify demo --mesh.seq 8", ("2 × 8 needs 16", "there are 8", "smaller mesh")
    ),
    Row("verify with cuDNN without a GPU", "verify demo --implementation cudnn", ("'cudnn'", "'cpu'", "use 'xla'")),
    Row("a vocabulary smaller than bytes", f"{TINY} --model.vocab-size 100", ("is 100", "at least 258"), setup=text),
    Row("data that is not there", TINY, ("data.source 'corpus' does not exist", "'stdlib'")),
    Row(
        "data of a user that is not there",
        f"{TINY} --data.source=~no-such-user/text",
        ("data.source '~no-such-user/text' does not exist", "'stdlib'"),
    ),
    Row("a single text file", f"{TINY} --data.source a.txt", ("is a single file", "folder"), lambda: write("a.txt", "a")),
    Row("an empty folder", TINY, ("'corpus' has no file", "data.pattern = '**/*'"), lambda: Path("corpus").mkdir()),
    Row("no file of that name", f"{TINY} --data.pattern *.md", ("no file", "data.pattern = '*.md'"), text),
    Row(
        "a folder of tokens and text",
        TINY,
        ("'corpus' holds tokens (t.npy) and text (a.txt)", "only one of the two", "data.pattern, such as '**/*.npy'"),
        in_turn(text, array("corpus/t.npy", np.zeros(500, np.uint16))),
    ),
    Row("too little text", f"{TINY} --data.seq-len 65536", ("6002 tokens", "data.seq_len = 65536", "shorter"), text),
    Row(
        ".npy of floats",
        f"{TINY} --data.source t.npy",
        ("t.npy holds float64[500]", "uint16 or uint32", "astype(np.uint16)"),
        array("t.npy", np.zeros(500)),
    ),
    Row(
        "an end of document that is nowhere",
        f"{TINY} --data.source t.npy --data.end-of-document 128001",
        ("data.end_of_document is 128001", "no file of data.source 't.npy' holds", "leave it out"),
        array("t.npy", np.zeros(500, np.uint16)),
    ),
    Row(
        ".npy of two dims",
        f"{TINY} --data.source t.npy",
        ("uint16[9, 9]", "one dim"),
        array("t.npy", np.zeros((9, 9), np.uint16)),
    ),
    Row("damaged .npy", f"{TINY} --data.source t.npy", ("t.npy cannot be read", "np.save"), lambda: write("t.npy", b"\x93NUM")),
    Row("empty .npy", f"{TINY} --data.source t.npy", ("t.npy cannot be read", "np.save"), lambda: write("t.npy", b"")),
    Row(
        ".npy too short",
        f"{TINY} --data.source t.npy",
        ("tokens to train on", "data.seq_len = 64"),
        array("t.npy", np.zeros(60, np.uint16)),
    ),
    Row(
        "token ids beyond the vocabulary",
        f"{TINY} --data.source t.npy",
        ("token id 5000", "model.vocab_size is 320", "cover every id", "tokenizer's size"),
        array("t.npy", np.full(500, 5000, np.uint16)),
    ),
    Row(
        "token ids beyond int32",
        f"{TINY} --data.source t.npy",
        ("t.npy holds token id 4294967295", "below 2**31", "Write"),
        array("t.npy", np.full(500, -1).astype(np.uint32)),
    ),
    Row(
        ".bin of odd size",
        f"{TINY} --data.source t.bin",
        ("t.bin has 999 bytes", "multiple of 2", "data.token_dtype"),
        lambda: write("t.bin", bytes(999)),
    ),
    Row("empty .bin", f"{TINY} --data.source t.bin", ("no document of 2 tokens",), lambda: write("t.bin", b"")),
    Row("--out a file", TINY, ("--out run is occupied", "name another folder"), in_turn(text, lambda: write("run", "mine"))),
    Row("--out occupied", TINY, ("--out run is occupied", "no config.json"), in_turn(text, lambda: write("run/a", "mine"))),
    Row(
        "--out below a file",
        f"{TINY} --out a/run",
        ("--out a/run cannot be written", "name"),
        in_turn(text, lambda: write("a", "")),
    ),
    Row("--out of another run", f"{TINY} --data.seed 7", ("another run", "data.seed is 0, here 7", "Name another"), claimed),
    Row("damaged config.json", TINY, ("run/config.json cannot be read", "Restore"), claimed_then("run/config.json", "{")),
    Row("config.json of something else", TINY, ("run/config.json cannot be read",), claimed_then("run/config.json", "[1]")),
    Row("damaged summary.json", TINY, ("run/summary.json cannot be read", "Remove"), claimed_then("run/summary.json", "{")),
    Row("empty summary.json", TINY, ("run/summary.json cannot be read", "Remove"), claimed_then("run/summary.json", "{}")),
    Row("changed corpus", TINY, ("other files", "data.source 'corpus'", "Restore the files"), grown),
    Row("every checkpoint damaged", TINY, ("every checkpoint", "(damaged-2)", "backup"), broken_checkpoints),
    Row(
        "a tracker that is not installed",
        f"{TINY} --wandb project",
        ("wandb is 'project'", "needs the package wandb", "pip install wandb,", "leave it out"),
        without("wandb"),
    ),
    Row(
        "another tracker that is not installed",
        f"{TINY} --tensorboard True",
        ("tensorboard is True", "needs the package tensorboardx", "pip install tensorboardx,", "leave it out"),
        without("tensorboardX"),
    ),
    Row(
        "a tracker without a login",
        f"{TINY} --wandb project",
        ("wandb is 'project'", "cannot be used (No API key", "WANDB_MODE=offline", "leave it out"),
        without_login,
    ),
]
