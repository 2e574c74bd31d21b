"""Runs of several processes: the training of one process, within the budget on every rank, however it is started."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.train.launch.launching import (
    GPT,
    TWO,
    alone,
    clients_beside,
    equal_bits,
    finish,
    free_port,
    logged,
    losses,
    metrics,
    run,
    start,
    torchrun,
    weights,
)

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.slow
def test_two_processes_train_like_one_with_and_without_a_plan() -> None:
    """Without one, by two starters that meet at an address, as on two nodes; with one, by a single starter."""
    steps = [*GPT, "--steps", "6"]
    alone(*steps, "--mark", "one")
    flags = ["--multiprocessing-distributed", "--nproc-per-node", "1", "--world-size", "2", "--mark", "plain"]
    rendezvous = ["--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    nodes = [start(*steps, *flags, *rendezvous, "--rank", rank) for rank in ("0", "1")]
    assert [ended.code for ended in map(finish, nodes)] == [0, 0]
    ended = run(*steps, *TWO, "--mark", "planned", "--memory", "1250KiB", "--json")
    assert losses("plain") == pytest.approx(losses("one"), rel=1e-5)
    assert losses("planned") == losses("plain")  # to the last bit
    assert equal_bits(weights("planned"), weights("plain"))
    assert weights("one").keys() == weights("plain").keys()
    found = json.loads(ended.out)
    assert found["processes"] == 2
    assert found["mismatched_steps"] == 0
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < found["plain_peak_bytes"]
    assert found["eval"]["loss"] == pytest.approx(metrics("one")[-1]["eval"]["loss"], rel=1e-4)
    assert sorted(path.name for path in Path("runs/python-source").iterdir()) == ["one", "plain", "planned"]


@pytest.mark.slow
def test_torchrun_uneven_batches_microbatches_and_a_resume() -> None:
    """103 samples in batches of 9 on 2 processes: no batch can be shared evenly, and the last of an epoch has 4."""
    Path("text.txt").write_bytes(bytes(range(256)) * 13)  # held out: the last tenth
    words = [*GPT, "--dataset", "text.txt", "--sequence-length", "29", "--batch-size", "9"]
    parts = [*words, "--microbatch-size", "2", "--log-every", "1"]
    alone(*words, "--mark", "one", "--steps", "14")
    run(*parts, "--mark", "two", "--steps", "14", "--save-every", "7", command=torchrun(2))
    one, two = (metrics(mark, "text") for mark in ("one", "two"))
    assert [line["epoch"] for line in two] == [0] * 12 + [1] * 2
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    middle = "runs/text/two/checkpoints/step-00000007"
    run(*parts, "--mark", "rest", "--steps", "14", "--resume", middle, command=torchrun(2))
    rest = [line["loss"] for line in metrics("rest", "text")]
    assert rest[-7:] == [line["loss"] for line in two[7:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    # The second is not among those that PyTorch's agent handles.
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.exhaustive), (signal.SIGUSR1, 138)]
)  # fmt: skip
def test_a_signal_to_the_starter_saves_once_and_ends_all(number: signal.Signals, code: int) -> None:
    process = start(*GPT, *TWO, "--steps", "100000", "--mark", "signal", "--log-every", "5")
    logged(process, "python-source/signal", 2)
    os.kill(process.pid, number)
    ended = finish(process)
    assert ended.code == code, ended.err
    assert ended.err.count("the checkpoint is written") == 1
    assert Path("runs/python-source/signal/checkpoints/latest/training.safetensors").exists()
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_is_named() -> None:
    process = start(*GPT, *TWO, "--steps", "100000", "--mark", "killed", "--log-every", "5")
    logged(process, "python-source/killed", 2)
    victims = clients_beside(process)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 1
    last = ended.err.rstrip().splitlines()[-1]
    assert last.startswith(f"tightfit: rank 1 (process {victims[1]}) was killed by SIGKILL")


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    ended = finish(start(*GPT, *TWO, "--dataset", "absent.txt", "--steps", "1", TMPDIR=str(notes)))
    assert ended.code == 2
    assert ended.err.count("absent.txt") == 1
    assert "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()
    assert list(notes.iterdir()) == []
