"""The largest batch, from the command line."""

from __future__ import annotations

import pytest

from tightfit.cli.main import main

TINY = ("grow", "--model", "gpt-tiny", "--device", "t4-16gb", "--memory", "700MiB", "--most", "3")


def test_the_most_that_was_tried_is_said_to_be_no_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY]) == 0
    text = capsys.readouterr().out
    assert "largest 3 samples within 700.0 MiB" in text
    assert "more may fit" in text


def test_a_missing_sample_count_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY[:-1], "0"]) == 2
    assert "--most" in capsys.readouterr().err
