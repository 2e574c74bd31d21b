"""Parse and format memory sizes.  Bytes are always ``int``."""

from __future__ import annotations

import math
import re

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    # A bare letter is binary, as in `ulimit`, `docker --memory` and the JVM.
    **{prefix: 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Parse a memory size into bytes, rounded down.

    Accepts ``8GiB`` and ``512M`` (binary), ``8GB`` (decimal), ``1.5 GiB`` and ``1048576``.

    Raises:
        ValueError: `text` is not a positive size.

    >>> parse_bytes("8GiB") == 8 * 2**30
    True
    >>> parse_bytes("8GB")
    8000000000
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is not a memory size. Write it like 8GiB, 8GB or 512MiB.")
    if isinstance(text, int):
        size = text
    else:
        match = _PATTERN.fullmatch(text)
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(f"{text!r} is not a memory size. Write it like 8GiB, 8GB or 512MiB.")
        size = math.floor(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive memory size. Write it like 8GiB, 8GB or 512MiB.")
    return size


def format_budget(size_bytes: int) -> str:
    """Format a budget that is named to be given again: as `format_bytes`, rounded up, so that the text is enough.

    >>> format_bytes(73_100_000), format_budget(73_100_000)
    ('69.7 MiB', '69.8 MiB')
    """
    power = 0
    while size_bytes >= 1024 ** (power + 1) and power < 4:
        power += 1
    tenth_bytes = 1024**power / 10
    rounded_bytes = math.ceil(math.ceil(size_bytes / tenth_bytes) * tenth_bytes) if power else size_bytes
    return format_bytes(rounded_bytes)


def unit_of(most_bytes: int) -> tuple[str, int]:
    """Return the unit in which so many bytes are a number of few digits, and its bytes.

    >>> unit_of(191260262)
    ('MiB', 1048576)
    """
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if most_bytes >= 2 * unit_bytes:
            return unit, unit_bytes
    return "B", 1


def format_bytes(size_bytes: int) -> str:
    """Format bytes in binary units with one decimal: ``512 B``, ``1.5 KiB``, ``182.4 MiB``.

    >>> format_bytes(191260262)
    '182.4 MiB'
    """
    sign, magnitude = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if magnitude < 1024:
        return f"{sign}{magnitude} B"
    size = float(magnitude)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{sign}{size:.1f} {unit}"
    return f"{sign}{size / 1024:.1f} TiB"
