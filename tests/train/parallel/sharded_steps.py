"""Started by torchrun: plain and planned steps of a model that `fully_shard` has shared out; rank 0 prints what was
found as one JSON document.

    torchrun --nproc-per-node 4 -m tests.train.parallel.sharded_steps WIDTH BLOCKS SEQUENCES PRECISION
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import tightfit
from tightfit.distributed._fsdp_private import _groups
from tightfit.planning.reuse import decisions_of
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import simulate

TOKENS, LENGTH = 64, 65


class Block(nn.Module):
    """Of a transformer; its scale is a buffer that stays float32 whatever the weights are."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("scale", torch.full((1,), 0.9))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 4, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = nn.functional.gelu(self.up(self.norm2(x))).float() * self.scale  # float32 between bf16 weights
        return x + self.down(hidden.to(x.dtype))


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class Exchanges:
    """Counts collectives on their way to the process group."""

    def __init__(self) -> None:
        self.counts = {"all_gather": 0, "reduce_scatter": 0}

    def watch(self, model: nn.Module) -> None:
        for group in _groups(model):
            for kind in self.counts:
                setattr(group, f"_{kind}_comm", self._counting(kind, getattr(group, f"_{kind}_comm")))

    def _counting(self, kind: str, comm: Any) -> Any:
        counts = self.counts

        class Counting(type(comm)):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                counts[kind] += 1
                return super().__call__(*args, **kwargs)

        return Counting()

    def of(self, step: Any) -> dict[str, int]:
        self.counts.update(dict.fromkeys(self.counts, 0))
        step()
        return dict(self.counts)


def main(width: int, blocks: int, sequences: int, precision: str) -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, look(width, blocks, sequences, precision))
    if dist.get_rank() == 0:
        print(json.dumps(everyones))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the model refers to the process group, whose threads would have to end before Python does


def look(width: int, blocks: int, sequences: int, precision: str) -> dict[str, Any]:
    """What this process finds."""
    torch.manual_seed(0)
    model = Model(width, blocks)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    batch = torch.randint(0, TOKENS, (sequences, LENGTH), generator=generator)
    settings: dict[str, Any] = {"loss": loss_of, "optimizer": optimizer, "clip_norm": 1.0}
    before = [parameter.to_local().clone() for parameter in model.parameters()]

    with tightfit.fit(model, batch, **settings) as plain:
        plain_verdict = plain.verdict
        assert plain_verdict is not None
    baseline, peak = plain.plan.baseline_bytes, plain.plan.predicted_peak_bytes
    with tightfit.fit(
        model, batch, budget=baseline + (peak - baseline) * 60 // 100, reference_budget_bytes=2 * peak, **settings
    ) as planned:
        verdict, profile = planned.verdict, planned.profile
        assert verdict is not None
        assert profile is not None
        decisions = decisions_of(planned.plan, profile)
        assert decisions is not None
        exchanges = Exchanges()
        exchanges.watch(model)
        with_plan = exchanges.of(lambda: planned.loss(model, batch).backward())
        with planned.paused():
            without = exchanges.of(lambda: loss_of(model, batch).backward())
        # A backward inside the step's context, where gathering is seen by whoever watches operations.
        optimizer.zero_grad()
        with planned.paused():
            loss_of(model, batch).backward()
        expected = [parameter.grad.to_local().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        with planned.step(batch):
            loss_of(model, batch).backward()
        inside = all(
            torch.equal(parameter.grad.to_local(), wanted)
            for parameter, wanted in zip(model.parameters(), expected, strict=True)
        )
    with tightfit.fit(model, batch, budget=planned.plan.budget_bytes, profile=profile, **settings) as unaided:
        by_region = unaided.verdict
        assert by_region is not None
    return {
        "by_region": (by_region.method, by_region.ok, by_region.gradients_equal, by_region.compared_share),
        "plain": (plain_verdict.predicted_peak_bytes, plain_verdict.measured_peak_bytes),
        "planned": (verdict.predicted_peak_bytes, verdict.measured_peak_bytes),
        "budget_bytes": planned.plan.budget_bytes,
        "ok": verdict.ok,
        "equal": [verdict.loss_equal, verdict.gradients_equal, verdict.buffers_equal, verdict.rng_equal],
        "mismatches": verdict.mismatches,
        "replayed": (verdict.replayed_ops, len(simulate(ProfileIndex(profile), decisions).replayed_ops)),
        "exchanges": (with_plan, without),
        "equal_inside": inside,
        "unchanged": all(
            torch.equal(parameter.to_local(), old) for parameter, old in zip(model.parameters(), before, strict=True)
        ),
    }


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
