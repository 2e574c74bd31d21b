"""What saving costs the steps: none, while they go on, and waited for.

    python -m benchmarks.saving [--model gpt-tiny] [--rounds 9] [--steps 50] [--batch-size 16] [--output FILE.jsonl]

Blocks of steps are interleaved in one process.  Those of two kinds begin with a checkpoint, as `--save-every` has it at
that interval; a block's time is from before the save to the end of its last step.  A ratio is the median, with the
quartiles, over rounds; bytes are those of a checkpoint.  By the clock it is to be `LIMIT` at most while steps go on:
`--check` makes that the exit code, for a quiet machine.  Processor time, with that of the thread that writes, tells
more than wall time on a machine that does other work, too; it leaves out what waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tightfit.report.reporter import Reporter
from tightfit.train import TrainConfig, build, resolve
from tightfit.train.checkpoint import Retention
from tightfit.train.checkpoint_writer import CheckpointWriter, copy_room_bytes
from tightfit.train.ema import MovingAverage
from tightfit.train.loop import OptimizerStep
from tightfit.train.precision import make_scaler
from tightfit.train.progress import Progress
from tightfit.train.run_plan import plan_run

#: Of a step with saving every 50 steps to one without, by the clock.
LIMIT = 1.03
KINDS = ("none", "while steps go on", "waited for")


def measure(
    model: str, rounds: int, steps: int, batch_size: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Return seconds of each block, by kind, of the clock and of processors, and the bytes of a checkpoint."""
    config, source = resolve(TrainConfig(model=model, batch_size=batch_size))
    work = build(config, source)
    average = MovingAverage(work.model, None)
    applied, budget = plan_run(config, work, average, 0, steps)
    scaler = make_scaler(config.precision, work.device)
    step = OptimizerStep(work=work, applied=applied, scaler=scaler, model=work.model)
    checkpoints = CheckpointWriter(
        folder=folder / "checkpoints",
        work=work,
        average=average,
        scaler=scaler,
        progress=Progress(loss_before=0.0),
        identity={},
        retention=Retention(last=2),
        metrics=None,
        reporter=Reporter(quiet=True),
        room_bytes=copy_room_bytes(applied.plan, budget, work.device),
    )
    batches = [work.microbatches(number) for number in range(steps)]
    step.take(batches[0])
    wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    done = 0
    for number in range(rounds):
        for turn in range(len(KINDS)):
            kind = KINDS[(number + turn) % len(KINDS)]
            checkpoints.finish()
            begin, begin_processor = time.perf_counter(), time.process_time()
            if kind != "none":
                done += 1
                assert checkpoints.save(done, is_best=False, may_go_on=kind != "waited for") is None
                if kind == "while steps go on":
                    assert checkpoints.last_step != done, "there is no room for a copy: give more memory"
            for batch in batches:
                step.take(batch)
                checkpoints.look()
            wall[kind].append(time.perf_counter() - begin)
            processor[kind].append(time.process_time() - begin_processor)
    checkpoints.finish()
    nbytes = sum(path.stat().st_size for path in (folder / "checkpoints/latest/").iterdir())
    applied.remove()
    return wall, processor, nbytes


def quartiles(ratios: list[float]) -> list[float]:
    """The lower one, the median and the upper one."""
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50, help="of a block: one checkpoint for so many steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--check", action="store_true", help="end with 1 if saving while steps go on costs more than the limit"
    )
    parser.add_argument("--output", type=Path, help="a file for one line of JSON for each block")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wall, processor, nbytes = measure(given.model, given.rounds, given.steps, given.batch_size, Path(folder))
    print(f"{given.model}, {given.rounds} rounds of {given.steps} steps, checkpoints of {nbytes / 2**20:.1f} MiB, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    for kind in KINDS:
        line = f"  {kind:<20}"
        for what, seconds in (("wall", wall), ("processor", processor)):
            low, middle, high = quartiles([a / b for a, b in zip(seconds[kind], seconds["none"], strict=True)])
            each_ms = statistics.median(seconds[kind]) / given.steps * 1e3
            line += f"{each_ms:9.2f} ms a step of {what} time, {middle:.3f} ({low:.3f} to {high:.3f})"
        print(line)
    found = quartiles([a / b for a, b in zip(wall["while steps go on"], wall["none"], strict=True)])[1]
    is_kept = found <= LIMIT
    print(f"  while steps go on, by the clock: {found:.3f}, of {LIMIT} at most: {'kept' if is_kept else 'NOT kept'}")
    if given.output is not None:
        lines = [
            {"kind": kind, "wall_s": one, "processor_s": another}
            for kind in KINDS
            for one, another in zip(wall[kind], processor[kind], strict=True)
        ]
        given.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 1 if given.check and not is_kept else 0


if __name__ == "__main__":
    sys.exit(main())
