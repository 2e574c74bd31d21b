"""One process for one method on one model: what it holds, whether it is right, and its time whenever it is asked."""

from __future__ import annotations

import os
import re
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.methods import Method


@dataclass
class Setup:
    """What the run knows of a method before its steps are timed."""

    method: Method
    failure: str = ""
    """Why it cannot run; "" if it can."""
    peak_bytes: int = 0
    baseline_bytes: int = 0
    equal: bool = False
    """Loss and gradients are bit for bit those of the plain step."""
    buffers_equal: bool = False
    """So are the buffers: running statistics."""
    relative_difference: float = 0.0
    """Largest difference of a loss or gradient, relative to that tensor's largest magnitude."""
    recompute_ms: float | None = None
    """See `operations.recompute_ms`; None where operations cannot be counted."""
    predicted_peak_bytes: int = 0
    predicted_overhead: float | None = None
    """tightfit's own predictions."""
    bound_overhead: float | None = None
    """tightfit's lower bound, as an overhead."""
    traceback: str = ""


@dataclass(frozen=True)
class Job:
    """What a worker is asked for."""

    family: str
    method: Method
    plain_file: Path
    """Where the plain step's results are, for the others to compare with."""
    table_file: Path
    """Where its operations and their times are."""


def serve(job: Job, connection: Connection) -> None:
    """Set up, send the `Setup`, then answer each number n with the times of n steps in ms, until "quit"."""
    import torch

    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        step, setup = _prepare(job)
    except BaseException as error:
        connection.send(Setup(job.method, failure=in_a_line(error), traceback=traceback.format_exc()))
        return
    connection.send(setup)
    while (asked := connection.recv()) != "quit":
        times_ms = []
        for _ in range(asked):
            begin = time.perf_counter()
            step()
            times_ms.append((time.perf_counter() - begin) * 1e3)
        connection.send(times_ms)


def in_a_line(error: BaseException) -> str:
    """An error for the report: short, and without the folders of this machine."""
    text = re.sub(r"(?<!\w)/\S*/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _prepare(job: Job) -> tuple[Any, Setup]:
    import torch

    from benchmarks.side_by_side.families import build
    from benchmarks.side_by_side.methods import INSTALL
    from benchmarks.side_by_side.operations import count, recompute_ms
    from tightfit.device import memory as meter
    from tightfit.step.model import give_gradients
    from tightfit.step.step import Step

    family = build(job.family)
    method = job.method
    model = family.model
    setup = Setup(method)
    spec = Step(loss=family.loss)

    def run() -> Any:
        return spec.run_loss(model, family.batch)

    if method.name == "tightfit":
        run = _fit(family, method, setup)
    else:
        INSTALL[method.name](family, method.value)

    def step() -> Any:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss = run()
        loss.backward()
        return loss.detach()

    give_gradients(model)
    torch.manual_seed(1)
    loss = step()
    found = {"loss": loss} | {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    found = {name: tensor.clone() for name, tensor in found.items()}
    if method.name == "plain":
        torch.save(found, job.plain_file)
    _compare(found, torch.load(job.plain_file), setup)
    setup.baseline_bytes = meter.resident_bytes(model, family.batch)
    step()
    _, setup.peak_bytes = meter.measure_peak(step, setup.baseline_bytes)
    if method.backend == "eager":
        counts, times_ms = count(step)
        if method.name == "plain":
            torch.save((counts, times_ms), job.table_file)
        setup.recompute_ms = recompute_ms(counts, times_ms, *torch.load(job.table_file, weights_only=False))
    return step, setup


def _compare(found: dict[str, Any], plain: dict[str, Any], setup: Setup) -> None:
    setup.equal = setup.buffers_equal = True
    for name, tensor in plain.items():
        other = found[name]
        equal = bool((tensor == other).all())
        if name.startswith("buffer"):
            setup.buffers_equal &= equal
            continue
        setup.equal &= equal
        scale = max(float(tensor.abs().max()), 1e-12)
        setup.relative_difference = max(setup.relative_difference, float((tensor - other).abs().max()) / scale)


def _fit(family: Any, method: Method, setup: Setup) -> Any:
    """tightfit at a budget in bytes (0: the smallest it has a plan for)."""
    import tightfit

    budget = method.value
    if not budget:
        try:
            tightfit.fit(family.model, family.batch, budget=1, loss=family.loss)
        except tightfit.BudgetInfeasible as error:
            budget = error.required_bytes
    applied = tightfit.fit(family.model, family.batch, budget=budget, loss=family.loss)
    plan = applied.plan
    setup.predicted_peak_bytes = plan.predicted_peak_bytes
    setup.predicted_overhead = plan.overhead_ratio
    setup.bound_overhead = plan.lower_bound_ms / plan.plain_step_ms - 1
    return lambda: applied.loss(family.model, family.batch)
