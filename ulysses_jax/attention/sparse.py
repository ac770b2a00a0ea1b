"""Ready-made layouts for `block_mask`: which blocks of keys each block of queries sees, so that attention costs less than T².

All are for T = S = `length`, with n = ⌈length / block⌉ blocks a side, and let every query see itself. With `is_causal` the
blocks above the diagonal, which a causal mask hides, are left out; it goes together with `is_causal=True` in attention, which
cuts the blocks on the diagonal. `BlockMask.density` is the share of the n² blocks that is left.
"""

import operator
from collections.abc import Sequence

import numpy as np

from ulysses_jax.attention.masks import BlockMask, in_words

__all__ = ["bigbird_blocks", "fixed_blocks", "longformer_blocks"]


def fixed_blocks(
    length: int,
    *,
    block: int = 128,
    local_blocks: int = 4,
    global_blocks: int = 1,
    heads: int = 1,
    is_causal: bool = False,
) -> BlockMask:
    """The fixed pattern of Sparse Transformers (arXiv 1904.10509, section 4.3), both of its factors in each head.

    The sequence is cut into stretches of l = `local_blocks` blocks. A query sees its own stretch, and of every other one the
    c = `global_blocks` blocks that sum it up: the last ones in head 0, those before them in head 1, and so on, around.
    Where l divides n, the density is l/n + c/l − c/n, for the layout of each head.

    Args:
      length: T, in tokens.
      block: tokens in a block.
      local_blocks: l, the paper's stride in blocks.
      global_blocks: c; it must divide l.
      heads: 1 for a layout that all heads share, or N.
      is_causal: leave out what lies above the diagonal.

    Raises:
      ValueError: a size below 1, or c that does not divide l.
    """
    n = _blocks(length, block, heads=heads, local_blocks=local_blocks, global_blocks=global_blocks)
    if local_blocks % global_blocks:
        raise ValueError(
            f"global_blocks is {global_blocks}; it must divide local_blocks = {local_blocks}, so that heads can take turns."
        )
    at = np.arange(n)
    stretch, place = at // local_blocks, (local_blocks - 1 - at % local_blocks) // global_blocks
    turns = np.arange(heads) % (local_blocks // global_blocks)
    layout = (stretch[:, None] == stretch)[None] | (place == turns[:, None])[:, None]
    return _finished(layout, block, is_causal)


def bigbird_blocks(
    length: int,
    *,
    block: int = 128,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
    heads: int = 1,
    is_causal: bool = False,
) -> BlockMask:
    """BigBird (arXiv 2007.14062, section 2, its internal construction): window, global and random blocks.

    A block sees the w = `window_blocks` around itself, the first g = `global_blocks` and r = `random_blocks` others drawn
    without return; the global blocks see, and are seen by, all. The density is about (w + 2·g + r) / n. With `is_causal` the
    random ones are drawn from those before; a block that has fewer than r left sees them all.

    Args:
      length: T, in tokens.
      block: tokens in a block.
      window_blocks: w, odd, the block itself among them.
      global_blocks: g.
      random_blocks: r.
      seed: of the random blocks; equal seeds and sizes give equal layouts.
      heads: 1 for a layout that all heads share, or N for one each, of other random blocks.
      is_causal: leave out what lies above the diagonal.

    Raises:
      ValueError: a size below 1 (0 for g and r), or an even w.
    """
    n = _blocks(length, block, heads=heads, window_blocks=window_blocks)
    _at_least(0, global_blocks=global_blocks, random_blocks=random_blocks, seed=seed)
    at, rng = np.arange(n), np.random.default_rng(seed)
    base = _window(n, window_blocks) | (at < global_blocks)[:, None] | (at < global_blocks)
    free = ~base & (np.tri(n, dtype=bool) if is_causal else True)
    layout = np.repeat(base[None], heads, axis=0)
    drawn = min(random_blocks, n)
    for head in layout if drawn else ():
        lots = np.where(free, rng.random((n, n)), 2)
        chosen = np.argpartition(lots, drawn - 1, axis=1)[:, :drawn]
        rows = at[:, None]
        head[rows, chosen] |= free[rows, chosen]
    return _finished(layout, block, is_causal)


def longformer_blocks(
    length: int,
    *,
    block: int = 128,
    window_blocks: int = 5,
    global_tokens: Sequence[int] = (0,),
    is_causal: bool = False,
) -> BlockMask:
    """Longformer (arXiv 2004.05150, section 3.1): a sliding window, and tokens that see, and are seen by, all.

    A block sees the w = `window_blocks` around itself and the g blocks that hold a global token; these see all blocks. The
    density is about (w + 2·g) / n.

    Args:
      length: T, in tokens.
      block: tokens in a block.
      window_blocks: w, odd, the block itself among them.
      global_tokens: positions in the sequence, such as that of a question's first token; their whole blocks are global.
      is_causal: leave out what lies above the diagonal.

    Raises:
      ValueError: a size below 1, an even w, or a position outside the sequence.
    """
    n = _blocks(length, block, window_blocks=window_blocks)
    if outside := [token for token in global_tokens if not 0 <= token < length]:
        raise ValueError(f"global_tokens holds {outside[0]}; positions must be in [0, {length}).")
    is_global = np.zeros(n, bool)
    is_global[[token // block for token in global_tokens]] = True
    return _finished((_window(n, window_blocks) | is_global[:, None] | is_global)[None], block, is_causal)


def _blocks(length: int, block: int, **sizes: int) -> int:
    """⌈length / block⌉, after the checks that all patterns share."""
    _at_least(1, length=length, block=block, **sizes)
    return -(-length // block)


def _at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        try:
            right = operator.index(size) >= least
        except TypeError:
            right = False
        if not right:
            raise ValueError(f"{name} is {in_words(size)}; it must be an int ≥ {least}.")


def _window(n: int, width: int) -> np.ndarray:
    """[n, n] bool, true within a band of odd width around the diagonal."""
    if width % 2 == 0:
        raise ValueError(f"window_blocks is {width}; it must be odd: as many blocks on either side, and the block itself.")
    at = np.arange(n)
    return abs(at[:, None] - at) <= width // 2


def _finished(layout: np.ndarray, block: int, is_causal: bool) -> BlockMask:
    return BlockMask(np.tril(layout) if is_causal else layout, block)
