"""Whether the step that was seen would fit a GPU that is not here."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.device.described.cards import Card
from tightfit.errors import UnsupportedInput
from tightfit.planning.elsewhere import fit_elsewhere
from tightfit.step.step import Step
from tightfit.units import format_bytes


def on_card(model: torch.nn.Module, batch: Any, step: Step, card: Card) -> str:
    """Say in a sentence whether the step would fit the card, and what it would take there."""
    name = f"{card.title} ({card.name}, described)"
    try:
        found = fit_elsewhere(model, batch, step, card, card.capacity_bytes)
    except UnsupportedInput as problem:
        return f"on {name}: {problem}"
    verdict = {
        "plain": "it would fit as it is",
        "planned": f"it would fit with recomputation (about {found.plan.overhead_ratio:+.0%} time, estimated)",
        "no": "it would not fit",
    }[found.fit]
    return (
        f"on {name} {verdict}: a peak of {format_bytes(found.plan.plain_peak_bytes)} as it is, at least "
        f"{format_bytes(found.smallest_bytes)} with recomputation, of {format_bytes(card.capacity_bytes)}, a context "
        f"included"
    )
