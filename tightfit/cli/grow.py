"""`tightfit grow`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tightfit.cli.elsewhere import build_for
from tightfit.cli.options import GrowOptions
from tightfit.device.described.cards import card_named
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.registry import standing_in
from tightfit.planning.grow import grow_step
from tightfit.report.frontier_plot import check_output, save_figure
from tightfit.report.growth import draw_growth, format_growth, growth_figures
from tightfit.step.microbatch import Microbatch
from tightfit.train import Workload, build, resolve
from tightfit.train.data.loader import batch_of, to_device
from tightfit.train.files import replacing


def grow(options: GrowOptions, command: Sequence[str]) -> int:
    """Find the largest batch that trains within the budget, and print it."""
    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_output(output)
    one = replace(options, batch_size=1)
    card = card_named(options.device)
    described = None if card is None else DescribedDevice(card)
    work = build(*resolve(one)) if card is None else build_for(one, card)
    inside: AbstractContextManager[object] = nullcontext() if described is None else standing_in(described)
    with inside:
        found = grow_step(
            work.model,
            lambda number: _batch(work, number),
            work.spec().starting(work.model),
            work.budget.step_bytes,
            described=described,
            most=options.most,
        )
    if output is not None:
        with replacing(output) as temporary:
            save_figure(draw_growth(found), temporary, output.suffix)
    print(json.dumps(growth_figures(found)) if options.json else format_growth(found))
    return 0


def _batch(work: Workload, number: int) -> Any:
    """Return a batch of so many samples; where there are not as many, some are in it several times."""
    return Microbatch(
        to_device(batch_of(work.data, [place % len(work.data.samples) for place in range(number)]), work.device)
    )
