"""A model sharded by FSDP2 over GPUs that are not here: one rank of a group of which nobody else is there."""

from __future__ import annotations

import pytest
import torch

import tightfit
from tightfit._torch_private.described import PLACE
from tightfit.device.described.cards import card_for
from tightfit.device.described.gpu import DescribedDevice
from tightfit.device.registry import standing_in
from tightfit.distributed.pretended import pretended_group
from tightfit.errors import UnsupportedInput
from tightfit.records import Profile
from tightfit.train.parallel.fsdp import shard

CARD = "h100-80gb"


def measured(processes: int) -> Profile:
    blocks = [torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512)) for _ in range(3)]
    model = torch.nn.Sequential(*blocks).to("meta")
    with pretended_group(processes) as group, standing_in(DescribedDevice(card_for(CARD))):
        if processes > 1:
            shard(model, group, PLACE, None)
        optimizer = torch.optim.AdamW(model.parameters())
        batch = torch.empty(64, 512, device="meta")
        return tightfit.measure(model, batch, loss=lambda m, b: m(b).square().mean(), optimizer=optimizer, device=CARD)


def test_each_of_several_gpus_holds_its_share_and_gathers_one_block_after_the_other() -> None:
    alone, shared = measured(1), measured(4)
    assert shared.is_sharded
    for part in ("parameters", "gradients", "optimizer_state"):
        assert shared.baseline[part] == pytest.approx(alone.baseline[part] / 4, rel=0.01)
    block_bytes = 4 * (2 * 512 * 2048 + 2048 + 512)
    plan = tightfit.solve(shared, budget_bytes=80 * 2**30)
    beside = plan.predicted_allocated_bytes - shared.baseline_bytes
    assert beside > 2 * block_bytes  # gathered weights, and their gradients before these are reduced
    whole = tightfit.solve(alone, budget_bytes=80 * 2**30).predicted_allocated_bytes
    assert plan.predicted_allocated_bytes < whole


def test_no_group_is_pretended_beside_another() -> None:
    with pretended_group(2), pytest.raises(UnsupportedInput, match="already has a process group"), pretended_group(2):
        pass
