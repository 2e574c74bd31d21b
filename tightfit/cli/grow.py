"""`tightfit grow`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tightfit.cli.elsewhere import build_for
from tightfit.cli.options import GrowOptions
from tightfit.device.described.cards import card_named
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.registry import standing_in
from tightfit.errors import UnsupportedInput
from tightfit.planning.grow import Growth, grow_step
from tightfit.report.frontier_plot import check_output, save_figure
from tightfit.report.growth import draw_growth, format_growth, growth_figures
from tightfit.step.microbatch import Microbatch
from tightfit.train import TrainConfig, WorkConfig, Workload, build, resolve
from tightfit.train.data.loader import batch_of, to_device
from tightfit.train.files import replacing
from tightfit.train.largest_batch import largest_samples
from tightfit.train.run_folder import RunFolder
from tightfit.train.settings import LARGEST_BATCH


def grow(options: GrowOptions, command: Sequence[str]) -> int:
    """Find the largest batch that trains within the budget, and print it."""
    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_output(output)
    found = _grown(options, options.most)
    if output is not None:
        with replacing(output) as temporary:
            save_figure(draw_growth(found), temporary, output.suffix)
    print(json.dumps(growth_figures(found)) if options.json else format_growth(found))
    return 0


def with_largest_batch(config: TrainConfig) -> TrainConfig:
    """Put a number in place of ``--batch-size max``: that of the run that is resumed, or the largest that fits.

    Raises:
        BudgetInfeasible: one sample needs more than the budget.
        UnsupportedInput: the batch is to be split, too, or the run that is resumed does not say how large its batch is.
    """
    if config.batch_size != LARGEST_BATCH:
        return config
    if config.microbatch_size is not None or config.accumulation_steps is not None:
        name = "--microbatch-size" if config.microbatch_size is not None else "--accumulation-steps"
        raise UnsupportedInput(
            f"--batch-size max and {name} are given, but a batch that is split is never too large. Give one of them."
        )
    number = _number_of_the_run(config)
    if number is None:
        one = replace(config, batch_size=1)
        number = _grown(one, len(build(*resolve(one)).data.samples)).largest
    return replace(config, batch_size=number)


def _number_of_the_run(config: TrainConfig) -> int | None:
    """Return how large batches were in the run that is to be resumed; None if there is none."""
    if config.resume is None:
        return None
    resolved, _ = resolve(replace(config, batch_size=1))
    folder = RunFolder(resolved)
    checkpoint = folder.find_checkpoint(resolved.resume)
    if checkpoint is None:
        return None
    kept = folder.path / "config.yaml"
    try:
        return int(yaml.safe_load(kept.read_text("utf-8"))["batch_size"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise UnsupportedInput(
            f"--batch-size max was given for a run that goes on, but {kept} does not say how large its batches were. "
            f"Write the number that the run began with."
        ) from None


def _grown(options: WorkConfig, most: int) -> Growth:
    one = replace(options, batch_size=1)
    card = card_named(options.device)
    described = None if card is None else DescribedDevice(card)
    work = build(*resolve(one)) if card is None else build_for(one, card)
    numbers = largest_samples(work.data, work.loader)
    inside: AbstractContextManager[object] = nullcontext() if described is None else standing_in(described)
    with inside:
        return grow_step(
            work.model,
            lambda number: _batch(work, numbers, number),
            work.spec().starting(work.model),
            work.budget.step_bytes,
            described=described,
            most=most,
        )


def _batch(work: Workload, numbers: Sequence[int], count: int) -> Any:
    """Return a batch of so many samples; where there are not as many, some are in it several times."""
    places = [numbers[place % len(numbers)] for place in range(count)]
    return Microbatch(to_device(batch_of(work.data, places), work.device))
