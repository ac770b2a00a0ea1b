"""Training Transformers on extremely long sequences in JAX: DeepSpeed-Ulysses with `shard_map`, ZeRO by named shardings."""

from ulysses_jax.attention import BlockMask as BlockMask
from ulysses_jax.attention import bigbird_blocks as bigbird_blocks
from ulysses_jax.attention import dot_product_attention as dot_product_attention
from ulysses_jax.attention import fixed_blocks as fixed_blocks
from ulysses_jax.attention import longformer_blocks as longformer_blocks
from ulysses_jax.attention import make_mask as make_mask
from ulysses_jax.config import ModelConfig as ModelConfig
from ulysses_jax.config import TrainConfig as TrainConfig
from ulysses_jax.flax_layers import attention_fn as attention_fn
from ulysses_jax.mesh import make_mesh as make_mesh
from ulysses_jax.model import Transformer as Transformer
from ulysses_jax.ulysses import heads_to_seq as heads_to_seq
from ulysses_jax.ulysses import seq_to_heads as seq_to_heads
from ulysses_jax.ulysses import ulysses_attention as ulysses_attention
from ulysses_jax.ulysses import ulysses_attention_shard as ulysses_attention_shard
from ulysses_jax.zero import zero_shardings as zero_shardings
