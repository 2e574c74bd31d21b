"""Reading what runs have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(run: str) -> list[dict[str, Any]]:
    """The logged steps of the run in ``runs/RUN``."""
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
