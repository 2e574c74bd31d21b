"""Whole runs on small models."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import warm_start
from tightfit.cli.main import main
from tightfit.records import Plan
from tightfit.train.config import TrainConfig
from tightfit.train.workload import build, resolve

GPT = ["--model", "gpt-tiny", "--batch-size", "4", "--log-every", "1", "--eval-samples", "8"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_holds_what_the_contract_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GPT, "--steps", "5", "--save-every", "2", "--memory", "1GiB", "--mark", "m", "LR", "0.01"]
    assert main(["train", *words]) == 0
    out = capsys.readouterr().out
    run = Path("runs/python-source/m")
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "command.txt", "config.yaml", "environment.json", "log.txt", "metrics.jsonl",
        "model.safetensors", "plan.json", "profile.json", "report.html",
    ]  # fmt: skip
    assert (run / "command.txt").read_text() == "tightfit train " + " ".join(words) + "\n"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["lr"], config["dataset"], config["sequence_length"]) == (0.01, "python-source", 64)
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert Plan.load(run / "plan.json").budget_bytes == 2**30
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best", "latest", "step-00000002", "step-00000004", "step-00000005",
    ]  # fmt: skip
    logged = metrics(run)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5]
    assert set(logged[0]) >= {
        "step", "epoch", "loss", "lr", "step_ms", "peak_bytes", "budget_bytes", "samples_per_second",
    }  # fmt: skip
    assert all(0 < line["memory_now_bytes"] < line["peak_bytes"] <= line["budget_bytes"] == 2**30 for line in logged)
    assert "step 5/5" in out
    assert "step 5/5" in (run / "log.txt").read_text()
    for name in ("plain step", "this run", "budget", "slowdown", "gradients", "buffers", "loss"):
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name


def test_the_saved_model_is_the_trained_one() -> None:
    config = TrainConfig(model="gpt-tiny", steps=1, batch_size=2)
    assert main(["train", "--model", "gpt-tiny", "--steps", "1", "--batch-size", "2"]) == 0
    model = build(*resolve(config)).model
    saved = load_file("runs/python-source/gpt-tiny/model.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    assert torch.equal(saved["head.weight"], saved["token_embedding.weight"])
    assert not torch.equal(before["head.weight"], saved["head.weight"])


def test_json_is_one_document_and_people_read_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GPT, "--steps", "2", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["steps"] == 2
    assert document["gradients_equal"] is not False
    assert document["measured_peak_bytes"] <= document["budget_bytes"]
    assert "step 2/2" in captured.err


def test_the_loss_falls_and_the_model_is_better_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "lstm-tiny", "--steps", "60", "--lr", "0.01", "--log-every", "30", "--json"]
    assert main(["train", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["loss_after"] < 0.8 * document["loss_before"]


def test_epochs_end_with_an_incomplete_batch() -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
    words += ["--batch-size", "25", "--epochs", "2", "--log-every", "1", "--grad-checkpoint", "full"]
    assert main(["train", *words, "--mark", "m"]) == 0
    logged = metrics(Path("runs/tests.train.user_code-numbers/m"))
    assert [(line["step"], line["epoch"]) for line in logged] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    sizes = [line["samples_per_second"] * line["step_ms"] / 1000 for line in logged]
    assert sizes == pytest.approx([25, 25, 14, 25, 25, 14])


def test_a_run_that_goes_on_with_an_incomplete_batch_ends_with_the_same_weights() -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
    words += ["--batch-size", "25", "--grad-checkpoint", "full"]
    assert main(["train", *words, "--steps", "4", "--mark", "whole"]) == 0
    assert main(["train", *words, "--steps", "2", "--mark", "parts"]) == 0
    assert main(["train", *words, "--steps", "4", "--mark", "parts", "--resume", "auto"]) == 0
    whole, parts = (
        load_file(f"runs/tests.train.user_code-numbers/{mark}/model.safetensors") for mark in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
    assert main(["train", *words, "--steps", "50", "--log-every", "1", "--lr", "1e30"]) == 1
    assert "Try a smaller --lr" in capsys.readouterr().err


def test_a_finished_run_is_refused_then_continued(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GPT, "--steps", "3"]) == 0
    run = Path("runs/python-source/gpt-tiny")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", *GPT, "--steps", "3"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(["train", *GPT, "--steps", "3", "--resume", "auto"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["train", *GPT, "--steps", "5", "--resume"]) == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert (run / "command.txt").read_text().count("\n") == 2


def test_resume_auto_begins_where_nothing_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GPT, "--steps", "1", "--resume", "auto"]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (["--seed", "1"], "seed 0, but now it is 1"),
        (["--lr", "0.5"], "lr 0.001, but now it is 0.5"),
        (["--model-args", "layers=1"], "model args {}, but now it is {'layers': 1}"),
    ],
)
def test_another_run_cannot_go_on(change: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GPT, "--steps", "1", "--mark", "m"]) == 0
    assert main(["train", *GPT, "--steps", "2", "--mark", "m", "--resume", *change]) == 2
    assert what in capsys.readouterr().err


def test_a_named_checkpoint_of_another_run_begins_a_new_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *GPT, "--steps", "4", "--save-every", "2", "--mark", "a"]) == 0
    source = "runs/python-source/a/checkpoints/step-00000002"
    assert main(["train", *GPT, "--steps", "4", "--mark", "b", "--resume", source]) == 0
    a, b = (load_file(f"runs/python-source/{mark}/model.safetensors") for mark in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main(["train", *GPT, "--steps", "4", "--mark", "b", "--resume", source]) == 2
    assert "belongs to another run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--resume", "auto"]])
def test_a_run_folder_of_recollect_is_recognised(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Tightfit was called so before; with or without a checkpoint, its folder is neither resumed nor overwritten."""
    run = Path("runs/python-source/gpt-tiny")
    (run / "checkpoints").mkdir(parents=True)
    (run / "environment.json").write_text(json.dumps({"packages": {"recollect": "0.1.0", "torch": "2.13.0"}}))
    before = sorted(run.rglob("*"))
    assert main(["train", *GPT, "--steps", "1", *words]) == 2
    said = capsys.readouterr().err
    assert f"the run in {run} was written by recollect 0.1.0, as tightfit was called before" in said
    assert "neither resume it nor show it" in said
    assert "begin another run with --mark NAME" in said
    assert main(["report", str(run)]) == 2
    assert "was written by recollect 0.1.0" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert main(["train", *GPT, "--steps", "1", "--mark", "other", *words]) == 0


