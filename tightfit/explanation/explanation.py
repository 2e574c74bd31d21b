"""`Explanation`: what was found about a step, as an object, as text and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.explanation.breakdown import Breakdown
from tightfit.explanation.text import format_breakdown, format_ways, wrapped
from tightfit.explanation.ways import Way


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a script's real step held."""

    breakdown: Breakdown
    """At the peak; where memory ran out, at that moment."""
    steps: int
    """Steps that were complete."""
    ran_out: str = ""
    """What asked for memory that there was not, and for how much; empty if the step was complete."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a training step needs the memory it needs, and what would help.

        print(tightfit.explain(model, batch, loss=loss_fn, optimizer=optimizer))

    Attributes:
        model: the model's class name.
        batch: the batch's shapes and dtypes, as text.
        device: whose memory is meant.
        step: who holds what at the peak of one plain step, as predicted; None where it cannot be planned.
        seen: the same of a script's real step; None of a model that no script was seen to train.
        knobs: which of PyTorch's own means the step uses already.
        ways: what would help, best first.
        notes: what else there is to know.
    """

    model: str
    batch: str
    device: str
    step: Breakdown | None
    seen: Seen | None = None
    step_ms: float = 0.0
    """Predicted time of the plain step."""
    target_bytes: int | None = None
    """The memory that there is for a step, by which the ways are ranked; None if nobody said."""
    knobs: Mapping[str, str]
    ways: tuple[Way, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def breakdown(self) -> Breakdown:
        """Who held what: seen where a real step was, else predicted."""
        found = self.seen.breakdown if self.seen is not None else self.step
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        seen = self.seen
        return {
            "model": self.model,
            "batch": self.batch,
            "device": self.device,
            "seen": None
            if seen is None
            else {
                **seen.breakdown.to_json(),
                "steps": seen.steps,
                "ran_out": seen.ran_out,
            },
            "step": None if self.step is None else self.step.to_json(),
            "step_ms": self.step_ms,
            "target_bytes": self.target_bytes,
            "knobs": dict(self.knobs),
            "ways": [way.to_json() for way in self.ways],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"model   {self.model}, batch {self.batch}, on {self.device}"]
        if self.seen is not None:
            lines += self._seen_lines(self.seen)
        if self.step is not None and (self.seen is None or self.seen.ran_out):
            what = "one step" if self.seen is None else "the whole step, planned without running it"
            lines += ["", *format_breakdown(self.step, what)]
        lines += ["", *wrapped("uses    ", "; ".join(f"{name} {text}" for name, text in self.knobs.items()))]
        lines += [line for note in self.notes for line in wrapped("note    ", note)]
        return "\n".join([*lines, "", *format_ways(self.ways, self.target_bytes)])

    @staticmethod
    def _seen_lines(seen: Seen) -> list[str]:
        if seen.ran_out:
            lines = wrapped("failed  ", f"out of memory: {seen.ran_out}")
            return [*lines, "", *format_breakdown(seen.breakdown, "when memory ran out")]
        steps = f"{seen.steps} {'step' if seen.steps == 1 else 'steps'} seen"
        return ["", *format_breakdown(seen.breakdown, steps if seen.steps else "no optimizer has stepped")]
