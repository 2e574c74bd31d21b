"""What tests look at of a run, and the objects that one is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tightfit.train.config import TrainConfig
from tightfit.train.workload import Workload, build, resolve


def metrics(run: str) -> list[dict[str, Any]]:
    """The logged steps of a run in the working folder."""
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


def weights(run: str) -> dict[str, torch.Tensor]:
    """The model that it saved."""
    return load_file(Path("runs") / run / "model.safetensors")


def workload(**settings: Any) -> Workload:
    """What a run with these settings works with."""
    return build(*resolve(TrainConfig(**settings)))
