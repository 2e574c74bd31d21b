"""What the trainer's loop costs beside a loop written by hand: same model, data, order, optimizer; no budget.

    python -m benchmarks.trainer_throughput [MODEL ...] [--rounds 15] [--steps 20] [--output FILE.md]

Rounds are interleaved in one process, and the ratio is of medians.  Hugging Face's `Trainer` is measured, too, where it
and accelerate are installed.  The second table is the time from the start of the program to the end of a run of one
step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.train import TrainConfig, build, resolve
from recollect.train.data.loader import to_device
from recollect.train.loop import plan_run
from recollect.train.stepping import Stepper

MODELS = ("gpt-tiny", "gpt", "resnet-tiny", "lstm-tiny")


def rival_loop(name: str, steps: int) -> Callable[[], None]:
    """Steps of a loop as people write it."""
    work = build(*resolve(TrainConfig(model=name)))
    loader = torch.utils.data.DataLoader(
        [work.data.samples[number] for step in range(steps) for number in work.order.indices(step)],  # type: ignore[arg-type]
        batch_size=16,
    )

    def run() -> None:
        for batch in loader:
            work.optimizer.zero_grad(set_to_none=False)
            loss: Tensor = work.task.loss(work.model, to_device(batch, work.device))
            loss.backward()
            work.optimizer.step()

    return run


def own_loop(name: str, steps: int) -> Callable[[], None]:
    """Steps as `recollect train` takes them between two logged ones."""
    config, source = resolve(TrainConfig(model=name))
    work = build(config, source)
    applied, _ = plan_run(config, work, None, 0, steps)
    stepper = Stepper(work=work, applied=applied, scaler=None)

    def run() -> None:
        for parts in work.loader.stream(0, steps):
            stepper.take(parts)

    return run


def transformers_loop(name: str, steps: int, folder: str) -> Callable[[], None] | None:
    """The same steps by Hugging Face's Trainer; None if it is not installed."""
    try:
        from transformers import Trainer, TrainingArguments
        from transformers.utils import is_accelerate_available
    except ModuleNotFoundError:
        return None
    if not is_accelerate_available():
        return None
    work = build(*resolve(TrainConfig(model=name)))

    class OwnLoss(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            loss: Tensor = work.task.loss(model, inputs)
            return loss

    def run() -> None:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=16, max_steps=steps, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        OwnLoss(
            model=work.model,
            args=arguments,
            train_dataset=work.data.samples,
            data_collator=work.data.collate,
            optimizers=(work.optimizer, None),
        ).train()

    return run


def first_step_seconds(name: str, folder: str) -> float:
    """From the start of `recollect train` to its end after one step."""
    words = ["train", "--model", name, "--steps", "1", "--root-path", folder, "--mark", str(time.monotonic_ns())]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "recollect", *words], check=True, capture_output=True)
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
        f"rounds of {options.steps} steps; `python -m benchmarks.trainer_throughput {words}`.",
        "",
        "| model | by hand, ms a step | recollect | steps per second against by hand | Hugging Face Trainer |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models or MODELS:
            loops = {"hand": rival_loop(name, options.steps), "recollect": own_loop(name, options.steps)}
            if name != "gpt":
                trainer = transformers_loop(name, options.steps, folder)
                if trainer is not None:
                    loops["transformers"] = trainer
            times: dict[str, list[float]] = {loop: [] for loop in loops}
            for _ in range(options.rounds):
                for loop, run in loops.items():
                    began = time.perf_counter()
                    run()
                    times[loop].append((time.perf_counter() - began) * 1e3 / options.steps)
            ms = {loop: statistics.median(found) for loop, found in times.items()}
            other = f"{ms['transformers']:.2f}" if "transformers" in ms else "not installed, or not measured"
            lines.append(
                f"| {name} | {ms['hand']:.2f} | {ms['recollect']:.2f} | {ms['hand'] / ms['recollect']:.3f} | {other} |"
            )
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
