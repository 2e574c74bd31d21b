"""Row 30, "resume opens version_35", "one folder per rank": a resumed run goes on in its folder, with its log and its
metrics; four processes have one folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.field_notes.running import metrics
from tests.train.launch.launching import GPT, run
from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--log-every", "1"]


def test_resume_auto_continues_folder_log_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for steps in ("2", "4", "6"):
        assert main([*WORDS, "--steps", steps, "--resume", "auto"]) == 0
    assert [path.name for path in Path("runs/co2").iterdir()] == ["lstm-tiny"]
    assert [line["step"] for line in metrics("co2/lstm-tiny")] == [1, 2, 3, 4, 5, 6]
    log = Path("runs/co2/lstm-tiny/log.txt").read_text()
    assert all(f"step {step}/" in log for step in range(1, 7))
    assert log.count("resumed from") == 2
    assert Path("runs/co2/lstm-tiny/command.txt").read_text().count("\n") == 3


@pytest.mark.usefixtures("own_folder")
def test_four_processes_have_one_folder() -> None:
    run(*GPT, "--multiprocessing-distributed", "--nproc-per-node", "4", "--steps", "2", "--resume", "auto")
    run(*GPT, "--steps", "4", "--resume", "auto")  # another number of processes may go on with it
    assert [path.name for path in Path("runs/python-source").iterdir()] == ["gpt-tiny"]
    assert [line["step"] for line in metrics("python-source/gpt-tiny")] == [1, 2, 3, 4]
    log = Path("runs/python-source/gpt-tiny/log.txt").read_text()
    assert log.count("resumed from") == 1
    assert log.count("model   gpt-tiny") == 2
