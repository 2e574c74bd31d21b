"""What each command does: call the trainer or the verbs, print what they return."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import tightfit
from tightfit.cli.console import speak_as
from tightfit.cli.doctor import examine, format_examination
from tightfit.cli.options import FrontierOptions, ListOptions, PlanOptions, ReportOptions, TrainOptions, VerifyOptions
from tightfit.device.budget import resolve_budget
from tightfit.device.registry import accelerator_kind
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.planning.search import find_plan
from tightfit.records import Plan, Profile, Verdict
from tightfit.report.frontier_plot import check_output, draw_frontier, save_frontier
from tightfit.report.frontier_table import Curve, curve_figures, format_curve
from tightfit.report.peers import load_peers
from tightfit.report.plan_table import format_table, plan_rows
from tightfit.report.run_page import PAGE, read_run, render
from tightfit.solver.frontier import frontier_of
from tightfit.solver.next_budget import next_useful_bytes
from tightfit.solver.solver import Solver
from tightfit.step.batch import describe_batch
from tightfit.train import Interrupted, Reporter, TrainConfig, Workload, build, format_summary, resolve
from tightfit.train.data import DATASETS
from tightfit.train.dry_run import format_dry_run, rehearse
from tightfit.train.files import replacing, write_text
from tightfit.train.launch.devices import take_device, usual_backend
from tightfit.train.launch.launcher import launch, noting_failure
from tightfit.train.launch.rendezvous import joined
from tightfit.train.launch.roles import Alone, Starter, find_role
from tightfit.train.models import MODELS
from tightfit.train.run import run
from tightfit.train.summary import format_plan
from tightfit.units import format_bytes


def train(options: TrainOptions, command: Sequence[str]) -> int:
    """Train; print the summary."""
    config = TrainConfig(**{entry.name: getattr(options, entry.name) for entry in fields(TrainConfig)})
    if options.verbose:
        logging.getLogger("tightfit").setLevel(logging.INFO)
    role = find_role(config, os.environ, accelerator_kind().count())
    if options.dry_run:
        if not isinstance(role, Alone):
            raise UnsupportedInput(
                "--dry-run rehearses in one process, but several are asked for. Leave the launcher, "
                "--multiprocessing-distributed and --world-size out."
            )
        found = rehearse(config)
        print(json.dumps(found.to_json()) if options.json else format_dry_run(found))
        return 0
    if isinstance(role, Starter):
        launch(role, command[1:], config.dist_timeout)
        return 0
    device = take_device(role, config, config.device)
    if isinstance(role, Alone):
        return _train(config, options, command, SINGLE_PROCESS, device, role.notice)
    speak_as(f"rank {role.rank}")
    backend = usual_backend(device, config.dist_backend)
    with noting_failure(), joined(role, backend=backend, device=device, timeout_s=config.dist_timeout) as group:
        return _train(config, options, command, group, device, "")


def _train(
    config: TrainConfig,
    options: TrainOptions,
    command: Sequence[str],
    group: ProcessGroup,
    device: torch.device,
    notice: str,
) -> int:
    """One process's part of the run; rank 0 speaks."""
    with ExitStack() as stack:
        # With --json, stdout belongs to the one document; people read stderr.
        stream = sys.stderr if options.json else sys.stdout
        if options.json:  # some libraries print what they think of the machine
            stack.enter_context(redirect_stdout(sys.stderr))
        if not group.is_main_process:
            stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        reporter = stack.enter_context(Reporter(stream, quiet=options.quiet))
        if notice:
            reporter.say(f"note    {notice}")
        try:
            summary = run(config, command=command, reporter=reporter, group=group, device=device)
        except Interrupted as interrupted:
            if group.is_main_process:
                raise
            return interrupted.exit_code  # rank 0 says so
        if summary is not None:
            reporter.say(format_summary(summary), important=True)
    if options.json and group.is_main_process:
        print(json.dumps({"finished": True} if summary is None else {"finished": True, **summary.to_json()}))
    return 0


