"""2,000 training steps on batches of random length, with validation in between: is the budget kept in every one?

    python benchmarks/random_lengths.py [STEPS]

A transformer is fitted once, to a batch of middling length, with a budget that the longest batch can just be trained
in.  Every step is metered by PyTorch's profiler, which shares no code with the prediction; shapes are planned before
the meter starts, because a process can run one profiler at a time.  Every 50th step's loss and gradients are compared
bit for bit with those of the plain step, and validation runs.  Written to stdout as Markdown.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import tightfit
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.solver.solver import Solver
from tightfit.step.step import Step
from tightfit.train.models.gpt import Gpt, GptConfig
from tightfit.units import format_bytes

SHORTEST, MIDDLE, LONGEST = 33, 96, 160
BATCH, INCOMPLETE_BATCH, WORDS = 8, 5, 128
CHECK_EVERY = 50


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch_of(length: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(0, WORDS, (size, length + 1), generator=generator)


def resident_process_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def left_behind(model: torch.nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Loss and gradients from a fixed seed."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=False)
    value = loss()
    value.backward()
    return [value.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    torch.manual_seed(0)
    model = Gpt(GptConfig(vocabulary_size=WORDS, sequence_length=LONGEST, width=64, layers=3))
    optimizer = torch.optim.AdamW(model.parameters())
    spec = Step(loss=loss_of, optimizer=(optimizer,))
    longest = Solver(tightfit.measure(model, batch_of(LONGEST, BATCH), loss=loss_of, optimizer=optimizer))
    smallest, plain_bytes = longest.minimum_budget()[0], longest.plain(0).plain_peak_bytes
    budget = smallest + (plain_bytes - smallest) // 10
    began = time.perf_counter()
    applied = tightfit.fit(
        model, batch_of(MIDDLE, BATCH), budget=budget, loss=loss_of, optimizer=optimizer, reference_budget_bytes=2**40
    )
    fit_s = time.perf_counter() - began
    for parameter in model.parameters():  # steady state, as in every step but the first
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def step(batch: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        applied.loss(model, batch).backward()
        optimizer.step()

    def validate(batch: Tensor) -> None:
        model.eval()
        with torch.no_grad():
            loss_of(model, batch)
        model.train()

    numbers = random.Random(0)
    peaks: list[int] = []
    uses: list[float] = []  # of batches near the longest
    validations: list[int] = []
    unequal = compared = 0
    step_s = prepare_s = late_prepare_s = 0.0
    shapes: set[tuple[int, ...]] = set()
    grown_from = 0
    for number in range(steps):
        size = INCOMPLETE_BATCH if numbers.random() < 0.05 else BATCH
        batch = batch_of(numbers.randint(SHORTEST, LONGEST), size)
        shapes.add(tuple(batch.shape))
        began = time.perf_counter()
        applied.prepare(batch)
        elapsed = time.perf_counter() - began
        prepare_s += elapsed
        late_prepare_s += elapsed if number >= steps // 2 else 0.0
        resident = resident_bytes(model, batch, optimizer)
        began = time.perf_counter()
        _, peak = measure_peak(lambda batch=batch: step(batch), resident)
        step_s += time.perf_counter() - began
        peaks.append(peak)
        if batch.shape[1] > 0.9 * LONGEST and size == BATCH:
            uses.append(peak / budget)
        if number % CHECK_EVERY == 0:
            compared += 1
            planned = left_behind(model, lambda batch=batch: applied.loss(model, batch))
            with applied.paused():
                plain = left_behind(model, lambda batch=batch: loss_of(model, batch))
            unequal += not all(torch.equal(a, b) for a, b in zip(planned, plain, strict=True))
            validation = batch_of(LONGEST, BATCH)
            resident = resident_bytes(model, validation, optimizer)
            validations.append(measure_peak(lambda batch=validation: validate(batch), resident)[1])
        if number == steps // 2:
            gc.collect()
            grown_from = resident_process_bytes()
    gc.collect()
    grown = resident_process_bytes() - grown_from
    counts = applied.plans.statistics
    over = sum(peak > budget for peak in peaks)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; {spec.optimizers[0].__class__.__name__}\n")
    print("| | |\n|---|---|")
    print(f"| steps, of which metered | {steps}, {len(peaks)} |")
    print(f"| distinct shapes (lengths {SHORTEST} to {LONGEST}, batches of {BATCH} and {INCOMPLETE_BATCH}) "
          f"| {len(shapes)} |")  # fmt: skip
    print(f"| plain peak of the longest batch, predicted | {format_bytes(plain_bytes)} |")
    print(f"| budget | {format_bytes(budget)} |")
    print(f"| highest peak | {format_bytes(max(peaks))}, {max(peaks) / budget:.2%} of the budget |")
    print(f"| steps above the budget | {over} |")
    print(f"| use of the budget by batches within 10 % of the longest, mean | {sum(uses) / max(1, len(uses)):.2%} |")
    print(f"| highest peak of validation | {format_bytes(max(validations))} |")
    print(f"| steps compared with plain, unequal | {compared}, {unequal} |")
    print(f"| fit | {fit_s:.1f} s |")
    print(f"| planning other shapes, first and second half of the steps | {prepare_s - late_prepare_s:.1f} s, "
          f"{late_prepare_s:.1f} s |")  # fmt: skip
    print(f"| per shape | {counts.planning_ms / max(1, len(shapes)):.0f} ms |")
    print(f"| metered steps | {step_s:.1f} s |")
    print(f"| plans: reused, solved, plain, run under the meter | {counts.reused}, {counts.solved}, {counts.plain}, "
          f"{counts.tried} |")  # fmt: skip
    print(f"| steps that did not follow their plan, calls without a plan | {counts.mismatched_steps}, "
          f"{counts.unplanned_calls} |")  # fmt: skip
    print(f"| plans kept, forgotten | {len(applied.plans)}, {counts.forgotten} |")
    print(f"| growth of the process in the second half | {format_bytes(max(0, grown))} |")
    sys.exit(1 if over or unequal else 0)


if __name__ == "__main__":
    main()
