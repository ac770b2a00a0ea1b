"""Plans: closed forms against the program's own shapes and crossings, and the search for a policy and a length that fit."""

import dataclasses
import json
import math
import subprocess
from typing import Any

import jax
import pytest

from tests.trainers import compiled_step, hlo, program, tiny
from ulysses_jax import cli, costs, recipes
from ulysses_jax.attention import Options, make_mask, resolve
from ulysses_jax.config import MemoryConfig
from ulysses_jax.plan import _kernel, certify, ledger, longest_plan, make_plan, policies

H100, GIB = costs.GPUS["h100"], 2**30


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_states_bytes_are_those_of_its_arrays(stage):
    """Up to the few leaves that no stage divides. Dividing gradients from stage 1 on breaks it."""
    config = tiny(2, 4, zero_stage=stage)
    p, parts = program(config), costs.device_bytes(config)

    def exact(tree: Any) -> int:
        sizes = (x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree))
        return sum(4 * math.prod(shape) for shape in sizes if shape)

    assert parts["parameters"] == pytest.approx(exact(p.abstract["params"]), rel=0.03)
    assert parts["optimizer"] == pytest.approx(exact(p.abstract["opt_state"]), rel=0.03)
    whole = 4 * sum(costs.parameter_counts(config.model).values())
    assert parts["gradients"] == (whole / 8 if stage >= 2 else whole)


@pytest.mark.slow
@pytest.mark.parametrize("save", ["inputs", "projections", "products"])
def test_bytes_on_the_wire_are_the_compiled_programs(save):
    """Forgetting that the backward's recomputation sends again breaks it."""
    config = tiny(2, 4, memory={"save": save})
    crossings = ledger(hlo(compiled_step(config)), program(config).mesh)
    mesh, planned = program(config).mesh, costs.wire_bytes(config)
    sent = {
        kind: sum(x.times * x.bytes_sent(mesh) for x in crossings if x.kind == kind)
        for kind in ("all-to-all", "reduce-scatter")
    }
    assert planned["exchange"] == sent["all-to-all"]
    assert planned["gradients"] == pytest.approx(sent["reduce-scatter"], rel=0.05)


def test_bytes_on_the_host_are_those_of_the_arrays_there():
    """Counting the parts that are no layers as streamed breaks it."""
    memory = {"offload_optimizer": True, "offload_params": True, "offload_layers": 0.5}
    config = tiny(2, 4, memory=memory)
    p, host, device = program(config), costs.host_bytes(config), costs.device_bytes(config)

    def exact(tree: Any) -> int:
        return sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree) if x.ndim)

    layers = p.abstract["params"]["layers"]
    assert host["parameters"] == host["gradients"] == pytest.approx(exact(layers), rel=0.1)  # some biases are not divided
    assert device["parameters"] == pytest.approx(exact(p.abstract["params"]) - exact(layers), rel=0.03)
    assert host["optimizer"] == pytest.approx(exact(p.abstract["opt_state"]), rel=0.05)
    assert host["activations"] == device["activations"] > 0
    traffic = costs.host_traffic(config)
    assert traffic["parameters"] == 2 * traffic["gradients"] == 4 * host["parameters"]
    without = dataclasses.replace(config, memory=dataclasses.replace(config.memory, offload_params=False))
    assert costs.step_seconds(config, H100)["step"] > costs.step_seconds(without, H100)["step"]


def test_a_model_too_large_for_a_gpu_is_streamed():
    """Llama 3 8B's parameters and gradients in float32 leave no room for 192K tokens on one GPU."""
    plan = make_plan(recipes.llama3_8b(), H100, 1, 196608, host_limit=120 * GIB)
    assert plan is not None
    assert plan.config.memory.offload_params
    assert make_plan(recipes.llama3_8b(), H100, 1, 196608, host_limit=110 * GIB) is None


def test_a_policy_is_chosen_that_fits_and_none_that_fits_is_faster():
    """Taking the first that fits breaks it."""
    model = recipes.llama_7b()
    plan = make_plan(model, H100, 2, 65536, host_limit=0)
    assert plan is not None
    assert plan.fits
    assert sum(plan.host.values()) == 0
    for memory in policies(model.num_layers):
        other = dataclasses.replace(plan, config=dataclasses.replace(plan.config, memory=memory))
        assert not other.fits or other.seconds["step"] >= plan.seconds["step"]
    roomier = make_plan(model, H100, 2, 65536, host_limit=128 * GIB)
    assert roomier is not None
    assert roomier.seconds["step"] < plan.seconds["step"]
    assert roomier.config.memory.offload_layers


