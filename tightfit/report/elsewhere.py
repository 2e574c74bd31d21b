"""What is said about a step on a GPU that is not here, as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tightfit.device.described.cards import Card
from tightfit.device.described.fitting import Fitting
from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.report.plan_table import format_plan, format_table, plan_figures
from tightfit.units import format_budget, format_bytes

_HOW_SURE = (
    "memory is that of the step's own tensors in the model of PyTorch's allocator (`benchmarks/gpu_points` holds it "
    "against measurements); times are estimates from the card's peak rates, good for ratios"
)


def fitting_figures(found: Fitting) -> dict[str, Any]:
    """Return the figures as plain data."""
    plan = found.plan
    return {
        **plan_figures(plan),
        "card": found.card.name,
        "fits": found.fit,
        "budget_bytes": found.budget_bytes,
        "predicted_allocated_bytes": plan.predicted_allocated_bytes,
        "predicted_reserved_bytes": plan.predicted_reserved_bytes,
        "smallest_budget_bytes": found.smallest_bytes,
        "smallest_budget_where": found.smallest_where,
        "cards": dict(found.cards()),
        "assumed": found.card.assumptions(),
        "times_are_estimates": True,
    }


def format_fitting(found: Fitting) -> str:
    """Format the answer: whether it fits, what makes it up, and what else would do."""
    plan, card = found.plan, found.card
    verdict = {
        "plain": "it fits as it is",
        "planned": f"it fits with recomputation: about {plan.overhead_ratio:+.0%} time (estimated)",
        "no": f"it does not fit: the smallest budget is {format_budget(found.smallest_bytes)}",
    }[found.fit]
    parts = format_parts(parts_of_peak(plan.breakdown, plan.peak_where))
    lines = [
        f"model   {plan.model}, batch {plan.batch}, {plan.optimizer or 'no optimizer'}, on {card.title} ({card.name}, "
        f"described)",
        f"answer  {verdict}",
        *([format_plan(plan)] if found.fit != "no" else []),
        f"peak    {format_bytes(plan.predicted_allocated_bytes)} allocated, "
        f"{format_bytes(plan.predicted_reserved_bytes)} reserved, {format_bytes(plan.predicted_peak_bytes)} with the "
        f"context, of {format_bytes(found.budget_bytes)}",
        f"        at {plan.peak_where}: {parts}",
        f"least   {format_budget(found.smallest_bytes)} is the smallest budget, set by {found.smallest_where}",
    ]
    if table := format_table(plan, most=12):
        lines.append(table)
    others = found.cards()
    for fit, what in (("plain", "as it is on"), ("planned", "with recomputation on")):
        names = [name for name, one in others.items() if one == fit]
        if names:
            lines.append(f"cards   {what} {', '.join(names)}")
    lines.append(f"sure    {_HOW_SURE}")
    if unproven := found.profile.unproven:
        lines.append(f"        no step has shown that {', '.join(unproven)} can be run again: more may be needed")
    lines += [f"assumed {text}" for text in card.assumptions()]
    return "\n".join(lines)


def cards_figures(cards: Iterable[Card]) -> list[Mapping[str, Any]]:
    """Return the cards as plain data."""
    return [
        {
            "name": card.name,
            "title": card.title,
            "compute_capability": card.compute_capability,
            **{
                name: {"value": figure.value, "source": figure.source, "assumed": figure.assumed}
                for name, figure in card.figures.items()
            },
        }
        for card in cards
    ]


def format_cards(cards: Iterable[Card]) -> str:
    """Format the cards, a line each; what is assumed has a ~."""
    columns = ("capacity_bytes", "bandwidth_gb_s", "fp32_tflops", "half_tflops")
    lines = [f"{'name':<16} {'memory':>11} {'GB/s':>7} {'fp32':>8} {'half':>8}  card (TFLOPS; ~ assumed)"]
    for card in cards:
        shown = []
        for name in columns:
            value = card[name]
            text = format_bytes(int(value)) if name == "capacity_bytes" else f"{value:g}"
            shown.append(("~" if card.figures[name].assumed else "") + text)
        memory, bandwidth, single, half = shown
        lines.append(f"{card.name:<16} {memory:>11} {bandwidth:>7} {single:>8} {half:>8}  {card.title}")
    return "\n".join(lines)
