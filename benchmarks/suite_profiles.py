"""Profiles of the suite's models, and a heading that says where figures come from."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch

import tightfit
from tests.suite import Size, build
from tightfit.records import Profile

os.environ.setdefault("KINETO_LOG_LEVEL", "5")


def suite_profile(name: str, size: Size) -> Profile:
    """The measured profile of one model of the suite; or one that was saved, where `name` is a file."""
    if Path(name).suffix == ".json":
        return Profile.load(name)
    case = build(name, size)
    return tightfit.measure(case.model, case.batch, loss=case.loss, optimizer=case.optimizers())


def heading(title: str, module: str, size: str) -> list[str]:
    """A result's first lines."""
    # Where the result goes says nothing about it.
    arguments = [
        a for a, before in zip(sys.argv[1:], ["", *sys.argv[1:]], strict=False) if "--output" not in (a, before)
    ]
    return [
        f"# {title}",
        "",
        f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores, fp32, PyTorch {torch.__version__}, suite "
        f'size "{size}"; `{shlex.join(["python", "-m", module, *arguments])}`.',
        "",
    ]
