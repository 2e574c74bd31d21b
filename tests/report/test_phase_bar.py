"""Planning and proving say how far they are; a terminal shows it in one line, anything else sees nothing of it."""

from __future__ import annotations

from io import StringIO

import torch
from rich.console import Console
from torch import nn

import tightfit
from tightfit.progress import heard_by, progress
from tightfit.report.phase_bar import showing_phases


def test_fit_says_how_far_it_is() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)))
    said: list[tuple[str, int, int]] = []
    with heard_by(lambda *one: said.append(one)):
        tightfit.fit(model, torch.randn(8, 64), budget="1MiB", loss=lambda m, b: m(b).sum()).remove()
        count = len(said)
    progress("nobody hears this")
    assert len(said) == count
    assert all(0 <= done < total or total == 0 for _, done, total in said)
    phases = list(dict.fromkeys(phase for phase, _, _ in said))
    assert phases[0] == "observing a step"
    assert phases[-1] == "timing steps"
    assert {"solving", "trying the plan", "running the plain step"} < set(phases)


def test_a_terminal_shows_one_line_that_does_not_stay() -> None:
    out = StringIO()
    with showing_phases(Console(file=out, force_terminal=True, width=100)):
        progress("solving [this]")
        progress("timing operations", 20, 80)
    text = out.getvalue()
    assert "solving [this]" in text
    assert "timing operations 20 of 80" in text
    assert text.endswith("\x1b[2K")  # the line is erased


def test_a_file_gets_nothing() -> None:
    out = StringIO()
    with showing_phases(Console(file=out)):
        progress("solving")
    assert out.getvalue() == ""
