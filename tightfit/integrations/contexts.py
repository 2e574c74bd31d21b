"""What every host needs around a step: room for the batches that it holds, its random numbers, its autocast, a log."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.installation.applied import Applied
from tightfit.step.batch import batch_tensors
from tightfit.units import format_bytes

_log = logging.getLogger("tightfit")


def budget_beside(
    budget: int | str | Budget,
    module: torch.nn.Module,
    batch: Any,
    *,
    others: int,
    held: Iterable[torch.nn.Module] = (),
) -> Budget:
    """Return the budget with room for what the host holds on the device while a step runs.

    That are other batches (loaders fetch one ahead: on a CPU that is in the same memory), and modules such as moving
    averages, `held`.
    """
    device = next(module.parameters()).device
    batches = others + device_for(device).is_host
    beside = {id(one): one for each in held for one in (*each.parameters(), *each.buffers()) if one.device == device}
    beside_bytes = sum(tensor.nbytes for tensor in beside.values())
    batch_bytes = sum(tensor.nbytes for tensor in batch_tensors(batch))
    return Budget.of(budget, device).reserving(batches * batch_bytes + beside_bytes)


def modules_held(things: Iterable[Any], model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules among things, and in their lists and dictionaries, that are no part of the model, nor hold it.

    Of one that holds the model (a wrapper, or a loss that calls it), its other parts.
    """
    parts = {id(part) for part in model.modules()}
    pending = list(things)
    found: list[torch.nn.Module] = []
    for thing in pending:  # which grows
        if isinstance(thing, dict):
            pending += [each for each in thing.values() if isinstance(each, torch.nn.Module)]
        elif isinstance(thing, list | tuple):
            pending += [each for each in thing if isinstance(each, torch.nn.Module)]
        elif isinstance(thing, torch.nn.Module) and id(thing) not in parts:
            if any(part is model for part in thing.modules()):
                pending += thing.children()
            else:
                found.append(thing)
    return list(dict.fromkeys(found))


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put the generators of Python, NumPy and PyTorch back afterwards where they are now."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def closed_autocast(module: torch.nn.Module) -> Iterator[None]:
    """Close the autocast that a host has opened around the step, if it has: a step that is planned opens its own."""
    device = device_for(module)
    if device.ambient_autocast() is None:
        yield
        return
    with device.autocast(None):
        yield


@contextmanager
def forgetting_casts() -> Iterator[None]:
    """Forget the weights that autocast has cast inside, as its end does where it is the outermost one."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def log_plan(applied: Applied) -> None:
    """Log what a step takes under its plan."""
    plan = applied.plan
    _log.info(
        "a step takes %s of %s at its peak (plain: %s), and about %+.0f %% of its time",
        format_bytes(plan.predicted_peak_bytes),
        format_bytes(plan.budget_bytes),
        format_bytes(plan.plain_peak_bytes),
        100 * plan.overhead_ratio,
    )
