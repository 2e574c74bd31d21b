"""One row: a subject plain, with every block checkpointed, and planned at two budgets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import tightfit
from benchmarks.zoo.checkpointed import checkpoint_blocks, choices_of_blocks
from benchmarks.zoo.families import build
from benchmarks.zoo.subject import Subject
from tightfit.device import memory as meter

#: Steps that are timed, after those that are compared and metered.
_TIMED = 2


@dataclass(kw_only=True)
class Planned:
    """What a budget came to."""

    budget_bytes: int = 0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    step_ms: float = 0.0
    planning_s: float = 0.0
    """Of `fit`, on the wall."""
    planning_cpu_s: float = 0.0
    unequal: list[str] = field(default_factory=list)
    """What differs from the plain step, of what two plain steps agree on."""


@dataclass(kw_only=True)
class Row:
    """What was found of a subject."""

    family: str
    name: str
    commit: str = ""
    outcome: str = "crash"
    """ok, refused (the plain step itself cannot be run, for `reason`), crash, timeout or memory."""
    reason: str = ""
    parameters: int = 0
    resident_bytes: int = 0
    plain_bytes: int = 0
    plain_ms: float = 0.0
    unstable: list[str] = field(default_factory=list)
    """What two plain steps from one state do not agree on."""
    checkpoint_bytes: int | None = None
    """The smallest peak among the ways to divide the model into blocks; None where none runs."""
    checkpoint_right: bool | None = None
    """Its gradients are the plain step's."""
    checkpoint_ms: float = 0.0
    checkpoint_reason: str = ""
    measuring_s: float = 0.0
    """Of `measure`, on the wall, with nothing cached; once for both budgets, except where there are several kinds."""
    measuring_cpu_s: float = 0.0
    half: Planned | None = None
    """Half way between the smallest budget and the plain peak."""
    smallest: Planned | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Row:
        row = cls(**found)
        row.half, row.smallest = (Planned(**one) if one else None for one in (found["half"], found["smallest"]))
        return row

    @property
    def ratio(self) -> float | None:
        """The smallest budget over checkpoint's peak, where checkpoint is right."""
        if self.smallest is None or not self.checkpoint_right or not self.checkpoint_bytes:
            return None
        return self.smallest.budget_bytes / self.checkpoint_bytes

    @property
    def over_budget(self) -> bool:
        return any(one.measured_bytes > one.budget_bytes for one in self._planned())

    @property
    def unequal(self) -> list[str]:
        return [name for one in self._planned() for name in one.unequal]

    def _planned(self) -> list[Planned]:
        return [one for one in (self.half, self.smallest) if one is not None]


def measure_row(row: Row, tell: Callable[[Row], None]) -> None:
    """Fill a row in.  `tell` is called whenever something has been found, so that a limit does not lose it."""
    with torch.random.fork_rng():
        try:
            plain = _plain(row)
        except Exception as error:
            row.outcome, row.reason = "refused", _in_a_line(error)
            tell(row)
            return
        tell(row)
        _checkpointed(row, plain)
        tell(row)
        _plan(row, plain, tell)
    row.outcome = "ok"
    tell(row)


@dataclass
class _Ran:
    """Some steps of a subject."""

    results: dict[str, torch.Tensor]
    peak_bytes: int
    step_ms: float
    resident_bytes: int


def make(row: Row) -> Subject:
    """Make a row's subject, the same each time."""
    torch.manual_seed(0)
    subject = build(row.family, row.name)
    subject.start()
    return subject


def _run(subject: Subject, applied: tightfit.Applied | None = None) -> _Ran:
    """Take two steps, of which all results are compared and the second is metered; then some that are timed."""
    torch.manual_seed(1)
    results: dict[str, torch.Tensor] = {}
    for kind, loss in subject.run(applied):
        _keep(subject, f"1: {kind}", loss, results)
    resident = meter.resident_bytes(subject.module, subject.batch, subject.optimizers, subject.beside())
    peak = 0
    steps = subject.run(applied)
    while True:  # each kind of step on its own: what is kept of the one before is not in its peak
        found, bytes_held = meter.measure_peak(lambda: next(steps, None), resident)
        if found is None:
            break
        peak = max(peak, bytes_held)
        _keep(subject, f"2: {found[0]}", found[1], results)
    times = []
    for _ in range(_TIMED):
        begin = time.process_time()
        for _ in subject.run(applied):
            pass
        times.append((time.process_time() - begin) * 1e3)
    return _Ran(results, peak, statistics.median(times), resident)