def plan(options: PlanOptions, command: Sequence[str]) -> int:
    """Find a plan that keeps the budget in a real step; print it."""
    options, source = resolve(options)
    _require_folder(options.output)
    work = build(options, source)
    found = find_plan(work.model, work.microbatch(0), work.spec(), work.budget_bytes)
    solved, profile = found.plan, found.profile
    more_bytes = next_useful_bytes(Solver(profile), solved)
    if options.output is not None:
        with replacing(Path(options.output)) as temporary:
            solved.save(temporary)
    if options.json:
        measuring_ms = dict(profile.measuring_ms)
        print(json.dumps({**plan_figures(solved), "next_useful_bytes": more_bytes, "measuring_ms": measuring_ms}))
    else:
        print(f"model   {solved.model}, batch {solved.batch}, {solved.optimizer}, on {solved.device}")
        print(format_plan(solved))
        print(format_peak(solved, more_bytes))
        print(f"        measured in {format_measuring(profile)}")
        if not solved.is_plain:
            print(format_table(solved))
        if options.output is not None:
            print(f"written to {options.output}")
    return 0


def frontier(options: FrontierOptions, command: Sequence[str]) -> int:
    """Solve for budgets from the smallest to the plain peak; print, and draw, what each costs."""
    options, source = resolve(options)
    output = None if options.output is None else Path(options.output)
    _require_folder(options.output)
    if output is not None:
        check_output(output)
    peers = None if options.peers is None else load_peers(Path(options.peers))
    work = build(options, source)
    profile = tightfit.measure(work.model, work.microbatch(0), **_keywords(work))
    marked_bytes = work.budget_bytes if options.marks_budget else None
    begin = time.perf_counter()
    solver = Solver(profile)
    plans = frontier_of(solver, options.points, also=() if marked_bytes is None else (marked_bytes,))
    curve = Curve.of(solver, plans, marked_bytes, solving_ms=1e3 * (time.perf_counter() - begin))
    if output is not None:
        figure = draw_frontier(plans, budget_bytes=marked_bytes, peers=peers)
        with replacing(output) as temporary:
            save_frontier(figure, temporary, output.suffix)
    if options.json:
        print(json.dumps(curve_figures(curve)))
    else:
        print(format_curve(curve))
        print(f"  measured in {format_measuring(profile)}; solved in {curve.solving_ms / 1e3:.1f} s")
        if output is not None:
            print(f"drawn into {output}")
    return 0


def verify(options: VerifyOptions, command: Sequence[str]) -> int:
    """Run plain and planned steps side by side; print the verdict. 1 if they are not proven equal."""
    options, source = resolve(options)
    solved = Plan.load(options.plan) if options.plan is not None else None
    work = build(options, source)
    batch = work.microbatch(0)
    if solved is None:
        # With repair, as in training: what is verified is the plan that `tightfit train` would use.
        solved = find_plan(work.model, batch, work.spec(), work.budget_bytes).plan
    verdict = tightfit.verify(
        work.model,
        batch,
        solved,
        **_keywords(work),
        steps=options.steps,
        reference_budget_bytes=resolve_budget(options.reference_memory, work.device, name="--reference-memory"),
    )
    if options.json:
        print(json.dumps({entry.name: getattr(verdict, entry.name) for entry in fields(verdict)}))
    else:
        print(format_plan(solved))
        print(format_verdict(verdict))
        print(batch_note(solved, describe_batch(batch)), end="")
    return 0 if verdict.ok else 1


def report(options: ReportOptions, command: Sequence[str]) -> int:
    """Make the page of a run's folder."""
    assert options.run_folder is not None
    run = read_run(Path(options.run_folder))
    target = Path(options.output) if options.output is not None else run.folder / PAGE
    try:
        write_text(target, render(run))
    except OSError as problem:
        raise UnsupportedInput(
            f"the page cannot be written to {target}: {problem.strerror}. Give another file with --output."
        ) from None
    if options.json:
        print(json.dumps({"report": str(target), "finished": run.summary is not None, "summary": run.summary}))
    else:
        print(f"the page of the run is {target}")
    return 0


def doctor(options: ListOptions, command: Sequence[str]) -> int:
    """Print what this machine offers and whether the engine works here. 1 if it does not."""
    found = examine()
    print(json.dumps(found) if options.json else format_examination(found))
    return 0 if found["self_test"]["ok"] and all(found["required"].values()) else 1


def models(options: ListOptions, command: Sequence[str]) -> int:
    """Print what models are known."""
    known = {name: source.summary for name, source in MODELS}
    _print_list(options, known, "also: transformers:CONFIG.json (or folder), package.module:factory")
    return 0


def datasets(options: ListOptions, command: Sequence[str]) -> int:
    """Print what datasets are known."""
    known = {name: source.summary for name, source in DATASETS}
    _print_list(options, known, "also: the path of a text file or folder, package.module:factory")
    return 0


