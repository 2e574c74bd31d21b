"""What the trainer's loop costs beside others: same model, data, optimizer; no budget.

    python -m benchmarks.trainer_throughput [MODEL ...] [--rounds 15] [--steps 20] [--output FILE.md]

The loops are one written by hand, `tightfit train`'s between two logged steps, Hugging Face's `Trainer` and
Lightning's; the last two where they are installed (`make bench` installs them), without logging, checkpoints or
progress.  Rounds are interleaved in one process; a loop's time is from the end of its first step to the end of its
last, and the ratio is of medians.  The second table is the time from the start of the program to the end of a run of
one step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.loops import Loop, by_hand, by_trainer
from tightfit.train import TrainConfig, Workload, build, resolve
from tightfit.train.ema import MovingAverage
from tightfit.train.loop import OptimizerStep
from tightfit.train.precision import make_scaler
from tightfit.train.run_plan import plan_run

MODELS = ("gpt-tiny", "gpt", "resnet-tiny", "resnet", "lstm-tiny", "lstm")
_BATCH = 16


def _loader(work: Workload, steps: int) -> DataLoader[Any]:
    """Of the samples of these steps, in their order."""
    samples: Any = [work.data.samples[number] for step in range(steps) for number in work.order.indices(step)]
    return DataLoader(samples, batch_size=_BATCH)


def loop_by_hand(name: str, steps: int) -> Loop:
    """As people write it."""
    work = build(*resolve(TrainConfig(model=name, batch_size=_BATCH)))
    return by_hand(work, work.model, _loader(work, steps))


def own_loop(name: str, steps: int) -> Loop:
    """As `tightfit train` takes steps between two logged ones."""
    config, source = resolve(TrainConfig(model=name, batch_size=_BATCH))
    work = build(config, source)
    applied, _ = plan_run(config, work, MovingAverage(work.model, None), 0, steps)
    scaler = make_scaler(config.precision, work.device)
    return by_trainer(OptimizerStep(work=work, applied=applied, scaler=scaler, model=work.model), steps)


def transformers_loop(name: str, steps: int, folder: str) -> Loop | None:
    """Hugging Face's Trainer; None if it is not installed."""
    try:
        import accelerate  # noqa: F401  # transformers asks for it late
        from transformers import Trainer, TrainerCallback, TrainingArguments
    except ModuleNotFoundError:
        return None
    work = build(*resolve(TrainConfig(model=name, batch_size=_BATCH)))

    class OwnLoss(Trainer):  # type: ignore[misc]  # untyped
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            loss: Tensor = work.task.loss(model, inputs["batch"])  # it takes mappings only
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc]  # untyped
        ends: list[float]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def run() -> list[float]:
        clock = Clock()
        clock.ends = []
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=_BATCH, max_steps=steps, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, max_grad_norm=0.0,
        )  # fmt: skip
        OwnLoss(
            model=work.model,
            args=arguments,
            train_dataset=work.data.samples,
            data_collator=lambda samples: {"batch": work.data.collate(samples)},
            optimizers=(work.optimizer, None),
            callbacks=[clock],
        ).train()
        return clock.ends

    return run


def lightning_loop(name: str, steps: int) -> Loop | None:
    """Lightning's Trainer; None if it is not installed."""
    try:
        import lightning
    except ModuleNotFoundError:
        return None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    work = build(*resolve(TrainConfig(model=name, batch_size=_BATCH)))
    loader = _loader(work, steps)

    class Wrapped(lightning.LightningModule):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()
            self.inner = work.model

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = work.task.loss(self.inner, batch)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer

    class Clock(lightning.Callback):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    def run() -> list[float]:
        clock = Clock()
        lightning.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
        ).fit(Wrapped(), loader)  # fmt: skip
        return clock.ends

    return run


def first_step_seconds(name: str, folder: str) -> float:
    """From the start of `tightfit train` to its end after one step."""
    words = ["train", "--model", name, "--steps", "1", "--root-path", folder, "--mark", str(time.monotonic_ns())]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tightfit", *words], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="The trainer's loop against others, without a budget.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    words = " ".join([*options.models, "--rounds", str(options.rounds), "--steps", str(options.steps)])
    lines = [
        "# The trainer's loop against others, without a budget",
        "",
        f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; medians of {options.rounds} interleaved "
        f"rounds of {options.steps} steps of {_BATCH} samples; `python -m benchmarks.trainer_throughput {words}`.",
        "",
        "Milliseconds a step; in brackets, steps per second against the loop by hand.",
        "",
        "| model | by hand | tightfit | Hugging Face Trainer | Lightning |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models or MODELS:
            loops: dict[str, Loop | None] = {
                "hand": loop_by_hand(name, options.steps),
                "tightfit": own_loop(name, options.steps),
                "transformers": transformers_loop(name, options.steps, folder),
                "lightning": lightning_loop(name, options.steps),
            }
            times: dict[str, list[float]] = {loop: [] for loop in loops}
            for _ in range(options.rounds):
                for loop, run in loops.items():
                    if run is not None:
                        ends = run()
                        times[loop].append((ends[-1] - ends[0]) * 1e3 / (len(ends) - 1))
            ms = {loop: statistics.median(found) for loop, found in times.items() if found}
            cells = [
                f"{ms[loop]:.2f} ({ms['hand'] / ms[loop]:.3f})" if loop in ms else "not installed" for loop in loops
            ]
            lines.append(f"| {name} | {ms['hand']:.2f} | {' | '.join(cells[1:])} |")
            print(lines[-1], flush=True)
        lines += ["", "| model | program start to the end of a run of one step, s |", "|---|---|"]
        for name in options.models or MODELS:
            seconds = statistics.median(first_step_seconds(name, folder) for _ in range(3))
            lines.append(f"| {name} | {seconds:.1f} |")
            print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
