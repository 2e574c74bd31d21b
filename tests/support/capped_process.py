"""Run in a process of its own by `test_out_of_memory`: plan and train under a cap of the operating system.

The address space is capped (RLIMIT_AS, as `ulimit -v` does) at

    what the process takes after importing, building and warming up + (budget - baseline) + the stated margin,

so everything that planning and training need beyond the model, its gradients and its optimizer state must fit into what
the budget leaves.  The plain step, which needs more than half a GiB beyond the budget, must fail there.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tightfit
from tightfit.device.out_of_memory import is_out_of_memory

MIB = 2**20
MARGIN_BYTES = 64 * MIB
WIDTH = 2048
BLOCKS = 6
DEPTH = 10


class Block(nn.Module):
    """Much to save and little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.shift
        for _ in range(DEPTH):
            x = nn.functional.leaky_relu(x, 0.9)
        return x


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def own_size_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def main(rows: int, budget_bytes: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(BLOCKS)])
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(rows, WIDTH)
    # Warming up on a sliver of the batch: libraries, threads, gradients and optimizer state are there.
    sliver = batch[:1].clone()
    with tightfit.fit(model, sliver, loss=loss_of, optimizer=optimizer, grad_checkpoint="full") as applied:
        middle_bytes = (applied.plan.predicted_peak_bytes + applied.plan.plain_peak_bytes) // 2
    tightfit.fit(model, sliver, budget=middle_bytes, loss=loss_of, optimizer=optimizer).remove()
    for _ in range(2):
        loss_of(model, sliver).backward()
        optimizer.step()
    profile = tightfit.measure(model, batch, loss=loss_of, optimizer=optimizer)
    own_bytes = own_size_bytes()
    cap_bytes = own_bytes + budget_bytes - profile.baseline_bytes + MARGIN_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (cap_bytes, cap_bytes))
    found: dict[str, Any] = {"plain_peak_bytes": tightfit.solve(profile, 2**40).plain_peak_bytes}
    found |= {"baseline_bytes": profile.baseline_bytes, "own_bytes": own_bytes, "cap_bytes": cap_bytes}
    try:
        loss_of(model, batch).backward()
        found["plain"] = "finished"
    except (RuntimeError, MemoryError) as error:
        found["plain"] = "out of memory" if is_out_of_memory(error) else repr(error)
    applied = tightfit.fit(model, batch, budget=budget_bytes, loss=loss_of, optimizer=optimizer)
    optimizer.zero_grad(set_to_none=False)
    loss = applied.loss(model, batch)
    loss.backward()
    optimizer.step()
    assert applied.verdict is not None
    found |= {
        "losses": [loss.item()],
        "measured_peak_bytes": applied.verdict.measured_peak_bytes,
        "ok": applied.verdict.ok,
    }
    # Not `ru_maxrss`, which a process inherits from the one that started it, be that ever so large.
    (largest,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    found |= {"largest_bytes": int(largest.split()[1]) * 1024}
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