def start(*words: str) -> subprocess.Popen[str]:
    command = [warm_start.python(), "-m", "tightfit", "train", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_twenty_steps_equal_seven_a_kill_and_thirteen() -> None:
    """Bit for bit, with dropout, under a plan that recomputes."""
    words = [*GPT, "--steps", "20", "--save-every", "7", "--grad-checkpoint", "full"]
    assert main(["train", *words, "--mark", "whole"]) == 0

    run = Path("runs/python-source/killed")
    process = start(*words, "--mark", "killed", "STEPS", "1000")
    wait_for(run / "checkpoints" / "step-00000007" / "state.json", process)
    process.kill()
    process.communicate()
    again = ["--mark", "killed", "--resume", str(run / "checkpoints" / "step-00000007")]
    assert main(["train", *words, *again]) == 0

    whole = Path("runs/python-source/whole")
    assert (whole / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),  # by which Python raises an exception of its own
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_saves_and_ends_with_its_code(number: signal.Signals, code: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as under nohup, and so are runs'")
    run = Path("runs/python-source/gpt-tiny")
    process = start(*GPT, "--steps", "100000", "--save-every", "100000")
    wait_for(run / "metrics.jsonl", process)
    while not metrics(run):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == code
    assert "Go on with --resume auto" in err
    assert "Traceback" not in err
    saved = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())
    assert saved["step"] == metrics(run)[-1]["step"]


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_good_checkpoint() -> None:
    """Saving after every step, killed again and again: each start goes on from where a whole checkpoint is."""
    run = Path("runs/python-source/gpt-tiny")
    words = [*GPT, "--steps", "100000", "--save-every", "1", "--resume", "auto"]
    reached = 0
    for delay in (0.0, 0.03):
        process = start(*words)
        wait_for(run / "checkpoints" / f"step-{reached + 2:08d}", process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        done = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["step"]
        assert done >= reached + 1
        reached = done
    assert main(["train", *GPT, "--steps", str(reached + 1), "--resume", "auto"]) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, reached + 2))


def test_steps_that_do_not_follow_their_plan_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "tests.train.user_code:numbers", "--batch-size", "8", "--steps", "60"]
    words += ["--grad-checkpoint", "full", "--model"]
    assert main(["train", *words, "tests.train.user_code:own_loss_model", "--mark", "steady"]) == 0
    assert "off plan" not in capsys.readouterr().out
    assert main(["train", *words, "tests.train.user_code:changes_later", "--mark", "changing"]) == 0
    assert "ran other operations than planned" in capsys.readouterr().out
