"""Plans for GPUs that are not here, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightfit.cli.main import main
from tightfit.records import Plan

TINY = ("--model", "gpt-tiny", "--batch-size", "8")


def test_the_cards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    listed = {card["name"]: card for card in json.loads(capsys.readouterr().out)}
    assert listed["a100-40gb"]["capacity_bytes"]["value"] == 42474471424
    assert main(["devices"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in listed)
    assert "cuda:24GiB" in text


def test_a_plan_for_a_card_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", *TINY, "--device", "rtx4090-24gb", "--precision", "bf16", "--output", str(file), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] == "plain"
    assert found["predicted_allocated_bytes"] <= found["predicted_reserved_bytes"] < found["predicted_peak_bytes"]
    assert found["cards"]["t4-16gb"] == "plain"
    assert any("context_bytes" in one for one in found["assumed"])
    assert Plan.load(file).device == "rtx4090-24gb"


def test_what_does_not_fit_is_an_answer_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--device", "cuda:24GiB", "--memory", "641MiB"]) == 2
    text = capsys.readouterr().out
    assert "it does not fit: the smallest budget is" in text
    assert "rtx3060-12gb" in text


def test_a_frontier_for_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", *TINY, "--device", "t4-16gb", "--points", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["train", "verify"])
def test_nothing_is_run_on_a_card_that_is_not_here(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *TINY, "--device", "rtx4090-24gb"]) == 2
    assert "described, not here" in capsys.readouterr().err
