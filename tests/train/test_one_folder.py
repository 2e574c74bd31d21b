"""Go on in the folder of the run that is resumed, with its log and its metrics: "resume opens version_35".

See https://github.com/Lightning-AI/pytorch-lightning/issues/2735 and
https://github.com/Lightning-AI/pytorch-lightning/issues/5403.

That several processes have one folder is in tests/train/launch/test_torchrun.py and tests/train/parallel/test_fsdp.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import metrics
from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--log-every", "1"]


def test_resume_auto_continues_folder_log_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for steps in ("2", "4"):
        assert main([*WORDS, "--steps", steps, "--resume", "auto"]) == 0
    assert [path.name for path in Path("runs/co2").iterdir()] == ["lstm-tiny"]
    assert [line["step"] for line in metrics("co2/lstm-tiny")] == [1, 2, 3, 4]
    log = Path("runs/co2/lstm-tiny/log.txt").read_text()
    assert all(f"step {step}/" in log for step in range(1, 5))
    assert log.count("resumed from") == 1
    assert Path("runs/co2/lstm-tiny/command.txt").read_text().count("\n") == 2
