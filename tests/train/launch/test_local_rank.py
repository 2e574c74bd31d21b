"""Understand every spelling of ``--local-rank``; a conflict is an error: "unrecognized arguments: --local-rank=0".

See https://github.com/huggingface/pytorch-image-models/issues/1724.
"""

from __future__ import annotations

import pytest

from tightfit.cli.main import main

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--steps", "1"]


@pytest.fixture(autouse=True)
def _no_launcher(own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("words", [["--local_rank=0"], ["--local-rank=0"], ["--local-rank", "0"], []])
def test_every_spelling(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # What torchrun sets with one process; the old launcher adds the flag.
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main([*WORDS, *words]) == 0


def test_a_conflict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([*WORDS, "--local_rank=0"]) == 2
    assert "--local-rank is 0, but LOCAL_RANK is 1" in capsys.readouterr().err
