"""What a command's settings describe, built for a GPU that is not here, and whether it fits there."""

from __future__ import annotations

from tightfit._torch_private.described import PLACE
from tightfit.device.described.cards import Card
from tightfit.device.described.fitting import Fitting
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.registry import standing_in
from tightfit.distributed.pretended import pretended_group
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.planning.elsewhere import fit_elsewhere
from tightfit.step.weightless import without_weights
from tightfit.train import WorkConfig, Workload, build, resolve


def fitting_of(options: WorkConfig, card: Card, shards: int = 1) -> Fitting:
    """Plan the step of some settings for a card, or for one of several over which the model is sharded."""
    with pretended_group(shards) as group:
        work = build_for(options, card, group)
        return fit_elsewhere(work.model, work.microbatch(0), work.spec(), card, work.budget.step_bytes)


def build_for(options: WorkConfig, card: Card, group: ProcessGroup = SINGLE_PROCESS) -> Workload:
    """Build the model without its weights, for the card; sharded, if the group has several processes."""
    options, source = resolve(options)
    with standing_in(DescribedDevice(card)), without_weights():
        return build(options, source, group, PLACE, sharded=not group.is_single_process)
