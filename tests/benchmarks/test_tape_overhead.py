from __future__ import annotations

import importlib.util

import pytest

from benchmarks import tape_overhead


def test_without_transformers_it_says_so_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last thing that ``make gpu-check`` runs, which needs none of the extras."""
    monkeypatch.setattr("sys.argv", ["tape_overhead.py"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tape_overhead.main()
    assert "skipped: transformers" in capsys.readouterr().out
