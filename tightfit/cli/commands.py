"""The commands: each calls the trainer or the verbs, and prints what they return."""

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
from rich.console import Console

import tightfit
from tightfit.cli.console import prefix_messages, print_message
from tightfit.cli.described import frontier_elsewhere, plan_elsewhere
from tightfit.cli.doctor import examine, format_examination
from tightfit.cli.grow import with_largest_batch
from tightfit.cli.options import (
    ExplainOptions,
    FrontierOptions,
    ListOptions,
    PlanOptions,
    ReportOptions,
    TrainOptions,
    VerifyOptions,
)
from tightfit.cli.snapshot_file import write_snapshot
from tightfit.device.budget import Budget
from tightfit.device.described.cards import card_named
from tightfit.device.registry import accelerator_kind
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.explanation.script import explain_script
from tightfit.planning.search import confirm_smallest, find_plan
from tightfit.records import Plan
from tightfit.report.chart_files import save_charts
from tightfit.report.dry_run import format_dry_run
from tightfit.report.frontier_plot import check_output, draw_frontier, require_matplotlib, save_figure
from tightfit.report.frontier_table import Curve, curve_figures, format_curve
from tightfit.report.peers import load_peers
from tightfit.report.phase_bar import showing_phases
from tightfit.report.plan_table import format_plan, format_table, plan_figures
from tightfit.report.reporter import Reporter
from tightfit.report.run_charts import memory_charts, run_charts
from tightfit.report.run_files import PAGE
from tightfit.report.run_page import read_and_render
from tightfit.report.run_summary import format_summary
from tightfit.report.text import batch_note, format_measuring, format_peak, format_verdict
from tightfit.solver.frontier import frontier_of
from tightfit.solver.next_budget import next_useful_bytes
from tightfit.solver.solver import solver_of
from tightfit.step.batch import describe_batch
from tightfit.train import Interrupted, TrainConfig, Workload, build, resolve
from tightfit.train.data import DATASETS
from tightfit.train.dry_run import rehearse
from tightfit.train.files import replacing, write_text
from tightfit.train.launch.devices import choose_backend, take_device
from tightfit.train.launch.launcher import launch, note_failure, noting_failure
from tightfit.train.launch.orphans import end_with_parent
from tightfit.train.launch.rendezvous import process_group
from tightfit.train.launch.roles import Alone, Starter, find_role
from tightfit.train.models import MODELS
from tightfit.train.run import run
from tightfit.verification.trial import Trial

#: Of the table that `tightfit plan` prints without --explain.
_PLAN_LINES = 6


