"""The pictures of docs/concepts.md are those that their script draws, and fit into their frames."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

FIGURES = Path(__file__).parent.parent / "docs/figures"
_SPEC = importlib.util.spec_from_file_location("concepts", FIGURES / "concepts.py")
assert _SPEC is not None
assert _SPEC.loader is not None
concepts = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(concepts)


@pytest.mark.parametrize("name", concepts.PICTURES)
def test_a_picture_is_the_scripts(name: str) -> None:
    drawn = concepts.PICTURES[name]().svg()
    assert (FIGURES / f"concept-{name}.svg").read_text(encoding="utf-8") == drawn, "run python docs/figures/concepts.py"
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
    for x, y, w, h in re.findall(r'<rect[^>]* x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn):
        assert float(x) + float(w) <= width
        assert float(y) + float(h) <= height
    for x, y, anchor, words in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"(.*?)>(.*?)</text>', drawn):
        right = float(x) + 6.5 * len(words) * (0 if "end" in anchor else 0.5 if "middle" in anchor else 1)
        assert right <= width, words
        assert float(y) <= height, words
