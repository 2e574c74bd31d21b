"""What runs the zoo: names are drawn by a seed, a run goes on where it stopped, and a row may end badly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo import families
from benchmarks.zoo import row as rows
from benchmarks.zoo.checkpointed import checkpoint_blocks, choices_of_blocks
from benchmarks.zoo.draw import draw, part_of, read_names
from benchmarks.zoo.limited import Limits, run_limited
from benchmarks.zoo.row import Planned, Row, measure_row
from benchmarks.zoo.subject import Subject
from benchmarks.zoo.table import append_row, missing, newest, read_rows, report, summary
from tests.support.chains import ResidualMLP

NAMES = {"one": [f"a{n}" for n in range(9)], "other": ["x", "y"]}
LIMITS = Limits(seconds=60, memory_bytes=8 << 30)


def test_a_draw_is_decided_by_its_seed() -> None:
    small = draw(NAMES, 3, 2)
    assert small == draw({"one": NAMES["one"][::-1], "other": ["y", "x"]}, 3, 2)
    assert [family for family, _ in small] == ["one", "other"] * 2
    assert set(small) < set(draw(NAMES, 3, 4))
    assert len(draw(NAMES, 3, None)) == 11
    assert {tuple(draw(NAMES, seed, 2)) for seed in range(9)} != {tuple(small)}


def test_parts_make_the_whole() -> None:
    whole = draw(NAMES, 1, None)
    parts = [part_of(whole, f"{one}/3") for one in (1, 2, 3)]
    assert sorted(key for part in parts for key in part) == sorted(whole)
    for wrong in ("0/3", "4/3", "2", "x/y", "-1/2"):
        with pytest.raises(ValueError, match="is not a part"):
            part_of(whole, wrong)


def test_every_family_has_names() -> None:
    names = read_names()
    assert set(names) == set(families.families())
    assert all(len(set(known)) == len(known) >= 2 for known in names.values())
    assert sum(map(len, names.values())) >= 300


def made_up(name: str = "a", **given: Any) -> Row:
    half = Planned(budget_bytes=150, predicted_bytes=140, measured_bytes=140)
    smallest = Planned(budget_bytes=100, predicted_bytes=100, measured_bytes=100)
    fields = {"plain_bytes": 200, "checkpoint_bytes": 120, "checkpoint_right": True, "outcome": "ok", "commit": "c"}
    return Row(family="one", name=name, **(fields | {"half": half, "smallest": smallest} | given))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    written = [made_up("a0", commit="old"), made_up("a1"), made_up("a2", outcome="timeout", half=None, smallest=None)]
    for row in written:
        append_row(file, row)
    assert read_rows(file) == written
    keys = [("one", f"a{n}") for n in range(4)]
    assert missing(keys, written, "c") == [("one", "a0"), ("one", "a3")]
    again = made_up("a0")
    assert newest([*written, again]) == [again, *written[1:]]


def test_the_summary_tells_every_fault() -> None:
    over = Planned(budget_bytes=100, measured_bytes=101, predicted_bytes=100)
    unequal = Planned(budget_bytes=100, measured_bytes=100, predicted_bytes=100, unequal=["1:  loss"])
    found = [
        made_up("fine"),
        made_up("ends", outcome="crash", reason="ValueError: a | b", half=None, smallest=None),
        made_up("more", smallest=over),
        made_up("bits", smallest=unequal),
        made_up("large", checkpoint_bytes=98),
        made_up("wrong", checkpoint_bytes=90, checkpoint_right=False),
        made_up("never", outcome="refused"),
    ]
    text = "\n".join(summary(found))
    assert "6 rows of 1 families; 1 more" in text
    for line in (
        "crashes, timeouts: 1 (one ends)",
        "unequal: 1 (one bits)",
        "over budget: 1 (one more)",
        "peak: 1 (one large); of 4",
    ):
        assert line in text, text
    assert "peak: 0; of 1" in "\n".join(summary([made_up("near", checkpoint_bytes=99)]))
    page = report(found, 7, 3, 9, "a computer")
    assert "drawn by seed 7: 7 of 9 have been run" in page
    assert "a \\| b" in page
    assert "1.0100 OVER" in page
    assert "1 DIFFER: 1:  loss" in page


def ends(how: str, tell: Callable[[str], None]) -> None:
    tell("begun")
    if how == "raises":
        raise ValueError("as asked")
    if how == "dies":
        os._exit(3)
    if how == "takes":
        torch.ones(8 << 30)


# From Python 3.12 on; the run itself has one thread when it forks.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("how", "failure"),
    [("well", ""), ("raises", "ValueError: as asked"), ("dies", "the process ended with 3"), ("takes", "memory")],
)
def test_what_was_told_outlives_the_process(how: str, failure: str) -> None:
    ended = run_limited(ends, how, limits=LIMITS)
    assert (ended.told, ended.failure) == (["begun"], failure)


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.blocks(x)
        return result


class Block(Stage):
    pass


def test_blocks_are_what_repeats() -> None:
    linear = [nn.Linear(2, 2) for _ in range(8)]
    blocks = [Block(one, nn.ReLU()) for one in linear[:4]]
    model = nn.Sequential(linear[4], Stage(*blocks[:2]), Stage(*blocks[2:]), linear[5])
    assert choices_of_blocks(model) == [[model[1], model[2]], blocks]
    assert choices_of_blocks(nn.Sequential(linear[0], nn.ReLU(), linear[1])) == [[linear[0], linear[1]]]


def test_checkpointed_blocks_run_twice() -> None:
    calls = []
    model = nn.Sequential(Block(nn.Linear(2, 2), nn.ReLU()), Block(nn.Linear(2, 2), nn.ReLU()))
    model[0].register_forward_hook(lambda *given: calls.append(0))
    model[0].blocks.register_forward_pre_hook(lambda *given: calls.append(1))
    checkpoint_blocks(choices_of_blocks(model)[0])
    model(torch.randn(3, 2)).sum().backward()
    assert calls == [1, 0, 1]


def test_a_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(family: str, name: str) -> Subject:
        return Subject.single(ResidualMLP(6, 16), torch.randn(64, 16), lambda model, batch: model(batch))

    monkeypatch.setattr(rows, "build", build)
    told: list[Row] = []
    row = Row(family="one", name="chain")
    measure_row(row, told.append)
    assert (row.outcome, row.unstable, row.unequal, row.over_budget) == ("ok", [], [], False)
    assert row.checkpoint_right
    assert row.ratio is not None
    assert row.ratio <= 1.02
    assert row.smallest is not None
    assert row.half is not None
    assert row.resident_bytes < row.smallest.measured_bytes < row.half.measured_bytes < row.plain_bytes
    assert row.smallest.budget_bytes == row.smallest.measured_bytes
    assert len(told) == 5
    assert Row.from_json(row.as_json()) == row


def test_a_plain_step_that_fails_is_not_blamed_on_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(family: str, name: str) -> Subject:
        raise ImportError("no such library")

    monkeypatch.setattr(rows, "build", build)
    row = Row(family="one", name="missing")
    measure_row(row, lambda row: None)
    assert (row.outcome, row.reason) == ("refused", "ImportError: no such library")
