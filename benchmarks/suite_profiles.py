"""Profiles of the suite's models, and a heading that says where figures come from."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import recollect
from recollect.records import Profile
from tests.suite import Size, build

os.environ.setdefault("KINETO_LOG_LEVEL", "5")


def suite_profile(name: str, size: Size) -> Profile:
    """The measured profile of one model of the suite; or one that was saved, where `name` is a file."""
    if Path(name).suffix == ".json":
        return Profile.load(name)
    case = build(name, size)
    return recollect.measure(case.model, case.batch, loss=case.loss, optimizer=case.optimizers())


def heading(title: str, module: str, size: str) -> list[str]:
    """A result's first lines."""
    return [
        f"# {title}",
        "",
        f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores (busy with other work), fp32, "
        f'PyTorch {torch.__version__}, suite size "{size}"; `python -m {module}`.',
        "",
    ]