@pytest.mark.parametrize("gpu", ["h100", "a100"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_dim": 96},
        {"head_dim": 100},
        {"head_dim": 256},
        {"head_dim": 320},
        {"logits_soft_cap": 30.0},
        {"attention_sinks": True},
        {"local_window_size": 100},
        {"local_window_size": 100, "is_causal": False},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_the_gpu_has_the_attention_that_a_plan_is_for(gpu, options, monkeypatch):
    """cuDNN for whatever it lacks, or the kernels for heads beyond theirs, break it."""
    name = costs.GPUS[gpu].name
    monkeypatch.setattr("ulysses_jax.attention._device", lambda: ("gpu", name))
    monkeypatch.setattr("ulysses_jax.attention.check_platform", lambda *_: None)
    model = dataclasses.replace(recipes.MODELS["llama3-8b"](), **options)
    window = model.local_window_size and (model.local_window_size, 0 if model.is_causal else model.local_window_size)
    mask = make_mask(256, is_causal=model.is_causal, local_window_size=window)
    q = jax.ShapeDtypeStruct((1, 256, 2, model.head_dim), model.dtype)
    named = _kernel(costs.GPUS[gpu], model)
    found = Options(model.head_dim**-0.5, model.logits_soft_cap, named)
    assert resolve(q, mask, found, model.attention_sinks) == named  # pyright: ignore[reportArgumentType]
    best = resolve(q, mask, found._replace(implementation=None), model.attention_sinks)  # pyright: ignore[reportArgumentType]
    assert (named == best) or (named, best, gpu) == ("pallas", "cudnn", "h100")


def test_the_longest_fits_and_a_little_longer_does_not():
    model = recipes.llama_7b()
    plan = longest_plan(model, H100, 2, host_limit=64 * GIB)
    assert plan is not None
    length = plan.config.data.seq_len
    assert length >= 262144, "DeepSpeed's longest with everything on the host"
    assert make_plan(model, H100, 2, length + 8192, host_limit=64 * GIB) is None
    assert longest_plan(recipes.gpt_30b(), H100, 1, host_limit=64 * GIB) is None


def test_host_copies_slow_a_step_that_is_too_short_for_them():
    plan = make_plan(recipes.llama_7b(), H100, 2, 65536, host_limit=0)
    assert plan is not None
    all_sent = MemoryConfig(save="projections", offload_layers=1.0)
    slow = dataclasses.replace(H100, host_bytes_per_s=1e9)
    config = dataclasses.replace(plan.config, memory=all_sent)
    assert costs.step_seconds(config, slow)["step"] > 2 * costs.step_seconds(config, H100)["step"]


def test_only_copies_of_all_layers_are_hidden():
    """Half of the layers' products on the host took 0.35 s more than none; hiding them would make the plan choose them."""
    plan = make_plan(recipes.llama_7b(), H100, 2, 65536, host_limit=0)
    assert plan is not None

    def seconds(memory: MemoryConfig) -> dict[str, float]:
        return costs.step_seconds(dataclasses.replace(plan.config, memory=memory), H100)

    half = MemoryConfig(save="attention", save_layers=0.5, save_others="products", offload_layers=0.5)
    found, beside = seconds(half), seconds(dataclasses.replace(half, offload_layers=0.0))
    assert found["step"] == pytest.approx(beside["step"] + found["host"])
    every = seconds(MemoryConfig(offload_layers=1.0))
    assert every["host"] > 0
    assert every["step"] == seconds(MemoryConfig())["step"]


def test_the_command_line_prints_one_json_object(capsys):
    assert cli.main(["plan", "--model", "llama3-8b", "--devices", "8", "--length", "131072", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert answer["config"]["data"]["seq_len"] == 131072
    assert sum(answer["device_bytes"].values()) <= answer["memory_bytes"]
    assert {"device_bytes", "host_bytes", "wire_bytes", "seconds"} <= answer.keys()
    assert cli.main(["plan", "--model", "llama-7b", "--devices", "2", "--longest"]) == 0
    assert "predicted time of a step" in capsys.readouterr().out


def told(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_the_table_shows_the_mesh_and_who_idles(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    many = told(capsys, "--model", "llama3-8b", "--devices", "64")
    assert "mesh data 1 × seq 64 = 64 devices, ZeRO-3" in many
    assert "idle in attention 32 of 64 devices along seq, for there are 32 heads" in many
    few = told(capsys, "--model", "llama3-8b", "--devices", "32", "--gpu", "H100")
    assert "data 1 × seq 32" in few
    assert "idle" not in few


def test_a_policy_names_no_other_layers_where_there_are_none():
    """Broken by naming `save_others` in every policy: at save_layers 1 it says nothing."""
    default = MemoryConfig().save_others
    found = {(memory.save_layers < 1, memory.save_others) for memory in policies(32)}
    assert found == {(True, "attention"), (True, default), (False, default)}


def test_a_step_that_cannot_be_compiled_says_what_to_install(monkeypatch):
    """This package is on no index: broken by naming it."""
    plan = make_plan(recipes.llama_7b(), H100, 8, 65536, host_limit=0)
    assert plan is not None
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: no plugin\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"\(RuntimeError: no plugin\).* pip install 'jax\[cuda13\]'\. Leave out --compile"):
        certify(plan)
