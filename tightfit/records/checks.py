"""Check records that were read from files."""

from __future__ import annotations


def require(holds: bool, trouble: str) -> None:
    """Raise ValueError with `trouble` unless `holds`."""
    if not holds:
        raise ValueError(trouble)
