"""`tightfit train` on a GPU: budget, resume, half precision with scaled gradients, and the same bits twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.registry import Report, check
from tightfit import Plan

_ROOT = Path(__file__).parents[3]
_TRAIN = ["train", "--model", "gpt", "--dataset", "python-source", "--log-every", "5", "--save-every", "10"]
#: Short: one evaluation at the end, of few samples.
_TRAIN += ["--eval-samples", "32", "--batch-size", "32"]


@check("command-line", place=13, seconds=90, shows="`tightfit train`: auto and half, resume, fp16, deterministic twice")
def command_line(report: Report) -> None:
    """Run the trainer as a user does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        auto = _train(report, folder, "auto", "--steps", "10")
        resumed = _train(report, folder, "auto", "--steps", "20", "--resume", "auto", case="auto, resumed")
        report.claim(
            "auto, resumed", "it goes on where the first run ended",
            [m["step"] for m in resumed] == [*(m["step"] for m in auto), 11, 15, 20],
            steps=[m["step"] for m in resumed],
        )  # fmt: skip
        (plan,) = folder.glob("*/auto/plan.json")
        context_bytes = Plan.load(plan).breakdown.get("context", 0)
        _train(report, folder, "half", "--steps", "10", "--memory", _half_of(auto, context_bytes))
        _train(report, folder, "fp16", "--steps", "10", "--precision", "fp16")
        twice = [
            _train(report, folder, f"deterministic-{number}", "--steps", "10", "--deterministic") for number in (1, 2)
        ]
        losses = [[metrics["loss"] for metrics in run] for run in twice]
        report.claim("deterministic", "two runs have the same losses", losses[0] == losses[1], needs_results=True)


def _train(report: Report, folder: Path, mark: str, *arguments: str, case: str = "") -> list[dict[str, Any]]:
    """Run one training and return its logged steps."""
    case = case or mark
    done = subprocess.run(
        [sys.executable, "-m", "tightfit", *_TRAIN, "--mark", mark, "--root-path", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr, flush=True)  # into the check's log
    metrics = []
    for file in folder.glob(f"*/{mark}/metrics.jsonl"):
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    within = all(m["peak_bytes"] <= m["budget_bytes"] for m in metrics if m.get("peak_bytes") and m.get("budget_bytes"))
    report.note(case, code=done.returncode, last=metrics[-1] if metrics else None)
    says = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    report.claim(case, "the run ends well", done.returncode == 0 and bool(metrics), says=says)
    report.claim(case, "every logged step is within the budget", within)
    return metrics


def _half_of(metrics: list[dict[str, Any]], context_bytes: int) -> str:
    """Return six tenths of what a run without a tight budget held beside the context: a part of it is resident."""
    highest_bytes = max((m["peak_bytes"] for m in metrics), default=2**30)
    return f"{int(0.6 * (highest_bytes - context_bytes)) // 2**20}MiB+context"
