"""What the backward keeps and what it computes again.

The model marks its layers' attention outputs by name ("attention_out", "attention_lse", inside the attention itself), so a
policy can keep just those: they are the dearest to compute again, quadratic in T, and only 2·B·T·D bytes a layer to keep.
"""

from collections.abc import Callable

import jax

from ulysses_jax.config import Remat

__all__ = ["rematerialize"]


def rematerialize(layer: Callable, remat: Remat) -> Callable:
    """`layer`, its backward recomputing what `remat` says.

    Args:
      layer: the body of a scan over layers.
      remat: "none" keeps every intermediate; "attention" keeps each layer's input and its attention's output; "full" keeps
        each layer's input alone.
    """
    match remat:
        case "none":
            return layer
        case "attention":
            keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
            return jax.checkpoint(layer, policy=keep, prevent_cse=False)  # a scan's body is one region already
        case "full":
            return jax.checkpoint(layer, prevent_cse=False)
        case _:
            raise ValueError(f"remat is {remat!r}; it must be one of none, attention, full.")
