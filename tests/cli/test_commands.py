"""`plan`, `models`, `datasets` and the program as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit
from tightfit.cli.main import main
from tightfit.records import Plan
from tightfit.report.text import batch_note

ROOT = Path(__file__).parent.parent.parent
TINY = ["--model", "gpt-tiny", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_plan_is_written_and_can_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--memory", "2800KiB", "--output", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert "budget of 2.7 MiB" in out
    assert "written to plan.json" in out
    plan = Plan.load("plan.json")
    assert batch_note(plan, plan.batch) == ""
    assert "for batches of int64[4x65]: for this one, int64[8x65]" in batch_note(plan, "int64[8x65]")
    assert plan.budget_bytes == 2800 * 1024
    assert plan.predicted_peak_bytes <= plan.budget_bytes < plan.plain_peak_bytes
    main(["verify", *TINY, "--plan", "plan.json", "--reference-memory", "1GiB", "--steps", "1", "--json"])
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["gradients_equal"] is True
    assert verdict["budget_bytes"] == plan.budget_bytes
    assert verdict["replayed_ops"] > 0


def test_the_figures_of_a_plan_reconcile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--memory", "2800KiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["breakdown"].values()) == plan["predicted_peak_bytes"]
    assert 0 < plan["planned_regions"] <= plan["regions"]
    assert plan["lower_bound_ms"] <= plan["predicted_step_ms"]
    assert Path.cwd().joinpath("plan.json").exists() is False


@pytest.mark.parametrize(
    ("command", "name"), [("models", "gpt-tiny"), ("models", "resnet"), ("datasets", "python-source")]
)
def test_lists(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 0
    assert any(line.split()[0] == name for line in capsys.readouterr().out.splitlines())
    assert main([command, "--json"]) == 0
    assert name in json.loads(capsys.readouterr().out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tightfit {tightfit.__version__}\n"


def run_process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tightfit", *words], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_process_prints_one_document_and_nothing_else() -> None:
    """Also of what libraries print behind Python's back."""
    result = run_process("train", *TINY, "--steps", "1", "--memory", "2900KiB", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["measured_peak_bytes"] <= document["budget_bytes"] == 2900 * 1024
    assert "USDT" not in result.stderr


def test_the_process_says_bad_input_in_one_line() -> None:
    result = run_process("train", "--memry", "1GiB")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "tightfit: there is no flag --memry. Did you mean --memory? See all flags with --help.\n"


def test_gpu_check_skips_with_a_reason_where_there_is_no_cuda() -> None:
    result = subprocess.run(
        [ROOT / ".ci" / "gpu-check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )
    assert result.returncode == 0
    assert "gpu-check skipped: torch.cuda.is_available() is false" in result.stdout


def test_the_doctor_examines_machine_packages_and_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("device    cpu", "torch ", "self-test passed", "gradients equal", "optional  tensorboard"):
        assert part in text, part
    monkeypatch.setattr("tightfit.cli.doctor._EXTRAS", {"no-such-package": "nothing"})
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_test"]["ok"] is True
    assert found["optional"] == {"no-such-package": None}
    assert found["devices"][0]["memory_bytes"] >= found["devices"][0]["free_bytes"] > 0
