"""Named runs: functions that return a complete config, every field of which the command line can override.

Model shapes are functions of their own, `gpt_1p2b` and so on, for use without a run.
"""

import dataclasses
from collections.abc import Callable

from ulysses_jax.config import (
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)

__all__ = ["MODELS", "RECIPES", "gpt_1p2b", "gpt_7b", "gpt_30b", "llama3_8b", "llama_1p3b", "llama_7b", "recipe", "tiny"]

BYTES = 320  # 256 bytes, the end of a document, a mask, and a round number


def tiny() -> ModelConfig:
    """0.9M parameters over bytes: trains on a laptop's CPU."""
    return ModelConfig(
        vocab_size=BYTES,
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=384,
        dtype="float32",
    )


def gpt_1p2b() -> ModelConfig:
    """The paper's 1.2B GPT: 24 layers of 2048. The paper gives sizes only; width and depth follow GPT-3's table."""
    return ModelConfig(
        vocab_size=50304,
        num_layers=24,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=5504,
        tie_embeddings=True,
    )


def gpt_7b() -> ModelConfig:
    """The paper's 7B GPT: 32 layers of 4096."""
    return ModelConfig(
        vocab_size=50304,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
    )


def llama_1p3b() -> ModelConfig:
    """1.3B in Llama's shape, as DeepSpeed's examples train it: 24 layers of 2048."""
    return ModelConfig(
        vocab_size=32000,
        num_layers=24,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=5504,
    )


def llama_7b() -> ModelConfig:
    """Llama 7B (arXiv 2302.13971): the 7B GPT with a smaller vocabulary."""
    return dataclasses.replace(gpt_7b(), vocab_size=32000)


def gpt_30b() -> ModelConfig:
    """The paper's 30B GPT: 64 layers of 6144; heads of 96, so that 64 devices have one each."""
    return ModelConfig(
        vocab_size=50304,
        num_layers=64,
        embed_dim=6144,
        num_heads=64,
        num_kv_heads=64,
        head_dim=96,
        mlp_dim=16384,
    )


def llama3_8b() -> ModelConfig:
    """Llama 3.1 8B (arXiv 2407.21783): grouped-query attention, RoPE stretched to 131,072 tokens."""
    return ModelConfig(
        vocab_size=128256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(),
    )


def demo() -> TrainConfig:
    """Python's own source as bytes on 8 virtual CPU devices: data 2 × seq 4, ZeRO-3, sequences of 2,048"""
    return TrainConfig(
        model=tiny(),
        mesh=MeshConfig(data=2, seq=4),
        data=DataConfig(seq_len=2048, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        checkpoint=CheckpointConfig(every=20),
        steps=60,
        log_every=5,
    )


def demo_bidirectional() -> TrainConfig:
    """The demo with a bidirectional model that fills in masked bytes (BERT's objective)"""
    config = demo()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, is_causal=False))


def _long(model: ModelConfig, *, seq_len: int, devices: int, steps: int = 1000) -> TrainConfig:
    return TrainConfig(
        model=model,
        mesh=MeshConfig(seq=devices),
        data=DataConfig(seq_len=seq_len, batch_size=1),
        optimizer=OptimizerConfig(warmup_steps=50),
        checkpoint=CheckpointConfig(every=250),
        steps=steps,
        log_every=5,
    )


def gpt_1p2b_32k() -> TrainConfig:
    """GPT 1.2B at 32,768 tokens on one GPU of 80 GB"""
    return _long(gpt_1p2b(), seq_len=32768, devices=1)


def gpt_7b_64k() -> TrainConfig:
    """GPT 7B at 65,536 tokens on 8 GPUs"""
    return _long(gpt_7b(), seq_len=65536, devices=8)


def llama_1p3b_32k() -> TrainConfig:
    """Llama-shaped 1.3B at 32,768 tokens on 2 GPUs, every product of matrices kept"""
    config = _long(llama_1p3b(), seq_len=32768, devices=2)
    return dataclasses.replace(config, memory=MemoryConfig(save="products"))


def llama_7b_64k() -> TrainConfig:
    """Llama 7B at 65,536 tokens on 2 GPUs of 80 GB"""
    return _long(llama_7b(), seq_len=65536, devices=2)


def gpt_30b_128k() -> TrainConfig:
    """GPT 30B at 131,072 tokens on 64 GPUs"""
    return _long(gpt_30b(), seq_len=131072, devices=64)


def llama3_8b_128k() -> TrainConfig:
    """Llama 3.1 8B at 131,072 tokens on 8 GPUs"""
    return _long(llama3_8b(), seq_len=131072, devices=8)


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "gpt-1.2b": gpt_1p2b,
    "gpt-7b": gpt_7b,
    "gpt-30b": gpt_30b,
    "llama-1.3b": llama_1p3b,
    "llama-7b": llama_7b,
    "llama3-8b": llama3_8b,
}

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-bidirectional": demo_bidirectional,
    "gpt-1.2b-32k": gpt_1p2b_32k,
    "gpt-7b-64k": gpt_7b_64k,
    "gpt-30b-128k": gpt_30b_128k,
    "llama-1.3b-32k": llama_1p3b_32k,
    "llama-7b-64k": llama_7b_64k,
    "llama3-8b-128k": llama3_8b_128k,
}


def recipe(name: str) -> TrainConfig:
    """The config of a name.

    Raises:
      ValueError: no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}.")
    return RECIPES[name]()
