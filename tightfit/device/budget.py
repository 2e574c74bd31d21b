"""`Budget`: the memory that a process may hold, read from what people write: ``8GiB``, ``75%``, ``auto``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tightfit.device.registry import device_for
from tightfit.errors import BudgetInfeasible, RanOutOfMemory, UnsupportedInput
from tightfit.units import format_bytes, parse_bytes

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_BESIDE_CONTEXT = re.compile(r"(.+)\+\s*context\s*", re.IGNORECASE)
_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most memory of a device, in bytes, that a process may hold at any moment of a training step.

    A part of it may be reserved for what is held beside the step, such as a moving average of the weights: plans are
    made for the rest, and errors and reports speak of the total.

        budget = tightfit.Budget(total_bytes=8 * 2**30, beside_step_bytes=2**28)
        applied = tightfit.fit(model, batch, budget=budget)

    Attributes:
        total_bytes: all that the process may hold.
        beside_step_bytes: reserved for what the process holds beside the step, and neither the model, the optimizer nor
            the batch is.
        text: the budget as it was given; empty where that was in bytes.
    """

    total_bytes: int
    beside_step_bytes: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.beside_step_bytes < self.total_bytes:
            raise UnsupportedInput(
                f"the budget is {format_bytes(self.total_bytes)}, and {format_bytes(self.beside_step_bytes)} of it are "
                f"reserved beside the step, so nothing is left for the step. Give a larger budget."
            )

    @classmethod
    def of(cls, budget: int | str | Budget, device: torch.device, *, name: str = "the budget") -> Budget:
        """Read a budget.

        Args:
            budget: a size, a size ``+context`` (and what this process holds of the device outside PyTorch), a share of
                all the device's memory, ``auto`` (what is free there now, and what this process holds there already),
                or a `Budget`.
            device: whose memory.
            name: what messages call it, for example a flag.

        Raises:
            UnsupportedInput: not a size, or more than the device has.
        """
        if isinstance(budget, Budget):
            _require_there(budget.total_bytes, budget.text or budget.total_bytes, device, name)
            return budget
        text = budget if isinstance(budget, str) else ""
        if text.strip().lower() == _AUTO:
            return cls(total_bytes=_available_bytes(device), text=_AUTO)
        size_bytes = _parsed(budget, device)
        if size_bytes <= 0:
            raise UnsupportedInput(
                f"{name} {budget!r} is not a memory size. Write it like 8GiB, 8GB or 512MiB, like 8GiB+context "
                f"for that much beside the device's context, as a share of its memory like 75%, or auto."
            )
        _require_there(size_bytes, budget, device, name)
        return cls(total_bytes=size_bytes, text=text)

    @property
    def step_bytes(self) -> int:
        """What the step itself may hold: parameters, gradients, optimizer state, batch and all that it computes."""
        return self.total_bytes - self.beside_step_bytes

    @property
    def is_auto(self) -> bool:
        """Whether it is what the device had free."""
        return self.text == _AUTO

    @property
    def origin(self) -> str:
        """What its bytes come from, where it was not given as bytes; else empty."""
        if self.is_auto:
            return "all that is free"
        return self.text.strip() if "%" in self.text or "+" in self.text else ""

    def reserving(self, nbytes: int) -> Budget:
        """Return the same budget with `nbytes` more reserved beside the step."""
        return replace(self, beside_step_bytes=self.beside_step_bytes + nbytes)

    def at_most(self, nbytes: int) -> Budget:
        """Return the same budget, or one of `nbytes` in total where that is less."""
        return replace(self, total_bytes=min(self.total_bytes, nbytes))

    @contextmanager
    def in_totals(self) -> Iterator[None]:
        """Inside, an error about the step's bytes becomes one about the total."""
        beside_bytes = self.beside_step_bytes
        try:
            yield
        except RanOutOfMemory as problem:
            raise RanOutOfMemory(
                problem.budget_bytes + beside_bytes,
                problem.predicted_bytes + beside_bytes,
                problem.smaller_budget_bytes + beside_bytes,
                problem.reason,
            ) from problem.__cause__
        except BudgetInfeasible as problem:
            if not self.beside_step_bytes:
                raise
            required_bytes, budget_bytes = (
                nbytes + self.beside_step_bytes for nbytes in (problem.required_bytes, problem.budget_bytes)
            )
            raise BudgetInfeasible(
                required_bytes,
                budget_bytes,
                problem.where,
                problem.breakdown,
                switched_off=problem.switched_off,
                unproven=problem.unproven,
            ) from None


def _available_bytes(device: torch.device) -> int:
    """Return what is free on the device, and what this process holds there of what a budget counts."""
    where = device_for(device)
    return min(where.free_bytes() + where.held_bytes(), where.capacity_bytes())


def _parsed(budget: int | str, device: torch.device) -> int:
    """Bytes; 0 for what is no size."""
    text = budget if isinstance(budget, str) else ""
    percent, beside_context = _PERCENT.fullmatch(text), _BESIDE_CONTEXT.fullmatch(text)
    try:
        if percent:
            return int(device_for(device).capacity_bytes() * float(percent[1]) / 100)
        if beside_context:
            return parse_bytes(beside_context[1]) + device_for(device).context_bytes()
        return parse_bytes(budget)
    except ValueError:
        return 0


def _require_there(size_bytes: int, shown: int | str, device: torch.device, name: str) -> None:
    """Raise `UnsupportedInput` if the device has less memory."""
    total_bytes = device_for(device).capacity_bytes()
    if size_bytes > total_bytes:
        raise UnsupportedInput(
            f"{name} {shown} is {format_bytes(size_bytes)}, but the device {device} has only "
            f"{format_bytes(total_bytes)}. Give at most that, e.g. 90%, or auto for what is free."
        )
