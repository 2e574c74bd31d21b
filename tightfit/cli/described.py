"""The commands about GPUs that are not here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tightfit.cli.elsewhere import build_for, fitting_of
from tightfit.cli.levers import find_levers
from tightfit.cli.options import FrontierOptions, ListOptions, PlanOptions
from tightfit.cli.snapshot_file import write_snapshot
from tightfit.device.described.cards import Card, cards
from tightfit.device.described.gpu import DescribedDevice
from tightfit.profiling.measure import measure_described
from tightfit.report.elsewhere import cards_figures, fitting_figures, format_cards, format_fitting
from tightfit.report.frontier_plot import draw_frontier, save_figure
from tightfit.report.frontier_table import Curve, curve_figures, format_curve
from tightfit.report.levers import format_levers
from tightfit.report.peers import load_peers
from tightfit.report.phase_bar import showing_phases
from tightfit.solver.frontier import frontier_of
from tightfit.solver.solver import solver_of
from tightfit.train.files import replacing

#: As where a plan is made for a device that is here, and the budget is too small.
_DOES_NOT_FIT = 2


def plan_elsewhere(options: PlanOptions, card: Card) -> int:
    """Say whether the step fits the card, and what it would need.  Returns 2 if it does not fit."""
    with showing_phases(Console(stderr=True)):
        found = fitting_of(options, card, options.fsdp)
        levers = find_levers(options, card, found) if options.explain else ()
    if options.output is not None and found.fit != "no":
        with replacing(Path(options.output)) as temporary:
            found.plan.save(temporary)
    if options.snapshot is not None:
        write_snapshot(Path(options.snapshot), found.profile, found.plan)
    if options.json:
        print(json.dumps({**fitting_figures(found), "levers": [lever.to_json() for lever in levers]}))
    else:
        print(format_fitting(found))
        if options.explain:
            print(format_levers(levers, found.budget_bytes))
    return _DOES_NOT_FIT if found.fit == "no" else 0


def frontier_elsewhere(options: FrontierOptions, card: Card) -> int:
    """Solve for budgets from the smallest to the plain peak on the card, and print and draw what each costs."""
    work = build_for(options, card)
    solver = solver_of(measure_described(work.model, work.microbatch(0), work.spec(), DescribedDevice(card)))
    marked_bytes = work.budget.total_bytes if options.marks_budget else None
    begin = time.perf_counter()
    plans = frontier_of(solver, options.points, also=() if marked_bytes is None else (marked_bytes,))
    curve = Curve.of(solver, plans, marked_bytes, solving_ms=1e3 * (time.perf_counter() - begin))
    if options.output is not None:
        peers = None if options.peers is None else load_peers(Path(options.peers))
        figure = draw_frontier(plans, budget_bytes=marked_bytes, peers=peers)
        with replacing(Path(options.output)) as temporary:
            save_figure(figure, temporary, Path(options.output).suffix)
    print(json.dumps(curve_figures(curve)) if options.json else f"{format_curve(curve)}\n  times are estimates")
    return 0


def devices(options: ListOptions, command: Sequence[str]) -> int:
    """Print the cards that plans can be made for without having them."""
    listed = cards().values()
    if options.json:
        print(json.dumps(cards_figures(listed)))
    else:
        print(format_cards(listed))
        print("also: cuda:24GiB, a GPU of that size; and the devices of this machine: cpu, cuda, cuda:1")
    return 0