def _keywords(work: Workload) -> dict[str, Any]:
    """The step, as the public verbs take it."""
    return {
        "loss": work.loss,
        "optimizer": work.optimizer,
        "accumulation_steps": work.accumulation_steps,
        "autocast": work.autocast,
        "clip_norm": work.clip_norm,
    }


def plan_figures(solved: Plan) -> dict[str, Any]:
    """The figures of a plan as plain data; the decisions are in the plan's file."""
    names = (
        "model", "batch", "device", "optimizer", "budget_bytes", "predicted_peak_bytes", "peak_where",
        "baseline_bytes", "plain_peak_bytes", "predicted_step_ms", "plain_step_ms", "overhead_ratio",
        "lower_bound_ms", "exactness",
    )  # fmt: skip
    return {
        **{name: getattr(solved, name) for name in names},
        "breakdown": dict(solved.breakdown),
        "parts_of_peak": parts_of_peak(solved.breakdown, solved.peak_where),
        "tape_host_bytes": solved.tape_host_bytes,
        "regions": len(solved.regions),
        "planned_regions": sum(region.recipe >= 0 for region in solved.regions),
        "recipes": plan_rows(solved),
    }


def format_peak(solved: Plan, more_bytes: int | None) -> str:
    """What the peak consists of, and what more memory would buy, for people."""
    parts = format_parts(parts_of_peak(solved.breakdown, solved.peak_where))
    lines = [f"        peak at {solved.peak_where}: {parts}"]
    if solved.tape_host_bytes:
        lines.append(
            f"        beside it, up to {format_bytes(solved.tape_host_bytes)} of Python objects in host memory"
        )
    if more_bytes is not None:
        added = format_bytes(more_bytes - solved.budget_bytes)
        lines.append(f"        more memory saves time from {format_bytes(more_bytes)} on ({added} more)")
    elif not solved.is_plain:
        lines.append("        more memory saves no time")
    return "\n".join(lines)


def format_measuring(profile: Profile) -> str:
    """How long measuring took, for people."""
    total_ms = sum(profile.measuring_ms.values())
    alone_ms = profile.measuring_ms.get("workspace", 0.0) + profile.measuring_ms.get("times", 0.0)
    return f"{total_ms / 1e3:.1f} s, {alone_ms / max(total_ms, 1e-9):.0%} of it on operations run alone"


def batch_note(solved: Plan, batch: str) -> str:
    """A line if the plan was made for another batch: its peak may then be exceeded, which is no fault of the plan."""
    if batch == solved.batch:
        return ""
    return f"  note        the plan is for batches of {solved.batch}: for this one, {batch}, it promises no peak\n"


def format_verdict(verdict: Verdict) -> str:
    """A verdict, for people."""
    proven = {True: "proven", False: "FAILED", None: "not fully proven"}[verdict.ok]
    kept = "kept" if verdict.measured_peak_bytes <= verdict.budget_bytes else "EXCEEDED"
    rows = [
        ("verdict", f"{proven}: {verdict.method}, {verdict.steps} steps"),
        ("loss", _equal(verdict.loss_equal)),
        ("gradients", _equal(verdict.gradients_equal)),
        ("buffers", _equal(verdict.buffers_equal)),
        ("random", _equal(verdict.rng_equal)),
        ("peak", f"{format_bytes(verdict.measured_peak_bytes)} measured, "
                 f"{format_bytes(verdict.predicted_peak_bytes)} predicted, budget "
                 f"{format_bytes(verdict.budget_bytes)} {kept}"),
        ("plain peak", f"{format_bytes(verdict.plain_peak_bytes)} ({verdict.plain_peak_source})"),
        ("time", f"{verdict.step_ms:.1f} ms, plain {verdict.plain_step_ms:.1f} ms ({verdict.plain_step_source}): "
                 f"{verdict.overhead_ratio:+.1%}"),
    ]  # fmt: skip
    for label, names in (
        ("differs", verdict.differing),
        ("unstable", verdict.not_reproducible),
        ("unverified", verdict.unverified),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            rows.append((label, shown))
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def _equal(equal: bool | None) -> str:
    return {True: "bit for bit equal to plain", False: "NOT EQUAL to plain", None: "not compared"}[equal]


def _require_folder(output: str | None) -> None:
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UnsupportedInput(
            f"--output {output} cannot be written: its folder does not exist. Make the folder first."
        )


def _print_list(options: ListOptions, known: Mapping[str, str], also: str) -> None:
    if options.json:
        print(json.dumps(known))
        return
    width = max(map(len, known))
    for name, summary in known.items():
        print(f"{name:<{width}}  {summary}")
    print(also)