def train(options: TrainOptions, command: Sequence[str]) -> int:
    """Train, and print the summary."""
    config = TrainConfig(**{entry.name: getattr(options, entry.name) for entry in fields(TrainConfig)})
    if options.verbose:
        logging.getLogger("tightfit").setLevel(logging.INFO)
    role = find_role(config, os.environ, accelerator_kind().count())
    notice = ""
    if isinstance(role, Alone):
        asked, config = config, with_largest_batch(config)
        notice = role.notice if config is asked else f"--batch-size max is {config.batch_size} here"
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
        return _train(config, options, command, SINGLE_PROCESS, device, notice)
    prefix_messages(f"rank {role.rank}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    backend = choose_backend(device, config.dist_backend)

    def give_up(problem: Exception) -> None:
        note_failure(problem)
        print_message(problem)
        os._exit(1)  # the main thread may wait in a collective for ever

    with (
        noting_failure(),
        process_group(role, backend=backend, device=device, timeout_s=config.dist_timeout, give_up=give_up) as group,
    ):
        return _train(config, options, command, group, device, "")


def _train(
    config: TrainConfig,
    options: TrainOptions,
    command: Sequence[str],
    group: ProcessGroup,
    device: torch.device,
    notice: str,
) -> int:
    """Train in this process; only rank 0 prints."""
    with ExitStack() as stack:
        # With --json, stdout is for the one document, and all text goes to stderr.
        stream = sys.stderr if options.json else sys.stdout
        if options.json:  # some libraries print warnings about the machine
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
            return interrupted.exit_code  # rank 0 prints the message
        if summary is not None:
            reporter.say(format_summary(summary), important=True)
    if options.json and group.is_main_process:
        print(json.dumps({"finished": True} if summary is None else {"finished": True, **summary.to_json()}))
    return 0


def plan(options: PlanOptions, command: Sequence[str]) -> int:
    """Find a plan that keeps the budget in a real step, or for a GPU that is not here, and print it."""
    _require_folder(options.output)
    if (card := card_named(options.device)) is not None:
        return plan_elsewhere(options, card)
    options, source = resolve(options)
    work = build(options, source)
    with showing_phases(Console(stderr=True)):
        found = find_plan(work.model, work.microbatch(0), work.spec(), work.budget.step_bytes)
        solved, profile = found.plan, found.profile
        more_bytes = next_useful_bytes(solver_of(profile), solved)
    if options.output is not None:
        with replacing(Path(options.output)) as temporary:
            solved.save(temporary)
    if options.snapshot is not None:
        write_snapshot(Path(options.snapshot), profile, solved)
    if options.json:
        measuring_ms = dict(profile.measuring_ms)
        print(json.dumps({**plan_figures(solved), "next_useful_bytes": more_bytes, "measuring_ms": measuring_ms}))
    else:
        print(f"model   {solved.model}, batch {solved.batch}, {solved.optimizer}, on {solved.device}")
        print(format_plan(solved))
        print(format_peak(solved, more_bytes))
        print(f"        measured in {format_measuring(profile)}")
        if not solved.is_plain:
            print(format_table(solved, None if options.explain else _PLAN_LINES))
        if options.output is not None:
            print(f"written to {options.output}")
    return 0


def frontier(options: FrontierOptions, command: Sequence[str]) -> int:
    """Solve for budgets from the smallest to the plain peak, and print and draw what each costs."""
    output = None if options.output is None else Path(options.output)
    _require_folder(options.output)
    if output is not None:
        check_output(output)
    if (card := card_named(options.device)) is not None:
        return frontier_elsewhere(options, card)
    options, source = resolve(options)
    peers = None if options.peers is None else load_peers(Path(options.peers))
    work = build(options, source)
    batch = work.microbatch(0)
    marked_bytes = work.budget.total_bytes if options.marks_budget else None
    with showing_phases(Console(stderr=True)):
        profile = tightfit.measure(work.model, batch, **_keywords(work))
        with Trial(work.model, batch, work.spec()) as trial:
            profile = confirm_smallest(trial, profile)
        begin = time.perf_counter()
        solver = solver_of(profile)
        plans = frontier_of(solver, options.points, also=() if marked_bytes is None else (marked_bytes,))
    curve = Curve.of(solver, plans, marked_bytes, solving_ms=1e3 * (time.perf_counter() - begin))
    if output is not None:
        figure = draw_frontier(plans, budget_bytes=marked_bytes, peers=peers)
        with replacing(output) as temporary:
            save_figure(figure, temporary, output.suffix)
    if options.json:
        print(json.dumps(curve_figures(curve)))
    else:
        print(format_curve(curve))
        print(f"  measured in {format_measuring(profile)}; solved in {curve.solving_ms / 1e3:.1f} s")
        if output is not None:
            print(f"drawn into {output}")
    return 0


def verify(options: VerifyOptions, command: Sequence[str]) -> int:
    """Run plain and planned steps side by side, and print the verdict.  Returns 1 if they are not proven equal."""
    options, source = resolve(options)
    solved = Plan.load(options.plan) if options.plan is not None else None
    work = build(options, source)
    batch = work.microbatch(0)
    reference_bytes = Budget.of(options.reference_memory, work.device, name="--reference-memory").total_bytes
    with showing_phases(Console(stderr=True)):
        if solved is None:
            # With repair, as in training: what is verified is the plan that `tightfit train` would use.
            solved = find_plan(work.model, batch, work.spec(), work.budget.step_bytes).plan
        verdict = tightfit.verify(
            work.model,
            batch,
            solved,
            **_keywords(work),
            steps=options.steps,
            reference_budget_bytes=reference_bytes,
        )
    if options.json:
        print(json.dumps({name: getattr(verdict, name) for name in (*(e.name for e in fields(verdict)), "reason")}))
    else:
        print(format_plan(solved))
        print(format_verdict(verdict))
        print(batch_note(solved, describe_batch(batch)), end="")
    return 0 if verdict.ok else 1


def explain(options: ExplainOptions, command: Sequence[str]) -> int:
    """Run a script until its first complete step, and print why that needs the memory it needs.

    Returns the exit code of the script, where it ended by itself.
    """
    assert options.script is not None
    found = explain_script(Path(options.script), options.arguments, memory=options.memory, device=options.device)
    print(json.dumps(found.explanation) if options.json else found.text)
    return found.exit_code


def report(options: ReportOptions, command: Sequence[str]) -> int:
    """Write the page of a run's folder, and its charts as files."""
    assert options.run_folder is not None
    if options.plots is not None:
        require_matplotlib()
    run, page = read_and_render(Path(options.run_folder))
    target = Path(options.output) if options.output is not None else run.folder / PAGE
    try:
        write_text(target, page)
    except OSError as problem:
        raise UnsupportedInput(
            f"the page cannot be written to {target}: {problem.strerror}. Give another file with --output."
        ) from None
    plots = [] if options.plots is None else save_charts((*memory_charts(run), *run_charts(run)), Path(options.plots))
    if options.json:
        found = {"report": str(target), "finished": run.summary is not None, "summary": run.summary}
        print(json.dumps(found if options.plots is None else {**found, "plots": list(map(str, plots))}))
    else:
        print(f"the page of the run is {target}")
        if plots:
            print(f"{len(plots)} plots are in {options.plots}")
    return 0


def doctor(options: ListOptions, command: Sequence[str]) -> int:
    """Print this machine's devices, and whether the engine works here.  Returns 1 if it does not."""
    found = examine()
    print(json.dumps(found) if options.json else format_examination(found))
    return 0 if found["self_test"]["ok"] and all(found["required"].values()) else 1


def models(options: ListOptions, command: Sequence[str]) -> int:
    """Print the built-in models."""
    known = {name: source.summary for name, source in MODELS}
    _print_list(options, known, "also: transformers:CONFIG.json (or folder), package.module:factory")
    return 0


def datasets(options: ListOptions, command: Sequence[str]) -> int:
    """Print the built-in datasets."""
    known = {name: source.summary for name, source in DATASETS}
    _print_list(options, known, "also: the path of a text file or folder, package.module:factory")
    return 0


def _keywords(work: Workload) -> dict[str, Any]:
    """Return the step as keywords of the public verbs."""
    return {
        "loss": work.task.loss,
        "optimizer": work.optimizer,
        "accumulation_steps": work.accumulation_steps,
        "autocast": work.autocast,
        "clip_norm": work.clip_norm,
        "exclude": work.excluded,
    }


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
