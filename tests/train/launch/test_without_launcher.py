"""Run one process, with a notice, where no launcher has set anything; of half a launcher list what is missing, and a
command that works: "KeyError: 'WORLD_SIZE'".

See https://github.com/pytorch/examples/issues/458 and https://github.com/damo-cv/TransReID/issues/11.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--steps", "1"]


@pytest.fixture(autouse=True)
def _no_launcher(own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--dist-url", "env://", "MODEL.DIST_TRAIN", "True"]) == 0
    assert "one process only, as no launcher has set WORLD_SIZE and RANK" in capsys.readouterr().out


def test_some_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main([*WORDS, "--dist-url", "env://"]) == 2
    message = capsys.readouterr().err
    assert "WORLD_SIZE, MASTER_PORT are not set, though RANK, MASTER_ADDR is" in message
    assert "torchrun --nproc-per-node 2 -m tightfit train" in message
    assert not Path("runs").exists()
