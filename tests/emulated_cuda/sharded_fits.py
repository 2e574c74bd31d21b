"""Fit sharded models (FSDP2) on two emulated GPUs whose memory ends at the budget, and count what runs out of memory.

    python -m tests.emulated_cuda.run python -m tests.emulated_cuda.sharded_fits      # 24 fits

FSDP2 cannot leave a backward that ran out of memory: there is no second try, so the first plan has to fit.  Each of two
processes has a device of its own; collectives go through gloo.  The allocator is capped at the budget, which is where a
card would be full.
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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import tightfit
from tightfit.errors import RanOutOfMemory
from tightfit.solver.solver import Solver

MIB = 2**20
SHARES = (0.0, 0.2, 0.5, 0.8)
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


def fits(rank: int) -> Iterator[tuple[str, str]]:
    """Fit each model, with each optimizer, to each budget; yield what was fitted and what became of it."""
    for (name, (make, size)), (kind, optimizer_of) in itertools.product(MODELS.items(), OPTIMIZERS.items()):
        for share in SHARES:
            torch.manual_seed(0)
            model = make().to("cuda").train()
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
            batch = torch.randn(size, device="cuda")
            step = tightfit.Step(loss=lambda model, batch: model(batch), optimizer=optimizer_of(model.parameters()))
            profile = tightfit.measure(model, batch, step=step)
            solver = Solver(profile)
            smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
            budget = int(smallest + share * (plain - smallest))
            case = f"{name}, {kind}, {share:.0%}: {budget / MIB:.0f} MiB"
            try:
                applied = tightfit.fit(model, batch, budget=budget, step=step, profile=profile, memory_cap=True)
            except tightfit.BudgetInfeasible as error:
                yield case, f"refused, {error.required_bytes / MIB:.1f} MiB needed"
            except RanOutOfMemory as error:
                yield case, f"RAN OUT: {error}"
                return
            else:
                verdict = applied.verdict
                assert verdict is not None
                applied.remove()
                within = "" if verdict.measured_peak_bytes <= budget else "OVER THE BUDGET, "
                yield case, f"{within}{verdict.measured_peak_bytes / MIB:.1f} MiB, {verdict.replayed_ops} replayed"
            del model, step, batch, profile, solver
            torch.cuda.empty_cache()


def take_part(rank: int, port: int, most: int) -> None:
    """Be one of the two processes."""
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    warnings.simplefilter("ignore")
    outcomes = []
    for case, outcome in itertools.islice(fits(rank), most):
        outcomes.append(outcome)
        if rank == 0:
            print(f"{case:44} {outcome}", flush=True)
    lost = sum(outcome.startswith("RAN OUT") for outcome in outcomes)
    print(f"rank {rank}: {lost} of {len(outcomes)} fits ran out of memory", flush=True)
    dist.destroy_process_group()


def main() -> int:
    """Start both processes and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=24, help="fits")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        take_part(given.rank, given.port, given.most)
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--most", str(given.most), "--port", str(port)]
    command = [sys.executable, "-m", "tests.emulated_cuda.sharded_fits", *words]
    environment = {**os.environ, "EMULATED_CUDA_DEVICES": "2"}
    processes = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(2)]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
