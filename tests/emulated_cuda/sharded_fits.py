"""Fit sharded models (FSDP2) on two emulated GPUs, and count what runs out of memory.

    python -m tests.emulated_cuda.run python -m tests.emulated_cuda.sharded_fits         # 24 fits with memory_cap=True
    python -m tests.emulated_cuda.run python -m tests.emulated_cuda.sharded_fits --full  # on cards that it fills

FSDP2 cannot leave a backward that ran out of memory: there is no second try.  Each of two processes has a device of its
own; collectives go through gloo.  After each fit the model is trained for a few steps.  `--full` lets the allocator
have no more than the budget from the beginning, as a card does that has no more.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import tightfit
from tightfit.device import device_for
from tightfit.errors import RanOutOfMemory
from tightfit.solver.solver import Solver

MIB = 2**20
SHARES = (0.0, 0.2, 0.5, 0.8)
STEPS = 4
OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Perceptrons(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


class Encoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


MODELS = {
    "perceptrons": (lambda: Perceptrons(512, 6), (8192, 512)),
    "wide perceptrons": (lambda: Perceptrons(2048, 3), (2048, 2048)),
    "encoder": (lambda: Encoder(512, 4), (16, 256, 512)),
}


def fits(is_full: bool) -> Iterator[tuple[str, str]]:
    """Fit each model, with each optimizer, to each budget; yield what was fitted and what became of it."""
    for (name, (make, size)), (kind, optimizer_of) in itertools.product(MODELS.items(), OPTIMIZERS.items()):
        model, step = sharded(make, optimizer_of)
        batch = torch.randn(size, device="cuda")
        profile = tightfit.measure(model, batch, step=step)
        solver = Solver(profile)
        smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
        for share in SHARES:
            budget = int(smallest + share * (plain - smallest))
            undo = device_for("cuda").cap_held(budget) if is_full else lambda: None
            try:
                outcome = fitted(model, batch, budget, step, profile, memory_cap=not is_full)
            except tightfit.BudgetInfeasible as error:
                outcome = f"refused, {error.required_bytes / MIB:.1f} MiB needed"
            except (RanOutOfMemory, torch.OutOfMemoryError) as error:
                outcome = f"RAN OUT: {type(error).__name__}"
                del error
                model, step = sharded(make, optimizer_of)
            finally:
                undo()
            yield f"{name}, {kind}, {share:.0%}: {budget / MIB:.0f} MiB", outcome
            torch.cuda.empty_cache()


def sharded(make: Any, optimizer_of: Any) -> tuple[nn.Module, tightfit.Step]:
    """Make a model, shard it, and say how it is trained."""
    torch.manual_seed(0)
    model = make().to("cuda").train()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, tightfit.Step(loss=lambda model, batch: model(batch), optimizer=optimizer_of(model.parameters()))


def fitted(model: nn.Module, batch: Tensor, budget: int, step: tightfit.Step, profile: Any, **options: Any) -> str:
    """Fit, train, and say how much that took."""
    with tightfit.fit(model, batch, budget=budget, step=step, profile=profile, **options) as applied:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            applied.loss(model, batch).backward()
            step.run_optimizers(model)
            model.zero_grad()
        verdict, plan = applied.verdict, applied.plan
        assert verdict is not None
        device = device_for("cuda")
        highest = torch.cuda.max_memory_reserved() + device.held_bytes() - device.reserved_bytes()
    within = "" if max(verdict.measured_peak_bytes, highest) <= budget else "OVER THE BUDGET: "
    sizes = (plan.predicted_peak_bytes, verdict.measured_peak_bytes, highest)
    return within + "predicted {:.1f}, measured {:.1f}, in training {:.1f} MiB".format(*(n / MIB for n in sizes))


def take_part(rank: int, port: int, most: int, is_full: bool) -> int:
    """Be one of the two processes; return how many fits ran out of memory."""
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    warnings.simplefilter("ignore")
    outcomes = []
    for case, outcome in itertools.islice(fits(is_full), most):
        outcomes.append(outcome)
        if rank == 0:
            print(f"{case:44} {outcome}", flush=True)
    lost = sum(outcome.startswith("RAN OUT") for outcome in outcomes)
    print(f"rank {rank}: {lost} of {len(outcomes)} fits ran out of memory", flush=True)
    dist.destroy_process_group()
    return lost


def main() -> int:
    """Start both processes and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=24, help="fits")
    parser.add_argument("--full", action="store_true", help="the card has no more than the budget")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        return int(take_part(given.rank, given.port, given.most, given.full) > 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--most", str(given.most), "--port", str(port), *(["--full"] if given.full else [])]
    command = [sys.executable, "-m", "tests.emulated_cuda.sharded_fits", *words]
    environment = {**os.environ, "EMULATED_CUDA_DEVICES": "2"}
    processes = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(2)]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
