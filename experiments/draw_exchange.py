"""Draw docs/exchange.svg: the layout change of DeepSpeed-Ulysses, for 8 tokens × 4 heads on 4 devices.

uv run python experiments/draw_exchange.py

Rows are heads (one colour each), columns are tokens. Before the exchange the array is cut between columns, after it between
rows. The drawing carries its own background, so it can be read on dark pages and light ones, whichever style applies.
"""

from pathlib import Path

TOKENS, HEADS, DEVICES = 8, 4, 4
CELL, GAP, PAD = 30, 12, 7  # pixels: a cell's side, between two devices, around a device's cells
COLOURS = ("#2f74b5", "#b8700a", "#23855f", "#b04f87")  # told apart in the common colour blindnesses
PATH = Path(__file__).resolve().parent.parent / "docs" / "exchange.svg"

STYLE = """
  .page { fill: #fcfcfb; } .device { fill: none; stroke: #57606a; stroke-width: 1.5; } .arrow { stroke: #57606a; }
  .tip { fill: #57606a; } text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328; }
  .faint { fill: #57606a; } .cell { fill: #fff; font-size: 12px; font-weight: 600; }
  .title { font-size: 15px; font-weight: 600; } .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #161b22; } .device { stroke: #9aa4af; } .arrow { stroke: #9aa4af; } .tip { fill: #9aa4af; }
    text { fill: #e6edf3; } .faint { fill: #9aa4af; } .cell { fill: #fff; }
  }"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def device(x: float, y: float, tokens: range, heads: range) -> list[str]:
    """One device's box at (x, y) with its cells, each marked with its token."""
    width, height = len(tokens) * CELL + 2 * PAD, len(heads) * CELL + 2 * PAD
    parts = [f'<rect class="device" x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="7"/>']
    for i, head in enumerate(heads):
        for j, token in enumerate(tokens):
            left, top = x + PAD + j * CELL, y + PAD + i * CELL
            parts.append(
                f'<rect x="{left + 1.5:g}" y="{top + 1.5:g}" width="{CELL - 3}" height="{CELL - 3}" rx="3" '
                f'fill="{COLOURS[head]}"/>'
            )
            parts.append(text(left + CELL / 2, top + CELL / 2 + 4, f"{token}", "cell"))
    return parts


def before(x: float, y: float) -> list[str]:
    """All heads of a few tokens on each device: boxes side by side."""
    mine = TOKENS // DEVICES
    step = mine * CELL + 2 * PAD + GAP
    parts = [text(x - 8, y + PAD + h * CELL + CELL / 2 + 4, f"head {h}", "faint", "end") for h in range(HEADS)]
    for p in range(DEVICES):
        parts += device(x + p * step, y, range(p * mine, (p + 1) * mine), range(HEADS))
        parts.append(text(x + p * step + step / 2 - GAP / 2, y - 10, f"device {p}"))
    return parts


def after(x: float, y: float) -> list[str]:
    """All tokens of a few heads on each device: boxes one above the other."""
    mine = HEADS // DEVICES
    step = mine * CELL + 2 * PAD + GAP
    parts = []
    for p in range(DEVICES):
        parts += device(x, y + p * step, range(TOKENS), range(p * mine, (p + 1) * mine))
        parts.append(text(x + TOKENS * CELL + 2 * PAD + 10, y + p * step + step / 2 - GAP / 2 + 4, f"device {p}", "", "start"))
    return parts


def arrow(x: float, y: float, length: float, label: str) -> list[str]:
    """A horizontal arrow from x over `length` (leftwards if negative), its label above."""
    end, tip = x + length, 9 if length > 0 else -9
    return [
        f'<line class="arrow" x1="{x:g}" y1="{y:g}" x2="{end - tip:g}" y2="{y:g}" stroke-width="2"/>',
        f'<path class="tip" d="M{end:g} {y:g} l{-tip} -5 v10 z"/>',
        text(x + length / 2, y - 9, label, "code"),
    ]


def draw() -> str:
    """The whole drawing."""
    left, right, width, height = 74, 578, 912, 332
    wide = DEVICES * (TOKENS // DEVICES * CELL + 2 * PAD + GAP) - GAP
    middle_before, middle_after = left + wide / 2, right + (TOKENS * CELL + 2 * PAD) / 2
    start, length = left + wide + 22, right - left - wide - 44
    parts = [
        text(middle_before, 30, "my tokens, all heads", "title"),
        text(middle_after, 30, "all tokens, my heads", "title"),
        *before(left, 95),
        *after(right, 52),
        *arrow(start, 150, length, "seq_to_heads"),
        *arrow(start + length, 196, -length, "heads_to_seq"),
        text(start + length / 2, 114, "all-to-all", "title"),
        text(middle_before, 314, "[B, T/P, N, H] on each of P devices", "code"),
        text(middle_after, 314, "[B, T, N/P, H] on each of P devices", "code"),
        text(middle_after, 294, "attention runs here, on whole sequences", "faint"),
        text(middle_before, 294, "everything else runs here, token by token", "faint"),
    ]
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        "  <title>Before the all-to-all a device holds some tokens of all heads; after it, all tokens of some heads</title>\n"
        f"  <style>{STYLE}\n  </style>\n"
        f'  <rect class="page" width="{width}" height="{height}" rx="10"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(draw())
    print(PATH)
