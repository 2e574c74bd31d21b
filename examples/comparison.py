"""What all examples share: train twice, plain and inside a budget, meter every step, compare the bits, print.

The meter knows of no host and no plan. It adds up what PyTorch's allocator reports from the end of one backward to that
of the next: the optimizer's step, forward, backward, and what the script does in between (evaluation, loading data).
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

import tightfit
from tightfit.device.host_meter import HostPeak, host_peak_meter
from tightfit.step.own_steps import is_own_step
from tightfit.units import format_bytes, parse_bytes


def compare(train: Callable[[str | None], torch.nn.Module | Iterable[torch.nn.Module]], budget: str) -> None:
    """Run a script plain and inside a budget, print what each takes, and exit with 1 if a promise was not kept.

    Args:
        train: trains inside the budget that it is given, or plainly if that is None; returns what it has trained.
        budget: where the command line names none.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default=budget)
    budget = parser.parse_args().budget
    logging.getLogger("tightfit").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of the libraries, about each other
    plain, planned = _Run(train, None), _Run(train, budget)
    keeps, same = max(planned.peaks) <= parse_bytes(budget), _is_same(plain.state, planned.state)
    print(f"plain     {plain}")
    print(f"tightfit  {planned} with planning")
    print(f"budget    {budget}, kept in all {len(planned.peaks)} steps that were metered: {_yes(keeps)}")
    print(f"weights   equal to the same script without tightfit, bit for bit: {_yes(same)}")
    if not (keeps and same):
        sys.exit(1)


def beside(budget: str, held_bytes: int) -> tightfit.Budget:
    """Return a budget of which a part is for what a loop holds beside its step."""
    return tightfit.Budget(total_bytes=parse_bytes(budget), beside_step_bytes=held_bytes)


def seed_everything() -> None:
    """Begin from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class _Run:
    """One training: its time, the peak of each step, and all that it leaves behind."""

    def __init__(self, train: Callable[[str | None], Any], budget: str | None) -> None:
        seed_everything()
        meter, begin = _Meter(), time.perf_counter()
        with meter.running():
            trained = train(budget)
        self.seconds = time.perf_counter() - begin - meter.own_seconds
        self.step_ms = 1e3 * statistics.median(meter.step_seconds[1:])
        self.peaks = meter.peaks[1:]  # what was freed in the first, and had come before the meter, was not seen
        models = [trained] if isinstance(trained, torch.nn.Module) else trained
        self.state = [tensor.clone() for model in models for tensor in model.state_dict().values()]
        self.state += [torch.get_rng_state(), torch.tensor([random.random(), np.random.rand()])]

    def __str__(self) -> str:
        peak = format_bytes(max(self.peaks))
        return f"peak {peak}, {self.step_ms:.1f} ms a step (median), {self.seconds:.1f} s in all"


def _is_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


class _Meter:
    """Notes the peak in bytes of each step: from the end of a backward to that of the next one."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.step_seconds: list[float] = []
        self.own_seconds = 0.0
        self._ended = time.perf_counter()
        self._before = _alive()  # a data set, for one; held, or what is made later could have its address
        self._found: HostPeak | None = None
        self._open = ExitStack()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meter what runs inside."""
        backward, depth = torch.autograd.backward, 0
        record_function = torch.autograd.profiler.record_function

        def metered(*args: Any, **keywords: Any) -> None:
            nonlocal depth
            depth += 1
            try:
                backward(*args, **keywords)
            finally:
                depth -= 1
            if not depth and not is_own_step():  # those of planning are
                self._next()

        torch.autograd.backward = metered
        # Optimizers open one around a step, and Lightning calls backward in it, where no profiler may start or end.
        torch.autograd.profiler.record_function = lambda *_, **__: nullcontext()
        try:
            with self._open:
                yield
        finally:
            torch.autograd.backward = backward
            torch.autograd.profiler.record_function = record_function

    def _next(self) -> None:
        begin = time.perf_counter()
        self.step_seconds.append(begin - self._ended)
        self._open.close()
        level = sum(storage.nbytes() for place, storage in _alive().items() if place not in self._before)
        if self._found is not None:
            self.peaks.append(level - self._found.level_bytes + self._found.peak_bytes)
        self._found = self._open.enter_context(host_peak_meter())
        self._ended = time.perf_counter()
        self.own_seconds += self._ended - begin


def _alive() -> dict[int, torch.UntypedStorage]:
    """Return the memory of all tensors, by its address."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [
        tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu" and tensor.layout is torch.strided
    ]
    return {storage.data_ptr(): storage for storage in storages}
