"""Row 23, "save hangs": what decides about saving and stopping is the metric of all processes, in all of them.

Each judges another part of the held-out data, so their own metrics differ; with an odd number of batches one of the
two even has more of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, metrics, run, torchrun


@pytest.mark.usefixtures("own_folder")
def test_early_stop_and_best_checkpoint() -> None:
    words = [*GPT, "--steps", "60", "--eval-every", "2", "--eval-samples", "7", "--early-stop", "2", "--lr", "0.3",
             "--save-every", "1000"]  # fmt: skip
    ended = run(*words, "--mark", "two", "--json", command=torchrun(2))
    found = json.loads(ended.out)
    assert found["stopped_early"]
    judged = {line["step"]: line["eval"]["loss"] for line in metrics("two") if "eval" in line}
    assert judged[found["best_step"]] == min(judged.values()) == found["best"]
    assert len(judged) == list(judged).index(found["best_step"]) + 3  # two without a better one
    best = Path("runs/python-source/two/checkpoints/best").resolve().name
    assert best == f"step-{found['best_step']:08d}"
