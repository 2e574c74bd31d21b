"""Predicted against measured peak memory, for every model of the suite, plain and at five budgets each.

    python benchmarks/memory_model.py [MODEL ...] [--size tiny] [--output FILE.md]

Each model runs in a process of its own: a crash is a row.  Peaks are of one step (forward, backward, optimizer) in
which gradients and optimizer state are resident; "measured" is the independent meter of `tightfit.device.memory`, the
worst of three steps.  Budgets lie evenly between the smallest one that `solve` has a plan for and the plain peak.

* *predicted*: what the profile alone says, before any real step of the plan.
* *repaired*: the prediction of the plan that `fit` installs, after its trial runs.
* *bits*: loss and gradients of three optimizer steps, then parameters, buffers and random state, against a plain run;
  "not reproducible" names what differs between two plain runs.
* *MemTracker*: `torch.distributed._tools.mem_tracker`, in FakeTensorMode on a copy: PyTorch's own prediction of the
  plain step.

The operations' costs are measured in an empty cache ("cold"), then again ("cached").
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

STEPS = 3
BUDGETS = 5
TIMEOUT_S = 900


@dataclass
class Cell:
    """One plan of one model, or the plain step with one optimizer."""

    what: str
    budget: int = 0
    predicted: int = 0
    measured: int = 0
    """By the plan of the unrepaired profile."""
    repaired: int = 0
    """Predicted for the plan that was installed in the end."""
    measured_repaired: int = 0
    differences: list[str] = field(default_factory=list)
    replayed: int = 0
    solve_s: float = 0.0
    guard_s: float = 0.0

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def repaired_error(self) -> float:
        return self.repaired / self.measured_repaired - 1


@dataclass
class Row:
    """One model."""

    name: str
    failure: str = ""
    method: str = ""
    ops: int = 0
    regions: int = 0
    cold: dict[str, float] = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)
    not_reproducible: list[str] = field(default_factory=list)
    mem_tracker: int = 0
    mem_tracker_failure: str = ""
    cells: list[Cell] = field(default_factory=list)
    optimizers: list[Cell] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """By the optimizer's form, why PyTorch refuses it for this model."""


# ------------------------------------------------------------------------------------------------------ one model


