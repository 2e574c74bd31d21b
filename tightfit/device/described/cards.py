"""Cards that are described in ``cards.toml``: what each offers, where that is known from, and what is assumed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tightfit.errors import UnsupportedInput
from tightfit.units import format_bytes, parse_bytes

_FILE = Path(__file__).with_name("cards.toml")
_ANY_CARD = re.compile(r"cuda:(\d+(?:\.\d+)?\s*[kmgt]i?b)", re.IGNORECASE)

#: The least share of the memory it is sold with that any card of the list offers to programs: a T4, with its ECC.
_OFFERED_SHARE = 0.91
#: The slowest of the list: the memory of an RTX 4060, a T4 without tensor cores.
_LEAST_BANDWIDTH_GB_S, _LEAST_FP32_TFLOPS = 272.0, 8.1
#: Every generation since Volta multiplies halves at least twice as fast as single precision.
_LEAST_HALF_RATIO = 2.0
#: What a context and the libraries' kernels take of a GPU, at most, as `CudaDevice` assumes where nobody tells.
_CONTEXT_BYTES = 640 << 20
#: The oldest architecture that a card of which only the size is known is taken to have: fused attention needs it.
_ANY_CAPABILITY = 80


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a card."""

    value: float
    source: str = ""
    assumed: str = ""
    """Why it is assumed; empty where it has a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card offers."""

    name: str
    """As in ``--device``."""
    title: str
    compute_capability: int
    """90 for ``sm_90``."""
    figures: Mapping[str, Figure]
    """By name, those of ``cards.toml`` and ``context_bytes``."""

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value

    @property
    def capacity_bytes(self) -> int:
        """All memory that CUDA says the card has."""
        return int(self["capacity_bytes"])

    @property
    def context_bytes(self) -> int:
        """What the driver, the context and the kernels that libraries load take of it."""
        return int(self["context_bytes"])

    def assumptions(self) -> list[str]:
        """Say which figures are assumed, and why."""
        found = {name: figure for name, figure in self.figures.items() if figure.assumed}
        return [f"{name} {_shown(name, figure.value)}: {figure.assumed}" for name, figure in found.items()]


def _shown(name: str, value: float) -> str:
    return format_bytes(int(value)) if name.endswith("_bytes") else f"{value:g}"


@cache
def cards() -> Mapping[str, Card]:
    """Return the cards of the list, by name."""
    listed = tomllib.loads(_FILE.read_text(encoding="utf-8"))["card"]
    return {entry["name"]: _card(entry) for entry in listed}


def card_named(text: str) -> Card | None:
    """Return the card that ``rtx4090-24gb`` or ``cuda:24GiB`` names; None where the text has the form of neither.

    Raises:
        UnsupportedInput: a size that is none.
    """
    name = text.strip().lower()
    if name in cards():
        return cards()[name]
    if (size := _ANY_CARD.fullmatch(text.strip())) is None:
        return None
    capacity_bytes = parse_bytes(size[1])
    if capacity_bytes <= _CONTEXT_BYTES:
        raise UnsupportedInput(
            f"a GPU with {format_bytes(capacity_bytes)} was named, of which a context alone may take "
            f"{format_bytes(_CONTEXT_BYTES)}. No step would be left any memory. Name a larger one, like cuda:24GiB."
        )
    figure = [capacity_bytes, "the size that was given"]
    size_gib = [capacity_bytes / 2**30, "the size that was given"]
    return _card(
        {
            "name": name,
            "title": f"a GPU with {size[1]}",
            "compute_capability": _ANY_CAPABILITY,
            "memory_gib": size_gib,
            "capacity_bytes": figure,
        }
    )


def card_for(text: str) -> Card:
    """Return the card that `text` names.

    Raises:
        UnsupportedInput: it names none.
    """
    card = card_named(text)
    if card is None:
        raise UnsupportedInput(
            f"{text!r} names no card that is described. What a step takes depends on the GPU. Write one of "
            f"`tightfit devices`, such as rtx4090-24gb, or the size of any other, such as cuda:24GiB."
        )
    return card


def _card(entry: Mapping[str, Any]) -> Card:
    given = {name: Figure(*entry[name]) for name in _ASSUMED if name in entry}
    size_gib = entry["memory_gib"][0]
    figures = {"memory_gib": Figure(*entry["memory_gib"])}
    for name, (share, of, why) in _ASSUMED.items():
        base = {"memory_gib": size_gib * 2**30, "fp32_tflops": figures.get("fp32_tflops", Figure(0)).value, "": 1}[of]
        figures[name] = given.get(name, Figure(share * base, assumed=why))
    return Card(
        name=entry["name"], title=entry["title"], compute_capability=entry["compute_capability"], figures=figures
    )


#: What stands for an absent figure: a factor, what it multiplies, and the reason that is given.
_ASSUMED = {
    "capacity_bytes": (_OFFERED_SHARE, "memory_gib", "the least share that any measured card offers to programs"),
    "bandwidth_gb_s": (_LEAST_BANDWIDTH_GB_S, "", "the slowest of the listed cards"),
    "fp32_tflops": (_LEAST_FP32_TFLOPS, "", "the slowest of the listed cards"),
    "half_tflops": (_LEAST_HALF_RATIO, "fp32_tflops", "twice the rate of single precision"),
    "context_bytes": (_CONTEXT_BYTES, "", "contexts and loaded kernels took no more on the cards that were seen"),
}
