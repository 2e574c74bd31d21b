"""Running a script of `examples/` as its user does, and what it says of itself."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def run_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps its budget, and its weights are those of the same script without tightfit."""
    name, *words = command.split()
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, *words])
    log = logging.getLogger("tightfit")
    level = log.level
    try:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    finally:
        log.setLevel(level)  # an example says how much is logged
    plain, planned, budget, weights = capsys.readouterr().out.splitlines()[-4:]
    assert float(plain.split()[2]) > float(planned.split()[2])
    assert budget.endswith("that were metered: yes")
    assert weights.endswith("bit for bit: yes")