def _keep(subject: Subject, prefix: str, loss: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    module = subject.module
    results[f"{prefix} loss"] = loss.clone()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[f"{prefix} gradient {name}"] = parameter.grad.clone()
    for name, buffer in module.named_buffers():
        results[f"{prefix} buffer {name}"] = buffer.clone()


def _differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], but: Collection[str] = ()) -> list[str]:
    leave = set(but)
    return [
        name
        for name, tensor in one.items()
        if name not in leave and not (name in other and torch.equal(_bits(tensor), _bits(other[name])))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits, so that NaN equals itself."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense.contiguous().reshape(-1).view(torch.uint8)


def _plain(row: Row) -> _Ran:
    subject = make(row)
    row.parameters = sum(p.numel() for p in subject.module.parameters())
    ran = _run(subject)
    row.plain_bytes, row.plain_ms, row.resident_bytes = ran.peak_bytes, ran.step_ms, ran.resident_bytes
    row.unstable = _differing(ran.results, _run(make(row)).results)
    return ran


def _checkpointed(row: Row, plain: _Ran) -> None:
    """Fill in the best way to checkpoint every block: one that is right, and then the smallest peak."""
    for place in range(len(choices_of_blocks(make(row).module))):
        subject = make(row)
        checkpoint_blocks(choices_of_blocks(subject.module)[place])
        try:
            ran = _run(subject)
        except Exception as error:
            row.checkpoint_reason = row.checkpoint_reason or _in_a_line(error)
            continue
        differing = _differing(plain.results, ran.results, row.unstable)
        # Of the first step: BatchNorm's statistics, which checkpointing moves twice, are in no gradient of training.
        right = not any("buffer" not in name for name in differing if name.startswith("1: "))
        best = row.checkpoint_bytes
        if best is None or (right, -ran.peak_bytes) > (bool(row.checkpoint_right), -best):
            row.checkpoint_bytes, row.checkpoint_right, row.checkpoint_ms = ran.peak_bytes, right, ran.step_ms


def _plan(row: Row, plain: _Ran, tell: Callable[[Row], None]) -> None:
    subject = make(row)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    profile = subject.measure()
    row.measuring_s, row.measuring_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    tell(row)
    smallest_bytes = _smallest(subject, profile)
    half_bytes = (smallest_bytes + max(row.plain_bytes, smallest_bytes)) // 2
    row.half = _at(row, plain, half_bytes, profile)
    tell(row)
    row.smallest = _at(row, plain, smallest_bytes, profile)


def _smallest(subject: Subject, profile: tightfit.Profile | None) -> int:
    """Return the smallest budget, as planning names it."""
    try:
        subject.fit(1, profile)
    except tightfit.BudgetInfeasible as error:
        return error.required_bytes
    raise AssertionError("a budget of one byte was accepted")


def _at(row: Row, plain: _Ran, budget_bytes: int, profile: tightfit.Profile | None) -> Planned:
    subject = make(row)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    applied = subject.fit(budget_bytes, profile)
    found = Planned(budget_bytes=budget_bytes, predicted_bytes=_predicted(applied))
    found.planning_s, found.planning_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    ran = _run(subject, applied)
    found.measured_bytes, found.step_ms = ran.peak_bytes, ran.step_ms
    found.unequal = _differing(plain.results, ran.results, row.unstable)
    applied.remove()
    return found


def _predicted(applied: tightfit.Applied) -> int:
    assert applied.verdict is not None
    return applied.verdict.predicted_peak_bytes


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
