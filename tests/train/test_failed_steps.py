"""A step that fails is undone: the state before it is saved, or the step is taken again, with the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.runs import metrics, weights
from tightfit.cli.main import main
from tightfit.train.loop import OptimizerStep
from tightfit.train.memory_limit import note_limit, noted_limit

DATA = "tests.train.user_code-numbers"
WORDS = ["train", "--model", "tests.train.user_code:fails_later", "--dataset", "tests.train.user_code:numbers"]
WORDS += ["--batch-size", "8", "--steps", "6", "--log-every", "2", "--save-every", "100", "--resume", "auto"]

pytestmark = pytest.mark.usefixtures("own_folder")


def failing_at(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Let the model fail in the forward of a step."""
    take, taken = OptimizerStep.take, []

    def counted(self: OptimizerStep, microbatches: Any) -> Any:
        taken.append(1)
        if len(taken) == step:
            Path("fail").write_text(what)
        return take(self, microbatches)

    monkeypatch.setattr(OptimizerStep, "take", counted)


def same_files(one: str, other: str) -> None:
    a, b = weights(f"{DATA}/{one}"), weights(f"{DATA}/{other}")
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [[(line["step"], line["loss"], line["lr"]) for line in metrics(f"{DATA}/{mark}")] for mark in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("step", [4, 5])
def test_an_error_ends_the_run_with_a_checkpoint_of_the_state_before(
    step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--mark", "whole", "--schedule", "linear"]) == 0
    with monkeypatch.context() as patch:
        failing_at(patch, step, "error")
        assert main([*WORDS, "--mark", "cut", "--schedule", "linear"]) == 1
    captured = capsys.readouterr()
    assert f"the checkpoint of step {step - 1} is written" in captured.out
    assert "in the user's forward" in captured.err
    Path("fail").unlink()
    assert main([*WORDS, "--mark", "cut", "--schedule", "linear"]) == 0
    assert f"resumed from step-{step - 1:08d}" in capsys.readouterr().out
    same_files("whole", "cut")


def test_an_error_in_the_first_step_leaves_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(monkeypatch, 1, "error")
    assert main([*WORDS, "--mark", "m"]) == 1
    assert not list(Path(f"runs/{DATA}/m/checkpoints").glob("step-*"))


@pytest.mark.parametrize(("step", "times"), [(1, 1), (3, 2), (4, 1)])
def test_a_step_that_runs_out_of_memory_is_taken_again_under_a_tighter_plan(
    step: int, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 is not logged, and step 4 is. The second failure is that of a step to plan by, which needs no more."""
    memory = ["--memory", "64MiB"]
    assert main([*WORDS, *memory, "--mark", "whole"]) == 0
    with monkeypatch.context() as patch:
        failing_at(patch, step, f"memory {times}")
        assert main([*WORDS, *memory, "--mark", "tight"]) == 0
    said = capsys.readouterr().out
    assert f"It was step {step}, of samples" in said
    assert "the step is undone, and taken again with a plan for" in said
    same_files("whole", "tight")
    limit = noted_limit(Path(f"runs/{DATA}/tight"))
    assert limit is not None
    assert all(line["budget_bytes"] <= 64 * 2**20 for line in metrics(f"{DATA}/tight"))
    assert metrics(f"{DATA}/tight")[-1]["budget_bytes"] == limit
    assert main([*WORDS, *memory, "--mark", "tight", "STEPS", "8"]) == 0
    assert "has run out of memory, so plans are made for" in capsys.readouterr().out
    assert metrics(f"{DATA}/tight")[-1]["budget_bytes"] == limit


def test_where_no_plan_needs_less_the_state_before_is_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_at(monkeypatch, 3, "memory 1000")
    assert main([*WORDS, "--mark", "m"]) == 1
    captured = capsys.readouterr()
    assert "plan that needs less can be made" in captured.err or "No plan needs less" in captured.err
    assert "Traceback" not in captured.err
    assert "the checkpoint of step 2 is written" in captured.out


def test_after_the_optimizer_has_begun_nothing_is_undone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    whole = torch.optim.AdamW.step
    taken: list[int] = []

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        taken.append(1)
        if len(taken) > 40:
            runs_out()
        return whole(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert main([*WORDS, "--mark", "m", "STEPS", "100"]) == 1
    assert "Go on from the last checkpoint with --resume auto: plans are then made for" in capsys.readouterr().err
    assert not list(Path(f"runs/{DATA}/m/checkpoints").glob("step-*"))


def test_the_lowest_limit_stays_and_a_damaged_note_is_none(tmp_path: Path) -> None:
    for limit in (50, 40, 60):
        note_limit(tmp_path, limit, "why")
    assert noted_limit(tmp_path) == 40
    for text in (
        "",
        "[" * 5000,
        '{"limit_bytes": -1}',
        '{"limit_bytes": true}',
        "[1]",
        '{"limit_bytes": 1e3}',
        "x" * 20_000,
    ):
        (tmp_path / "memory-limit.json").write_text(text)
        assert noted_limit(tmp_path) is None
    note_limit(tmp_path / "absent", 1, "why")
    assert not (tmp_path / "absent").exists()


def test_the_batch_of_a_step_without_finite_numbers_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", "tests.train.user_code:own_loss_model", "--batch-size", "4", "--mark", "m"]
    words += ["--dataset", "tests.train.user_code:numbers_with_nan", "--steps", "16", "--log-every", "1000"]
    assert main(words) == 1
    captured = capsys.readouterr()
    run = Path("runs/tests.train.user_code-numbers_with_nan/m")
    (described,) = run.glob("nonfinite/*.json")
    found = json.loads(described.read_text())
    assert f"at step {found['step']}, of samples {', '.join(map(str, found['samples']))} (kept in" in captured.err
    from safetensors.torch import load_file

    kept = load_file(described.with_suffix(".safetensors"))
    assert any(not tensor.isfinite().all() for tensor in kept.values())
    saved = f"step-{found['step'] - 1:08d}"
    assert (run / "checkpoints/latest").resolve().name == saved  # of before, as nothing was applied
    assert f"the checkpoint of step {found['step'] - 1} is written" in captured.out