def mem_tracker_peak(name: str, size: Any) -> int:
    """What PyTorch's MemTracker predicts for the plain step."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from tests.suite import build
    from tightfit.profiling.structural_copy import copy_batch, copy_model, copy_optimizer
    from tightfit.step.model import give_gradients
    from tightfit.step.step import Step

    case = build(name, size)
    optimizers = case.optimizers()
    mode = FakeTensorMode()
    model, fakes = copy_model(case.model, mode)
    batch = copy_batch(case.batch, mode)
    copies = tuple(copy_optimizer(optimizer, fakes) for optimizer in optimizers)
    spec = Step(loss=case.loss, optimizer=copies)
    with mode:
        give_gradients(model)
        for optimizer in copies:
            for group in optimizer.param_groups:
                group["capturable"] = False
            optimizer.step()
        tracker = MemTracker()
        tensors = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]
        tracker.track_external(model, *copies, *tensors)
        with tracker as tracked:
            spec.run(model, batch)
        peaks = tracked.get_tracker_snapshot("peak")
    return max(int(found["Total"]) for found in peaks.values())


def run_cell(name: str, size: Any, profile: Any, solver: Any, budget: int, plain: Any) -> Cell:
    import tightfit
    from tests.suite import build
    from tests.suite.running import train
    from tightfit.errors import BudgetInfeasible
    from tightfit.planning.search import search
    from tightfit.step.step import Step
    from tightfit.verification.trial import Trial

    def run(applied: Any, case: Any) -> Any:
        found = train(case, STEPS, loss=lambda: applied.loss(case.model, case.batch))
        return found, plain.differences(found)

    cell = Cell(what="", budget=budget)
    begin = time.perf_counter()
    plan = solver.solve(budget)
    cell.solve_s = time.perf_counter() - begin
    cell.predicted = plan.predicted_peak_bytes
    case = build(name, size)
    spec = Step(loss=case.loss)
    with tightfit.apply(case.model, plan, step=spec) as applied:
        train(case, 1, loss=lambda: applied.loss(case.model, case.batch), metered=False)  # the self-check
        refused = bool(applied.refused)
        case.model.load_state_dict(build(name, size).model.state_dict())
        applied.statistics.reset()
        found, differences = run(applied, case)
        mismatches = applied.statistics.mismatches + applied.statistics.unplanned_calls
        cell.measured = found.peak_bytes
        cell.replayed = applied.statistics.replayed_ops // STEPS
    cell.repaired, cell.measured_repaired, cell.differences = cell.predicted, cell.measured, differences
    if cell.measured <= budget and not mismatches and not refused:
        return cell

    # What `fit` does from here on, with the profile that is at hand.
    def searched(case: Any, budget_bytes: int) -> Any:
        step = Step(loss=case.loss, optimizer=case.optimizers())
        with Trial(case.model, case.batch, step) as trial:
            return search(trial, budget_bytes, profile=profile)[0]

    begin = time.perf_counter()
    case = build(name, size)
    try:
        applied = searched(case, budget)
    except BudgetInfeasible as error:
        cell.budget = budget = error.required_bytes
        case = build(name, size)
        applied = searched(case, budget)
    cell.guard_s = time.perf_counter() - begin
    with applied:
        found, cell.differences = run(applied, case)
        cell.repaired, cell.measured_repaired = applied.plan.predicted_peak_bytes, found.peak_bytes
    return cell


def one_model(name: str, size: Any) -> Row:
    from tests.suite import OPTIMIZER_KINDS, build
    from tests.suite.running import settle, train
    from tightfit.profiling.measure import measure_step
    from tightfit.solver.solver import Solver
    from tightfit.step.step import Step

    def measured(kind: Any = "adamw-foreach") -> Any:
        case = build(name, size)
        return measure_step(case.model, case.batch, Step(loss=case.loss, optimizer=case.optimizers(kind)))

    def wall(profile: Any, seconds: float) -> dict[str, float]:
        return {part: ms / 1e3 for part, ms in profile.measuring_ms.items()} | {"total": seconds}

    row = Row(name)
    begin = time.perf_counter()
    profile = measured()
    row.cold = wall(profile, time.perf_counter() - begin)
    begin = time.perf_counter()
    profile = measured()
    row.cached = wall(profile, time.perf_counter() - begin)
    row.method, row.ops, row.regions = profile.method, len(profile.ops), len(profile.regions)
    solver = Solver(profile)
    plain = train(build(name, size), STEPS)
    row.not_reproducible = plain.differences(train(build(name, size), STEPS, metered=False))
    for tensor in row.not_reproducible:
        plain.tensors.pop(tensor, None)
    predicted = solver.plain(2**62).predicted_peak_bytes - profile.margin_bytes
    peak = plain.peak_bytes
    row.cells.append(Cell("plain", peak, predicted, peak, predicted, peak))
    begin = time.perf_counter()
    smallest, _ = solver.minimum_budget()
    smallest_s = time.perf_counter() - begin
    top = solver.plain(2**62).predicted_peak_bytes
    for number in range(BUDGETS):
        cell = run_cell(name, size, profile, solver, smallest + (top - smallest) * number // BUDGETS, plain)
        cell.what = "smallest" if number == 0 else f"{100 * number // BUDGETS} %"
        cell.solve_s += smallest_s if number == 0 else 0.0
        row.cells.append(cell)
    for kind in OPTIMIZER_KINDS[1:]:
        try:
            case = build(name, size)
            settle(case, case.optimizers(kind))
        except RuntimeError as error:  # fused AdamW takes no complex parameters
            row.refused[kind] = str(error).split(":")[0][:60]
            continue
        found = Solver(measured(kind))
        predicted = found.plain(2**62).predicted_peak_bytes - found.profile.margin_bytes
        peak = train(build(name, size), 1, kind=kind).peak_bytes
        row.optimizers.append(Cell(kind, peak, predicted, peak, predicted, peak))
    try:
        row.mem_tracker = mem_tracker_peak(name, size)
    except Exception as error:
        row.mem_tracker_failure = type(error).__name__
    return row


# ------------------------------------------------------------------------------------------------------ all models


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3f}"


def percent(ratio: float) -> str:
    return f"{100 * ratio:+.3f} %"


def bits(cell: Cell) -> str:
    if cell.what == "plain":
        return ""
    if not cell.differences:
        return "equal"
    return f"**{len(cell.differences)} differ**: {', '.join(cell.differences[:3])}"


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | plan | budget MiB | predicted | measured | error | repaired: predicted | measured | error "
        "| of budget | bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.failure:
            lines.append(f"| {row.name} | failed: {row.failure} |" + " |" * 9)
        for cell in row.cells:
            name = f"{row.name}{' (real step)' if row.method == 'real' else ''}" if cell.what == "plain" else ""
            again = cell.repaired != cell.predicted or cell.measured_repaired != cell.measured
            repaired = (mib(cell.repaired), mib(cell.measured_repaired), percent(cell.repaired_error))
            used = f"{100 * cell.measured_repaired / cell.budget:.2f} %"
            budget, used = ("", "") if cell.what == "plain" else (mib(cell.budget), used)
            lines.append(
                f"| {name} | {cell.what} | {budget} | {mib(cell.predicted)} | {mib(cell.measured)} | "
                f"{percent(cell.error)} | {' | '.join(repaired if again else ('', '', ''))} | {used} | {bits(cell)} |"
            )
    return lines


def optimizer_table(rows: list[Row]) -> list[str]:
    done = [row for row in rows if row.optimizers]
    if not done:
        return []
    kinds = sorted({cell.what for row in done for cell in row.optimizers})
    lines = [
        "",
        "## The plain step: other forms of the optimizer, and PyTorch's MemTracker",
        "",
        "| model | AdamW foreach, MiB | error | MemTracker, error | "
        + " | ".join(f"{kind}, MiB | error" for kind in kinds)
        + " |",
        "|" + "---|" * (4 + 2 * len(kinds)),
    ]
    for row in done:
        plain = row.cells[0]
        peer = percent(row.mem_tracker / plain.measured - 1) if row.mem_tracker else f"fails: {row.mem_tracker_failure}"
        by_kind = {cell.what: f"{mib(cell.measured)} | {percent(cell.error)}" for cell in row.optimizers}
        cells = " | ".join(by_kind.get(kind, "refused by PyTorch | ") for kind in kinds)
        lines.append(f"| {row.name} | {mib(plain.measured)} | {percent(plain.error)} | {peer} | {cells} |")
    return lines


def time_table(rows: list[Row]) -> list[str]:
    lines = [
        "",
        "## Planning time, seconds",
        "",
        "| model | operations | regions | measure, cold | of it workspace | times | measure, cached | of it workspace "
        "| times | first solve | later solves, median |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        solves = [cell.solve_s for cell in row.cells[1:]]
        if solves:
            parts = " | ".join(
                f"{found['total']:.2f} | {100 * found['workspace'] / found['total']:.0f} % | "
                f"{100 * found['times'] / found['total']:.0f} %"
                for found in (row.cold, row.cached)
            )
            later = statistics.median(solves[1:]) if solves[1:] else 0.0
            lines.append(f"| {row.name} | {row.ops} | {row.regions} | {parts} | {solves[0]:.2f} | {later:.2f} |")
    return lines


def summary(rows: list[Row]) -> list[str]:
    cells = [cell for row in rows for cell in (*row.cells, *row.optimizers)]
    planned = [cell for row in rows for cell in row.cells[1:]]
    if not cells:
        return ["Nothing ran."]
    before = sorted(abs(cell.error) for cell in cells)
    after = sorted(abs(cell.repaired_error) for cell in cells)
    over = [cell for cell in planned if cell.measured_repaired > cell.budget]
    over_before = [cell for cell in planned if cell.measured > cell.budget]
    unequal = [cell for cell in planned if cell.differences]
    irregular = [row for row in rows if row.not_reproducible]
    peers = [abs(row.mem_tracker / row.cells[0].measured - 1) for row in rows if row.mem_tracker and row.cells]
    ours = [abs(row.cells[0].error) for row in rows if row.mem_tracker and row.cells]
    lines = [
        f"* {len([row for row in rows if row.cells])} models, {len(cells)} cells, {len(planned)} of them plans.",
        f"* Error before repair: median {100 * statistics.median(before):.4f} %, worst {100 * before[-1]:.4f} %.",
        f"* Error after repair: median {100 * statistics.median(after):.4f} %, worst {100 * after[-1]:.4f} %.",
        f"* Plans over their budget: {len(over_before)} before repair (worst by "
        f"{max((c.measured - c.budget for c in over_before), default=0)} bytes), {len(over)} after.",
        f"* Plans with bits other than the plain step's: {len(unequal)}.",
        f"* Plain steps that do not reproduce themselves: {len(irregular)}"
        + "".join(f"; {row.name}: {', '.join(row.not_reproducible[:4])}" for row in irregular)
        + ".",
    ]
    if peers:
        failed = [row.name for row in rows if row.cells and not row.mem_tracker]
        lines.append(
            f"* PyTorch's MemTracker on the same plain steps: median {100 * statistics.median(peers):.3f} %, worst "
            f"{100 * max(peers):.3f} % (ours there: {100 * statistics.median(ours):.4f} % and {100 * max(ours):.3f} %)"
            + (f"; it fails on {', '.join(failed)}." if failed else ".")
        )
    failed = [row for row in rows if row.failure]
    if failed:
        lines.append("* Failed: " + "; ".join(f"{row.name} ({row.failure})" for row in failed) + ".")
    return lines


def run_in_process(name: str, size: str, cache: str) -> Row:
    command = [sys.executable, __file__, name, "--size", size, "--one"]
    environment = os.environ | {"TIGHTFIT_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, failure=f"not done within {TIMEOUT_S} s")
    if done.returncode:
        return Row(name, failure=(done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for part in ("cells", "optimizers"):
        found[part] = [Cell(**cell) for cell in found[part]]
    return Row(**found)


def main() -> None:
    from tests.suite import SUITE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *SUITE], help="by default all of the suite")
    parser.add_argument("--size", choices=("tiny", "bench"), default="bench")
    parser.add_argument("--output", help="also write the tables to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(one_model(arguments.models[0], arguments.size))))
        return
    import torch

    begin = time.perf_counter()
    rows: list[Row] = []
    for name in arguments.models or SUITE:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as cache:
            rows.append(run_in_process(name, arguments.size, cache))
        last = rows[-1]
        worst = max((abs(cell.error) for cell in last.cells), default=0.0)
        state = last.failure or f"worst error {100 * worst:.3f} %"
        print(f"{name}: {state}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    head = [
        "# Predicted against measured peak memory",
        "",
        f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores, fp32, PyTorch {torch.__version__}, suite "
        f'size "{arguments.size}"; {(time.perf_counter() - begin) / 60:.0f} minutes; '
        "`python benchmarks/memory_model.py`.",
        "",
    ]
    notes = [
        "",
        f"Peaks are MiB of the whole step. {BUDGETS} budgets lie evenly between the smallest one and the plain peak; "
        f"measured is the worst of {STEPS} steps; the repaired columns are empty where nothing needed repair; bits are "
        f"those of {STEPS} optimizer steps.",
        "",
    ]
    text = "\n".join([*head, *summary(rows), *notes, *table(rows), *optimizer_table(rows), *time_table(rows)]) + "\n"
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
