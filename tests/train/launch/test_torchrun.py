"""Train under torchrun with the flags of PyTorch's ImageNet example: one folder, one writer, one decision.

"Every process on GPU 0", and every one writes: https://github.com/pytorch/examples/issues/969 and
https://github.com/pytorch/pytorch/issues/23138.  That each process takes the GPU of its local rank is tested in
test_roles.py.

"Save hangs", https://github.com/huggingface/accelerate/issues/2000: what decides about saving and stopping is the
metric of all processes, in all of them.  Each evaluates another part of the held-out data, so their own metrics differ;
with an odd number of batches one of the two even has more of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.launch.launching import GPT, metrics, run, torchrun


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_one_writer_and_one_decision() -> None:
    flags = ["--dist-url", "env://", "--dist-backend", "gloo", "--world-size", "-1", "--rank", "-1"]
    words = ["--steps", "60", "--eval-every", "2", "--eval-samples", "7", "--early-stop", "2", "--lr", "0.3",
             "--save-every", "1000"]  # fmt: skip
    ended = run(*GPT, *flags, *words, "MODEL.DIST_TRAIN", "True", "--mark", "two", "--json", command=torchrun(2))
    folder = Path("runs/python-source/two")
    assert [path.name for path in folder.parent.iterdir()] == ["two"]
    assert [line["step"] for line in metrics("two")] == list(range(1, len(metrics("two")) + 1))
    assert (folder / "log.txt").read_text().count("model   gpt-tiny") == ended.err.count("model   gpt-tiny") == 1
    assert "one process only" not in ended.err
    found = json.loads(ended.out)
    assert found["processes"] == 2
    assert found["stopped_early"]
    evaluated = {line["step"]: line["eval"]["loss"] for line in metrics("two") if "eval" in line}
    assert evaluated[found["best_step"]] == min(evaluated.values()) == found["best"]
    assert len(evaluated) == list(evaluated).index(found["best_step"]) + 3  # two without a better one
    assert (folder / "checkpoints" / "best").resolve().name == f"step-{found['best_step']:08d}"
