"""Refuse a ``--resume`` path that is missing: "=> no checkpoint found", and then it trains from scratch.

https://github.com/pytorch/examples/tree/main/imagenet does that.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tightfit.cli.main import main


@pytest.mark.parametrize("path", ["missing.pth", "runs/python-source/other", "runs"])
def test_it_exits_non_zero_and_trains_nothing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "runs":
        Path(path).mkdir()
    assert main(["train", "--model", "gpt-tiny", "--steps", "1", "--resume", path, "--mark", "m"]) == 2
    said = capsys.readouterr().err
    assert path in said
    assert "--resume auto" in said
    assert not Path("runs/python-source/m").exists()
