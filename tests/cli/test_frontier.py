"""`tightfit frontier`: the table, the document, the plot, and what is refused before anything is measured."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tightfit
from tests.solver.profiles import OpSpec, chain_template, gpt_profile, profile_of
from tightfit.cli.main import main
from tightfit.report.frontier_table import Curve, curve_figures, format_curve
from tightfit.solver.frontier import frontier_of
from tightfit.solver.solver import Solver
from tightfit.train import workload

TINY = ["frontier", "--model", "gpt-tiny", "--batch-size", "4", "--points", "5"]
PEERS = {
    "model": "gpt-tiny",
    "points": [
        {
            "method": "checkpoint", "parameter": "every block", "backend": "eager",
            "peak_bytes": 3_000_000, "overhead_ratio": 0.3, "correct": False,
        }
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def measured() -> dict[str, tightfit.Profile]:
    """The one step that these tests measure, filled by the first of them."""
    return {}


@pytest.fixture(autouse=True)
def _measured_once(measured: dict[str, tightfit.Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = tightfit.measure

    def once(*arguments: Any, **keywords: Any) -> tightfit.Profile:
        if not measured:
            measured["gpt-tiny"] = measure(*arguments, **keywords)
        return measured["gpt-tiny"]

    monkeypatch.setattr(tightfit, "measure", once)


def curve_of(profile: tightfit.Profile, marked_bytes: int | None = None, points: int = 5) -> Curve:
    solver = Solver(profile)
    plans = frontier_of(solver, points, also=() if marked_bytes is None else (marked_bytes,))
    return Curve.of(solver, plans, marked_bytes, solving_ms=1.0)


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*TINY, "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_table_is_the_curve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--memory", "2800KiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model   Gpt, batch int64[4x65], AdamW")
    assert lines[1].split() == ["budget", "of", "plain", "peak", "step", "added", "at", "best"]
    rows = [line for line in lines[2:] if "%" in line and "measured" not in line]
    assert len(rows) in (6, 7)  # five, the user's, and the smallest of one level where it is another
    assert rows[0].split("  ")[-1].startswith("smallest")
    assert rows[-1].endswith("plain")
    assert "100.0%" in rows[-1]
    (own,) = [row for row in rows if "your budget" in row]
    assert own.split()[:2] == ["2.7", "MiB"]
    steps = [float(row.split(" ms")[0].split()[-1]) for row in rows]
    assert steps == sorted(steps, reverse=True)
    assert any("of every budget are parameters" in line for line in lines)


def test_the_document_is_one_and_reconciles(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys)
    points = found["points"]
    assert found["your_budget"] is None
    assert points[0]["budget_bytes"] == found["smallest_budget_bytes"]
    assert points[-1]["budget_bytes"] == found["plain_peak_bytes"]
    assert points[-1]["predicted_step_ms"] == found["plain_step_ms"]
    assert found["smallest_at_one_level_bytes"] in [point["budget_bytes"] for point in points]
    assert "smallest" in points[0]["notes"]
    assert points[-1]["notes"][-1] == "plain"
    for left, right in pairwise(points):
        assert left["predicted_step_ms"] >= right["predicted_step_ms"]
    for point in points:
        assert point["predicted_peak_bytes"] <= point["budget_bytes"]
        assert point["lower_bound_ms"] <= point["predicted_step_ms"] + 1e-9


def test_a_budget_is_a_point_of_the_curve_even_above_the_plain_peak(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--memory", "1GiB")
    own = found["points"][found["your_budget"]["point"]]
    assert found["your_budget"]["runs"] is True
    assert own["budget_bytes"] == 2**30
    assert own["notes"] == ["your budget"]
    assert own["predicted_step_ms"] == found["plain_step_ms"]


def test_a_budget_below_the_smallest_is_marked_and_the_curve_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--memory", "100KiB"]) == 0
    out = capsys.readouterr().out
    assert "your budget: too small" in out
    assert "your budget is too small: the smallest is" in out
    rows = [line for line in out.splitlines() if " ms " in line]
    assert rows[0].endswith("smallest") or rows[0].endswith("smallest without recursion")
    assert rows[-1].endswith("plain")
    found = document(capsys, "--memory", "100KiB")
    assert found["your_budget"] == {"budget_bytes": 100 * 1024, "runs": False, "point": None}
    assert len(found["points"]) >= 5


def test_below_one_level_the_table_claims_no_bound() -> None:
    curve = curve_of(profile_of([chain_template(4)], [0] * 24))
    assert curve.plans[0].shared_tapes
    rows = format_curve(curve).splitlines()[2:]
    assert rows[0].split()[-2:] == ["-", "smallest"]
    (one_level,) = [row for row in rows if "smallest without recursion" in row]
    assert " - " not in one_level
    notes = [point["notes"] for point in curve_figures(curve)["points"]]
    assert notes[0] == ["smallest"]
    assert ["smallest without recursion"] in notes


def test_two_names_of_one_budget_are_both_noted() -> None:
    profile = gpt_profile(2)
    least_bytes, _ = Solver(profile).minimum_budget()
    curve = curve_of(profile, least_bytes)
    assert curve.notes(curve.plans[0])[0] == "smallest"
    assert curve.notes(curve.plans[0])[-1] == "your budget"
    only = curve_of(profile_of([(OpSpec(ms=1.0, reads=("stream",), makes=(64,)),)], [0]))
    assert [only.notes(plan) for plan in only.plans] == [["smallest", "smallest without recursion", "plain"]]


def test_the_plot_is_written(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    """That each kind of picture is what its suffix says is in tests/report/test_frontier_plot.py."""
    pytest.importorskip("matplotlib")
    name = "a.svg"
    (own_folder / name).write_text("what was there before")
    (own_folder / "peers.json").write_text(json.dumps(PEERS))
    assert main([*TINY, "--memory", "2800KiB", "--output", name, "--peers", "peers.json"]) == 0
    assert f"drawn into {name}" in capsys.readouterr().out
    assert (own_folder / name).read_bytes().startswith(b"<?xml")
    assert sorted(path.name for path in own_folder.iterdir()) == sorted([name, "peers.json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.jpeg"], r"a.jpeg ends in .jpeg, which does not say which kind of picture to write"),
        (["--output", "absent/a.png"], "--output absent/a.png cannot be written: its folder does not exist"),
        (["--output", "a.png", "--peers", "bad.json"], "bad.json has no points that can be drawn"),
        (["--output", "a.png", "--peers", "absent.json"], "absent.json cannot be read"),
        (["--peers", "bad.json"], "they are only drawn, and no plot is asked for. Add --output"),
        (["--points", "1"], "the number of points is 1, but a curve needs its two ends"),
        (["--memory", "plenty"], "--memory 'plenty' is not a memory size"),
    ],
)
def test_bad_input_is_refused_before_measuring(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--peers" in words or "a.jpeg" in words:
        pytest.importorskip("matplotlib")
    (own_folder / "bad.json").write_text("{}")

    def measure(*arguments: object, **keywords: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(tightfit, "measure", measure)
    if "--memory" not in words:
        monkeypatch.setattr(workload, "load_data", measure)
    assert main([*TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert [path.name for path in own_folder.iterdir()] == ["bad.json"]
