"""`tightfit explain --device`: whether the step that was seen would fit a GPU that is not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tightfit.device.described.cards import card_for
from tightfit.errors import UnsupportedInput
from tightfit.explanation.elsewhere import on_card
from tightfit.explanation.script import explain_script
from tightfit.step.step import Step


def test_a_step_is_held_against_a_card_and_the_model_is_left_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(loss=lambda m, b: m(b).square().mean(), optimizer=optimizer)
    said = on_card(model, torch.randn(8, 16), step, card_for("t4-16gb"))
    assert said.startswith("on NVIDIA T4 (t4-16gb, described) it would fit as it is: a peak of ")
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in model.parameters())
    larger = on_card(model, torch.empty(2**26, 16, device="meta"), step, card_for("t4-16gb"))
    assert "it would not fit: " in larger


def test_a_card_that_is_not_described_is_refused_before_anything_runs(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UnsupportedInput, match="names no card"):
        explain_script(script, device="rtx9999")
