"""Runs of several processes: the training of one process, within the budget on every rank, however it is started."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.distributed.launching import (
    GPT,
    TWO,
    equal_bits,
    finish,
    losses,
    metrics,
    run,
    start,
    torchrun,
    weights,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def test_two_processes_train_like_one_with_and_without_a_plan() -> None:
    steps = [*GPT, "--steps", "6"]
    run(*steps, "--mark", "one")
    run(*steps, *TWO, "--mark", "plain")
    ended = run(*steps, *TWO, "--mark", "planned", "--memory", "1250KiB", "--json")
    assert losses("plain") == pytest.approx(losses("one"), rel=1e-5)
    assert losses("planned") == losses("plain")  # to the last bit
    assert equal_bits(weights("planned"), weights("plain"))
    assert weights("one").keys() == weights("plain").keys()
    found = json.loads(ended.out)
    assert found["processes"] == 2
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < found["plain_peak_bytes"]
    assert found["eval"]["loss"] == pytest.approx(metrics("one")[-1]["eval"]["loss"], rel=1e-4)
    assert [path.name for path in Path("runs/python-source").iterdir()].count("planned") == 1


def test_torchrun_uneven_batches_microbatches_and_a_resume() -> None:
    """101 samples in batches of 8 on 3 processes: 5 are left for the last, and every part has another size."""
    Path("text.txt").write_bytes(bytes(range(256)) * 13)  # held out: the last tenth
    words = [*GPT, "--dataset", "text.txt", "--sequence-length", "29", "--epochs", "2"]
    ended = run(*words, "--mark", "one", "--json")
    total = json.loads(ended.out)["steps"]
    run(*words, "--mark", "three", "--microbatch-size", "2", command=torchrun(3))
    one, three = (metrics(mark, "text") for mark in ("one", "three"))
    assert [line["step"] for line in three] == list(range(1, total + 1))
    assert [line["loss"] for line in three] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    run(*[*words[:-2], "--steps", str(total // 2)], "--mark", "parts", "--microbatch-size", "2", command=torchrun(3))
    run(*[*words[:-2], "--steps", str(total)], "--mark", "parts", "--microbatch-size", "2", "--resume", "auto",
        command=torchrun(3))  # fmt: skip
    assert [line["loss"] for line in metrics("parts", "text")] == [line["loss"] for line in three]


def test_a_signal_to_the_starter_saves_once_and_ends_all() -> None:
    process = start(*GPT, *TWO, "--steps", "100000", "--mark", "signal", "--log-every", "5")
    path = Path("runs/python-source/signal/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    ended = finish(process, 60)
    assert ended.code == 143, ended.err
    assert ended.err.count("the checkpoint is written") == 1
    assert (path.parent / "checkpoints" / "latest" / "training.pt").exists()
    assert "Traceback" not in ended.err
    run(*GPT, *TWO, "--steps", str(metrics("signal")[-1]["step"] + 60), "--mark", "signal", "--resume", "auto",
        "--log-every", "5")  # fmt: skip
