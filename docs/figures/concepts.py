"""Draw the pictures of docs/concepts.md: `python docs/figures/concepts.py` writes them beside itself.

Plain SVG with a style sheet of its own, for light and dark.  Sizes are in pixels; a picture is 720 wide.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH = 720
STYLE = """
svg { --ink: #1c2430; --soft: #5d6878; --rule: #aab4c0; --card: #f3f5f8; --kept: #3b82d6; --again: #f08a3c;
  --fixed: #8494a8; --bad: #b3261e; --good: #1a7f4b; --on: #fff; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6eaf0; --soft: #a0abba; --rule: #5b6674; --card: #232a33;
  --kept: #4a8fe0; --again: #ee9a55; --fixed: #69778a; --bad: #ff8a80; --good: #5cc48d; --on: #10141a; } }
text { font: 14px system-ui, sans-serif; fill: var(--ink); } .soft { fill: var(--soft); font-size: 12.5px; }
.strong { font-weight: 600; } .on { fill: var(--on); } .badtext { fill: var(--bad); } .goodtext { fill: var(--good); }
.card { fill: var(--card); stroke: var(--rule); } .kept { fill: var(--kept); } .again { fill: var(--again); }
.fixed { fill: var(--fixed); } .gone { fill: none; stroke: var(--rule); stroke-dasharray: 4 3; }
.arrow { stroke: var(--soft); stroke-width: 1.5; fill: none; marker-end: url(#tip); } .tip { fill: var(--soft); }
.budget { stroke: var(--bad); stroke-dasharray: 6 4; stroke-width: 1.5; }
"""
TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
)


class Picture:
    """Shapes in the order in which they are drawn."""

    def __init__(self, height: int, title: str) -> None:
        self.parts: list[str] = []
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'aria-label="{escape(title)}"><style>{STYLE}</style>{TIP}'
        )

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "card", words: str = "") -> None:
        """Draw a box with a centred line of text."""
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + 5, text, f"{words} middle")

    def text(self, x: float, y: float, text: str, words: str = "") -> None:
        """Write a line; ``middle`` and ``end`` among the words anchor it so."""
        anchor = next((f' text-anchor="{word}"' for word in words.split() if word in ("middle", "end")), "")
        self.parts.append(f'<text class="{words}" x="{x:g}" y="{y:g}"{anchor}>{escape(text)}</text>')

    def arrow(self, path: str) -> None:
        """Draw an arrow along an SVG path."""
        self.parts.append(f'<path class="arrow" d="{path}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Draw a straight line."""
        self.parts.append(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def svg(self) -> str:
        """Return the whole picture."""
        return "\n".join([self._head, *self.parts, "</svg>"]) + "\n"


def verbs() -> Picture:
    """Draw the four verbs, the records between them, and what goes back."""
    picture = Picture(150, "measure, solve, apply, verify")
    begins = [12 + 172 * place for place in range(4)]
    for begin, verb in zip(begins, ("measure", "solve", "apply", "verify"), strict=True):
        picture.box(begin, 46, 104, 44, verb, words="strong")
    for begin, record in zip(begins, ("Profile", "Plan", "Applied", "Verdict"), strict=True):
        picture.arrow(f"M{begin + 108} 68H{begin + 166}")
        picture.text(begin + 137, 58, record, "soft middle")
    for begin, given in zip(begins, ("model, batch, step", "budget", "model", "plain step"), strict=True):
        picture.text(begin + 52, 36, given, "soft middle")
    picture.arrow(f"M{begins[3] + 52} 94V122H{begins[1] + 52}V96")
    picture.text(begins[2] + 52, 138, "another peak was measured than predicted: solve again with it", "soft middle")
    return picture


def counted() -> Picture:
    """Draw what a budget counts at one moment of a step."""
    picture = Picture(190, "what a budget counts")
    rows = (
        (40, "CPU", (("parameters, buffers", 140, "fixed"), ("gradients", 82, "fixed"),
                     ("optimizer state", 112, "fixed"), ("batch", 52, "fixed"), ("activations", 112, "kept"),
                     ("recomputed", 90, "again"))),
        (110, "GPU", (("the same: what is allocated", 340, "fixed"),
                      ("cached by the allocator", 170, "kept"), ("context, libraries", 130, "fixed"))),
    )  # fmt: skip
    for y, name, parts in rows:
        picture.text(10, y + 26, name, "strong")
        x = 56
        for text, width, kind in parts:
            picture.box(x, y, width - 2, 40, kind=kind)
            picture.text(x + width / 2 - 1, y + 25, text, "on middle soft")
            x += width
    picture.text(56, 30, "resident: there in the whole step", "soft")
    picture.text(442, 30, "comes and goes, moment by moment", "soft")
    picture.line(696, 16, 696, 164, "budget")
    picture.text(690, 180, "the budget: at no moment more", "badtext soft end")
    return picture


def exactness() -> Picture:
    """Draw plain steps and the planned one from one state, compared bit by bit."""
    picture = Picture(200, "exactness")
    picture.box(10, 76, 130, 48, "one state", words="strong")
    picture.text(75, 144, "weights, random state,", "soft middle")
    picture.text(75, 160, "buffers, the batch", "soft middle")
    for y, name in ((14, "plain step"), (78, "plain step again"), (142, "planned step")):
        picture.box(220, y, 150, 44, name)
        picture.arrow(f"M144 100C180 100 180 {y + 22} 214 {y + 22}")
    picture.arrow("M374 36H452V56")
    picture.arrow("M374 100H452V80")
    picture.box(404, 58, 96, 22, "differ?", words="soft")
    picture.text(512, 66, "not reproducible without a plan:", "soft")
    picture.text(512, 82, "listed, never blamed on it", "soft")
    picture.arrow("M374 164H452V142")
    picture.arrow("M452 102V118")
    picture.box(404, 120, 96, 22, "equal bits?", words="soft")
    picture.text(512, 126, "loss, gradients, buffers,", "soft")
    picture.text(512, 142, "random state; else fit raises", "soft")
    return picture


def recursive() -> Picture:
    """Draw what is held while backward works on one block of sixteen, at three levels of recomputation."""
    picture = Picture(224, "recursive recomputation")
    picture.text(10, 22, "held while backward is at block 12 of 16", "strong")
    rows = (
        ("plain", "all that blocks save", dict.fromkeys(range(12), "kept")),
        ("every block dropped", "one tensor between each two", dict.fromkeys(range(12), "thin")),
        (
            "recursive",
            "every fourth; the rest runs again",
            dict.fromkeys((3, 7), "thin") | dict.fromkeys((8, 9, 10), "new"),
        ),
    )
    for row, (name, what, held) in enumerate(rows):
        y = 44 + 56 * row
        picture.text(10, y + 16, name)
        picture.text(10, y + 33, what, "soft")
        for block in range(16):
            x = 270 + 27 * block
            picture.box(x, y, 22, 34, kind="gone")
            kind = held.get(block)
            if kind == "kept":
                picture.box(x, y, 22, 34, kind="kept")
            elif kind:
                picture.box(x + 17, y, 5, 34, kind="kept" if kind == "thin" else "again")
            if block == 11:
                picture.box(x, y, 22, 34, kind="again" if row else "kept")
    picture.text(10, 216, "blue: held since forward; orange: recomputed for this block, and let go of after it", "soft")
    return picture


def opaque() -> Picture:
    """Draw a call that the dispatcher cannot see through, made again as a whole once it has shown that it can be."""
    picture = Picture(196, "opaque calls")
    picture.box(10, 70, 92, 40, "inputs")
    picture.box(166, 52, 150, 76, kind="fixed")
    picture.text(241, 84, "opaque call", "on strong middle")
    picture.text(241, 104, "kernels of its own", "on soft middle")
    picture.box(380, 34, 120, 36, "results")
    picture.box(380, 110, 120, 36, "what it saves", kind="gone")
    picture.arrow("M106 90H160")
    picture.arrow("M320 76C350 76 350 52 374 52")
    picture.arrow("M320 104C350 104 350 128 374 128")
    picture.arrow("M380 146C300 178 120 176 58 116")
    picture.text(226, 190, "backward: the same inputs and random state, the call once more", "soft middle")
    picture.text(512, 40, "the first is made twice: equal", "soft")
    picture.text(512, 56, "results, equal saved tensors,", "soft")
    picture.text(512, 72, "and nothing else moved?", "soft")
    picture.text(512, 98, "yes: dropped, made again", "goodtext soft")
    picture.text(512, 120, "no: kept; the plan says why", "badtext soft")
    return picture


PICTURES = {one.__name__: one for one in (verbs, counted, exactness, recursive, opaque)}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"concept-{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
