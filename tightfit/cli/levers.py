"""What would make a step fit a GPU that is not here: each lever is the step in another form, measured and planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from tightfit.cli.elsewhere import fitting_of
from tightfit.cli.options import PlanOptions
from tightfit.device.described.cards import Card
from tightfit.device.described.fitting import Fit, Fitting
from tightfit.errors import UnsupportedInput
from tightfit.planning.largest import largest_within
from tightfit.progress import progress
from tightfit.train import resolve
from tightfit.units import format_budget

#: Sharding is tried over 2 to 2**6 GPUs.
_MOST_DOUBLINGS = 6
#: Optimizers with less state than the usual ones.
_LIGHTER = {"adamw": ("adafactor", "sgd"), "adam": ("adafactor", "sgd"), "rmsprop": ("sgd",), "adagrad": ("sgd",)}
_CHANGES = {"nothing": 0, "rounding": 1, "training": 2}


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One thing to do, with what the step then needs."""

    name: str
    """``recompute``, ``budget``, ``microbatch``, ``fsdp``, ``precision``, ``optimizer``, ``batch`` or ``sequence``."""
    flags: str
    """What to write on the command line."""
    changes: str
    """``nothing`` (the same numbers), ``rounding`` (sums in another order) or ``training`` (another computation)."""
    fit: Fit
    """How the step runs within the budget then."""
    peak_bytes: int
    """Of the plan; where nothing fits, of the one with the smallest peak."""
    smallest_bytes: int
    """The smallest budget then."""
    sample_ms: float
    """Estimated time for each sample."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def find_levers(options: PlanOptions, card: Card, now: Fitting) -> tuple[Lever, ...]:
    """Return what would help, best first: what fits, by what it changes and by its time; then what comes nearest.

    Args:
        options: the settings.
        card: the GPU.
        now: how the step fits as the settings say.
    """
    return ranked(_levers(options, card, now))


def ranked(levers: Iterable[Lever]) -> tuple[Lever, ...]:
    """Sort levers: first those with which the step fits, by what they change and then by time, then by memory."""

    def rank(lever: Lever) -> tuple[float, ...]:
        if lever.fit == "no":
            return 1, lever.smallest_bytes, 0
        return 0, _CHANGES[lever.changes], lever.sample_ms

    return tuple(sorted(levers, key=rank))


def _levers(options: PlanOptions, card: Card, now: Fitting) -> Iterator[Lever]:
    samples = options.batch_size

    def lever(name: str, flags: str, changes: str, fitting: Fitting, count: int = samples) -> Lever:
        plan = fitting.plan
        return Lever(
            name=name,
            flags=flags,
            changes=changes,
            fit=fitting.fit,
            peak_bytes=plan.predicted_peak_bytes,
            smallest_bytes=fitting.smallest_bytes,
            sample_ms=plan.predicted_step_ms / count,
        )

    def tried(options: PlanOptions, shards: int) -> Fitting | None:
        progress("trying what else would fit")
        with suppress(UnsupportedInput):  # what cannot be done so is no lever
            return fitting_of(options, card, shards)
        return None

    if now.fit == "planned":
        yield lever("recompute", "--grad-checkpoint auto", "nothing", now)
    if now.fit == "no":
        yield lever(
            "budget",
            f"--memory {format_budget(now.smallest_bytes).replace(' ', '')}",
            "nothing",
            replace(now, budget_bytes=now.smallest_bytes),
        )
    yield from _splitting(options, card, now, lever)
    yield from _sharding(options, lever, tried)
    variants: list[tuple[str, str, PlanOptions]] = []
    if options.precision == "fp32":
        variants.append(("precision", "--precision bf16", replace(options, precision="bf16")))
    for name in _LIGHTER.get(options.optimizer, ()):
        variants.append(("optimizer", f"--optimizer {name}", replace(options, optimizer=name)))  # type: ignore[arg-type]  # one of the names
    for name, flags, changed in variants:
        if (fitting := tried(changed, options.fsdp)) is not None:
            yield lever(name, flags, "training", fitting)
    length = resolve(options)[0].sequence_length
    if length is not None and length > 1:
        half = length // 2
        if (fitting := tried(replace(options, sequence_length=half), options.fsdp)) is not None:
            yield lever("sequence", f"--sequence-length {half}", "training", fitting)


def _splitting(options: PlanOptions, card: Card, now: Fitting, lever: Any) -> Iterator[Lever]:
    """Yield the largest microbatch that fits, and the batch of as many samples: found as `grow` does."""
    at_a_time = options.samples_at_a_time(options.fsdp)
    if now.fit == "plain" or at_a_time == 1:
        return
    known: dict[int, Fitting] = {}

    def needed_bytes(number: int) -> int:
        found = fitting_of(replace(options, microbatch_size=number, accumulation_steps=None), card, options.fsdp)
        known[number] = found
        return found.smallest_bytes if now.fit == "no" else found.plan.plain_peak_bytes

    number = largest_within(needed_bytes, now.budget_bytes, most=at_a_time - 1) or 1
    yield lever("microbatch", f"--microbatch-size {number}", "rounding", known[number])
    batch = number * options.fsdp
    smaller = replace(options, batch_size=batch, microbatch_size=None, accumulation_steps=None)
    yield lever("batch", f"--batch-size {batch}", "training", fitting_of(smaller, card, options.fsdp), batch)


def _sharding(options: PlanOptions, lever: Any, tried: Any) -> Iterator[Lever]:
    """Yield sharding over the fewest GPUs, of powers of two, over which the step fits; else over the most."""
    samples = options.batch_size
    low, high = options.fsdp.bit_length() - 1, _MOST_DOUBLINGS + 1
    known: dict[int, Lever] = {}
    while high - low > 1:
        middle = (low + high) // 2
        shards = 1 << middle
        wider = replace(options, batch_size=max(samples, shards))
        fitting = tried(wider, shards)
        if fitting is None:
            return
        flags = f"--fsdp {shards}" + (f" --batch-size {wider.batch_size}" if wider.batch_size > samples else "")
        known[middle] = lever("fsdp", flags, "rounding", fitting, wider.batch_size)
        low, high = (low, middle) if fitting.fit != "no" else (middle, high)
    if known:
        yield known.get(high) or known[max(known)]
