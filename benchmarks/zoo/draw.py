"""Which names a run of the zoo takes: drawn by a seed, so that nobody chooses."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

NAMES = Path(__file__).with_name("names.toml")

#: Of a family and a name.
Key = tuple[str, str]


def read_names(path: Path = NAMES) -> dict[str, list[str]]:
    """Return the names of each family."""
    names: dict[str, list[str]] = tomllib.loads(path.read_text())
    return names


def draw(names: dict[str, list[str]], seed: int, each: int | None) -> list[Key]:
    """Draw `each` names of every family (all, with None), the first of each family first.

    A family's draw does not depend on the other families, nor on `each`: a larger one begins with the smaller.
    """
    drawn: dict[str, list[str]] = {}
    for family, known in names.items():
        drawn[family] = sorted(known)
        random.Random(f"{seed} {family}").shuffle(drawn[family])
        drawn[family] = drawn[family][:each]
    rounds = max(map(len, drawn.values()), default=0)
    return [
        (family, chosen[place]) for place in range(rounds) for family, chosen in drawn.items() if place < len(chosen)
    ]


def part_of(keys: list[Key], part: str) -> list[Key]:
    """Return the i-th of n parts of a draw, as "i/n" says, with i from 1.

    Raises:
        ValueError: it says something else.
    """
    one, _, count = part.partition("/")
    if not (one.isdecimal() and count.isdecimal() and 1 <= int(one) <= int(count)):
        raise ValueError(f"PART={part!r} is not a part. It has to say which of how many, such as 2/5.")
    return keys[int(one) - 1 :: int(count)]
