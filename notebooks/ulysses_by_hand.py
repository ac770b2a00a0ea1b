# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ulysses by hand
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ulysses-jax/ulysses_jax/blob/main/notebooks/ulysses_by_hand.ipynb)
#
# DeepSpeed-Ulysses ([arXiv 2309.14509](https://arxiv.org/abs/2309.14509)) divides a long sequence over P devices. Most of a
# Transformer works token by token and does not notice. Attention does: a token must see the others. Ulysses gives it whole
# sequences by one exchange before attention and one after.
#
# Here you do the exchange on an array that you can read, then attention through it, then a training loop of your own. It
# takes a minute or two on two CPU cores; no GPU is used.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    source = "ulysses-jax @ git+https://github.com/ulysses-jax/ulysses_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %%
import functools
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ulysses_jax as uj
from ulysses_jax.config import DataConfig
from ulysses_jax.data import Packing, open_corpus, place

# Four virtual devices, made from the CPU. It must be said before jax is used.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
mesh = uj.make_mesh(data=1, seq=4)
P = mesh.shape["seq"]

# %% [markdown]
# ## The exchange
#
# One sequence of 8 tokens, 4 heads, each head a vector of one number. The number says where it comes from: token · 10 + head,
# so 52 is token 5, head 2.

# %%
T, N = 8, 4
x = (10 * np.arange(T)[:, None] + np.arange(N))[None, :, :, None]  # [B, T, N, H] = [1, 8, 4, 1]
tokens_divided = NamedSharding(mesh, PartitionSpec(None, "seq"))
before = jax.device_put(x, tokens_divided)


def held(x: jax.Array) -> list[np.ndarray]:
    """What each device holds, heads down and tokens across."""
    return [np.asarray(shard.data)[0, :, :, 0].T for shard in sorted(x.addressable_shards, key=lambda s: s.device.id)]


def show(x: jax.Array) -> None:
    for p, mine in enumerate(held(x)):
        print(f"device {p}, heads × tokens = {mine.shape[0]} × {mine.shape[1]}\n{mine}\n")


show(before)

# %% [markdown]
# Each device has T/P = 2 tokens, with all their heads (a row is a head). Now the exchange: `seq_to_heads` runs on every
# device at once, inside `shard_map`, and is one all-to-all.

# %%
heads_divided = PartitionSpec(None, None, "seq")
exchange = jax.jit(
    jax.shard_map(
        functools.partial(uj.seq_to_heads, axis_name="seq"), mesh=mesh, in_specs=tokens_divided.spec, out_specs=heads_divided
    )
)
after = exchange(before)
show(after)

# %% [markdown]
# Each device now has all 8 tokens of N/P = 1 head: the last digits on a device are equal, and the tokens are in order. That
# is all attention needs, because heads do not speak to each other. `heads_to_seq` is the way back:

# %%
give_back = jax.jit(
    jax.shard_map(
        functools.partial(uj.heads_to_seq, axis_name="seq"), mesh=mesh, in_specs=heads_divided, out_specs=tokens_divided.spec
    )
)
assert all(np.array_equal(a, b) for a, b in zip(held(give_back(after)), held(before), strict=True))
print("back where it was, exactly")

# %% [markdown]
# ## What it sends
#
# Count what a device has after the exchange and had not before. Of its T·N/P numbers, 1/P were its own already: it receives
# (P−1)/P of T·N/P.

# %%
for p, (had, has) in enumerate(zip(held(before), held(after), strict=True)):
    new = np.setdiff1d(has, had)
    print(f"device {p} received {new.size} of {has.size} numbers, {new.size * has.itemsize} bytes: {new}")
print(f"(P−1)/P · T·N/P = {(P - 1) * T * N // P**2}")

# %% [markdown]
# A layer exchanges queries, keys, values and the output: four arrays of T·D/P numbers a device, where D is all heads
# together. Twice the tokens on twice the devices: T/P is as before, and so is what each device sends. A ring, or an
# all-gather, brings the keys and values of all tokens to every device, nearly 2·T·D numbers: that grows with T.

# %% [markdown]
# ## Attention through it
#
# `ulysses_attention` takes whole arrays and does both exchanges. What comes out is one device's attention, often to the last
# bit: each head is computed by one device, from the same numbers in the same order.

# %%
q, k, v = (jax.random.normal(key, (2, 512, 8, 16)) for key in jax.random.split(jax.random.key(0), 3))
together = uj.ulysses_attention(q, k, v, mesh=mesh, is_causal=True)
alone = uj.dot_product_attention(q, k, v, is_causal=True)
print("relative error", float(jnp.linalg.norm(together - alone) / jnp.linalg.norm(alone)))
print("a device holds", together.addressable_shards[0].data.shape, "of", together.shape)
np.testing.assert_allclose(together, alone, atol=1e-5)

# %% [markdown]
# ## A loop of your own
#
# A small model that reads Python's standard library byte by byte. It is written for one device; Ulysses comes in by its
# attention, and ZeRO by the shardings of its parameters and of the optimizer's state. The rest is plain JAX.

# %%
config = uj.ModelConfig(
    vocab_size=320, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=192, dtype="float32"
)
model = uj.Transformer(config, attention=uj.attention_fn(mesh), rngs=nnx.Rngs(0))
graph, params = nnx.split(model)
params = nnx.to_pure_dict(params)

steps = 60
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, steps))
opt_state = optimizer.init(params)
params_at, _, opt_at = uj.zero_shardings(params, opt_state, mesh=mesh, stage=3)
params, opt_state = jax.device_put((params, opt_state), (params_at, opt_at))

mine = params["layers"]["mlp"]["up"]
print("layers.mlp.up is", mine.shape, "and a device keeps", mine.addressable_shards[0].data.shape)


# %%
def loss_of(params, batch):
    logits = nnx.merge(graph, params)(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return (losses * batch["weights"]).sum() / batch["weights"].sum()


@functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(params_at, opt_at, None))
def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


data = DataConfig(seq_len=256, batch_size=4)
packing = Packing(open_corpus(data).train, data, config.vocab_size)

losses = []
for i in range(steps):
    params, opt_state, loss = step(params, opt_state, place(packing.batch(i), mesh))  # place: each device its T/P tokens
    losses.append(float(loss) / math.log(2))

# %%
fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(range(1, steps + 1), losses)
ax.axhline(8, color="gray", linestyle="--", label="knowing nothing: 8 bits")
ax.set(xlabel="step", ylabel="loss, bits a byte", title=f"{data.seq_len} tokens on {P} devices")
ax.legend()
print(f"from {losses[0]:.2f} to {losses[-1]:.2f} bits a byte")
assert losses[-1] < losses[0] - 2

# %% [markdown]
# ## On
#
# - Another model: `nnx.MultiHeadAttention(…, attention_fn=uj.attention_fn(mesh, is_causal=True))`, and Linen's likewise.
# - Inside a `shard_map` of yours: `ulysses_attention_shard`.
# - A whole trainer, with checkpoints: `ulysses train demo`.
