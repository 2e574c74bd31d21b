"""What training in two processes costs beside a script written by hand, and how long each way to start takes.

    python -m benchmarks.distributed_throughput [MODEL ...] [--rounds 9] [--steps 15] [--output FILE.md]

Both loops run in the same two processes, in interleaved rounds, each as often first as second: one as people write it
(DistributedDataParallel or `fully_shard`, a DataLoader for each process's part of every batch), one that takes steps as
`tightfit train` does between two logged ones.  No budget.  A loop's time is from the end of its first step to the end
of its last, of the slower process; the ratio is of medians.  The second table is the time from the start of the program
to the end of a run of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from benchmarks.loops import Loop, by_hand, by_trainer
from tightfit.distributed.process_group import ProcessGroup
from tightfit.train import TrainConfig, Workload, build, resolve
from tightfit.train.ema import MovingAverage
from tightfit.train.launch.rendezvous import process_group
from tightfit.train.launch.roles import Member, find_role
from tightfit.train.loop import OptimizerStep
from tightfit.train.parallel.ddp import data_parallel
from tightfit.train.parallel.unused_parameters import UnusedParameters
from tightfit.train.precision import make_scaler
from tightfit.train.run_plan import plan_run

MODELS = ("gpt", "resnet", "lstm")
STRATEGIES = ("ddp", "fsdp")
_BATCH = 32
_PROCESSES = 2
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(_PROCESSES), "-m"]


def loop_by_hand(work: Workload, group: ProcessGroup, steps: int, strategy: str) -> Loop:
    """As people write it."""
    model = work.model if strategy == "fsdp" else DistributedDataParallel(work.model, gradient_as_bucket_view=True)
    size = _BATCH // group.world_size
    numbers = [number for step in range(steps) for number in work.order.indices(step)]
    mine = [n for place in range(group.rank * size, len(numbers), _BATCH) for n in numbers[place : place + size]]
    loader = DataLoader([work.data.samples[number] for number in mine], batch_size=size)
    return by_hand(work, model, loader)


def own_loop(config: TrainConfig, work: Workload, group: ProcessGroup, steps: int) -> Loop:
    """As `tightfit train` takes steps between two logged ones."""
    applied, _ = plan_run(config, work, MovingAverage(work.model, None), 0, steps)
    model = data_parallel(work.model, group, work.device, unused=UnusedParameters.NONE)
    scaler = make_scaler(config.precision, work.device)
    return by_trainer(OptimizerStep(work=work, applied=applied, scaler=scaler, model=model), steps)


def compare(name: str, strategy: str, rounds: int, steps: int) -> None:
    """In each of the processes; rank 0 prints the two medians in ms."""
    config, source = resolve(TrainConfig(model=name, batch_size=_BATCH, strategy=strategy))
    role = find_role(config, os.environ, 0)
    assert isinstance(role, Member)
    torch.set_num_threads(1)
    with process_group(role, backend="gloo", device=torch.device("cpu"), timeout_s=300) as group:
        works = [build(config, source, group, sharded=strategy == "fsdp") for _ in range(2)]
        loops = {
            "hand": loop_by_hand(works[0], group, steps, strategy),
            "tightfit": own_loop(config, works[1], group, steps),
        }
        times: dict[str, list[float]] = {loop: [] for loop in loops}
        for turn in range(rounds + 1):
            for loop in sorted(loops, reverse=turn % 2 == 1):  # what runs second finds other caches
                ends = loops[loop]()
                slowest = max(group.all_gather((ends[-1] - ends[0]) * 1e3 / (len(ends) - 1)))
                if turn:  # DDP makes its buckets anew after the first step
                    times[loop].append(slowest)
        if group.is_main_process:
            print(json.dumps({loop: statistics.median(found) for loop, found in times.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two processes, beside a script by hand.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.strategy is not None:
        compare(options.models[0], options.strategy, options.rounds, options.steps)
        return
    words = " ".join([*options.models, "--rounds", str(options.rounds), "--steps", str(options.steps)])
    lines = [
        "# Training in two processes, beside a script written by hand",
        "",
        f"{os.cpu_count()} CPU cores, one thread a process, gloo, PyTorch {torch.__version__}; medians of "
        f"{options.rounds} interleaved rounds of {options.steps} steps of {_BATCH} samples (of both processes); "
        f"`python -m benchmarks.distributed_throughput {words}`.",
        "",
        "| model | strategy | by hand, ms a step | tightfit, ms a step | steps per second against by hand |",
        "|---|---|---|---|---|",
    ]
    for name in options.models or MODELS:
        for strategy in STRATEGIES:
            said = subprocess.run(
                [*_TORCHRUN, "benchmarks.distributed_throughput", name, "--strategy", strategy, "--rounds",
                 str(options.rounds), "--steps", str(options.steps)],
                check=True, capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"},
            ).stdout  # fmt: skip
            ms = json.loads(said.splitlines()[-1])
            ratio = ms["hand"] / ms["tightfit"]
            lines.append(f"| {name} | {strategy} | {ms['hand']:.1f} | {ms['tightfit']:.1f} | {ratio:.3f} |")
            print(lines[-1], flush=True)
    lines += ["", "| started by | program start to the end of a run of one step of gpt-tiny, s |", "|---|---|"]
    several = ["--multiprocessing-distributed", "--nproc-per-node", "2"]
    ways: dict[str, tuple[list[str], list[str]]] = {
        "one process": ([sys.executable, "-m", "tightfit"], []),
        "--multiprocessing-distributed, 2 processes": ([sys.executable, "-m", "tightfit"], several),
        "the same, --strategy fsdp": ([sys.executable, "-m", "tightfit"], [*several, "--strategy", "fsdp"]),
        "torchrun, 2 processes": ([*_TORCHRUN, "tightfit"], []),
    }
    with tempfile.TemporaryDirectory() as folder:
        for way, (command, flags) in ways.items():
            seconds = statistics.median(_timed(command, flags, folder) for _ in range(3))
            lines.append(f"| {way} | {seconds:.1f} |")
            print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _timed(command: list[str], flags: list[str], folder: str) -> float:
    options = ["train", "--model", "gpt-tiny", "--steps", "1", "--eval-samples", "8", "--root-path", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    began = time.perf_counter()
    subprocess.run(
        [*command, *options, "--mark", str(time.monotonic_ns()), *flags],
        check=True, capture_output=True, env=environment,
    )  # fmt: skip
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
