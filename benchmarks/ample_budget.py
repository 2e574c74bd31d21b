"""With a budget that plain fits, nothing is installed: does a step then cost what a plain step costs?

    python benchmarks/ample_budget.py

For each built-in model: `Applied.loss` under an ample budget against the bare loss function, forward and backward,
interleaved in one process; the ratio of medians, and the spread of the paired ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import tightfit
from tightfit.train import TrainConfig, build, resolve

ROUNDS = 40


def milliseconds(step: Callable[[], torch.Tensor]) -> float:
    begin = time.perf_counter()
    step().backward()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} interleaved rounds")
    print("| model | installed | plain ms | under an ample budget ms | ratio of medians | paired ratios, quartiles |")
    print("|---|---|---|---|---|---|")
    for name in ("gpt-tiny", "resnet-tiny", "lstm-tiny"):
        config, source = resolve(TrainConfig(model=name))
        work = build(config, source)
        batch = work.microbatch(0).batch
        applied = tightfit.fit(work.model, batch, budget="75%", loss=work.task.loss, optimizer=work.optimizer)
        plain_ms, ample_ms = [], []
        for _ in range(ROUNDS):
            plain_ms.append(milliseconds(lambda work=work, batch=batch: work.task.loss(work.model, batch)))
            ample_ms.append(milliseconds(lambda work=work, batch=batch, on=applied: on.loss(work.model, batch)))
        plain, ample = statistics.median(plain_ms), statistics.median(ample_ms)
        low, _, high = statistics.quantiles([a / p for a, p in zip(ample_ms, plain_ms, strict=True)], n=4)
        print(
            f"| {name} | {'something' if applied.installed else 'nothing'} | {plain:.2f} | {ample:.2f} | "
            f"{ample / plain:.3f} | {low:.3f} to {high:.3f} |"
        )
        applied.remove()


if __name__ == "__main__":
    main()
