"""The side-by-side benchmark measures what it says: on tiny models, in this process, without timing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.side_by_side import families, worker
from benchmarks.side_by_side.analysis import cells, smallest
from benchmarks.side_by_side.families import Family
from benchmarks.side_by_side.methods import Method
from benchmarks.side_by_side.plot import draw
from benchmarks.side_by_side.report import points, report
from benchmarks.side_by_side.run import FamilyResult, Row, Scope
from benchmarks.side_by_side.worker import Job, Setup
from tests.suite import build

SCOPE = Scope(families=("gpt",), fractions=(0.1, 0.5), rounds=3, every_k=(1,))


def family(name: str, blocks: str) -> Family:
    case = build(name)
    paths = tuple(path for path, module in case.model.named_modules() if type(module).__name__ == blocks)
    return Family(case.model.train(), case.batch, paths, case.loss)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets up a method on a tiny model, after the plain step."""
    tiny = {"gpt": lambda: family("gpt", "Block"), "resnet": lambda: family("resnet", "Residual")}
    monkeypatch.setattr(families, "FAMILIES", tiny)

    def prepare(name: str, method: Method) -> Setup:
        job = Job(name, method, tmp_path / "plain.pt", tmp_path / "operations.pt")
        step, setup = worker._prepare(job)
        step()
        return setup

    return prepare


@pytest.mark.exhaustive
@pytest.mark.slow
def test_methods_on_a_model_with_dropout(prepared) -> None:
    plain = prepared("gpt", Method("plain"))
    every = prepared("gpt", Method("checkpoint", "every 1", value=1))
    listed = prepared("gpt", Method("op list", "all mm", value=True))
    smallest_of_ours = prepared("gpt", Method("tightfit", value=0))
    ours = prepared("gpt", Method("tightfit", value=(plain.peak_bytes + every.peak_bytes) // 2))
    assert plain.recompute_ms == 0
    for setup in (plain, every, listed, ours, smallest_of_ours):
        assert setup.equal
        assert setup.buffers_equal
        assert setup.baseline_bytes == plain.baseline_bytes
    assert plain.peak_bytes > listed.peak_bytes > every.peak_bytes
    assert every.recompute_ms > listed.recompute_ms > 0
    assert ours.peak_bytes <= (plain.peak_bytes + every.peak_bytes) // 2
    # What replay runs is seen, although it runs below the mode that counts.
    assert 0 < ours.recompute_ms < smallest_of_ours.recompute_ms


def test_running_statistics_that_a_peer_updates_twice(prepared) -> None:
    prepared("resnet", Method("plain"))
    every = prepared("resnet", Method("checkpoint", "every 1", value=1))
    ours = prepared("resnet", Method("tightfit", value=0))
    assert every.equal
    assert not every.buffers_equal
    assert ours.equal
    assert ours.buffers_equal


def row(name: str, value: object, peak: int, overhead: float, *, equal: bool = True, backend: str = "eager") -> Row:
    setup = Setup(
        Method(name, str(value), backend, value), peak_bytes=peak, baseline_bytes=100, equal=equal, buffers_equal=True,
        recompute_ms=10 * overhead, predicted_peak_bytes=peak, predicted_overhead=overhead, bound_overhead=overhead / 2,
    )  # fmt: skip
    return Row(setup, times_ms=[10.0] * 3, overheads=[overhead, overhead, overhead])


RESULT = FamilyResult(
    "gpt",
    [
        row("plain", None, 1000, 0.0),
        row("checkpoint", 1, 300, 0.4),
        row("checkpoint", 2, 640, 0.2),
        row("op list", True, 600, 0.1, equal=False),  # wrong gradients: no rival
        row("compile whole", 0.5, 200, 0.01, backend="compile whole"),  # another backend: no rival
        Row(Setup(Method("sac_ilp"), failure="AssertionError")),
        row("tightfit", 0, 250, 0.6),
        row("tightfit", 370, 360, 0.1),
        row("tightfit", 650, 651, 0.001),
    ],
    [370, 650],
)


def test_the_best_peer_of_a_cell() -> None:
    low, middle = cells(RESULT, SCOPE.fractions)
    assert low.peer.setup.method.value == 1
    assert low.ratio == pytest.approx(0.25)
    assert low.is_kept
    assert middle.peer.setup.method.value == 2
    assert middle.ratio == pytest.approx(0.05)  # what is below the noise counts as noise
    assert not middle.is_kept
    assert smallest(RESULT).ratio == pytest.approx(150 / 200)


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    text = report([RESULT], SCOPE, "a command", "2026-01-01", "picture.png")
    assert "0.05 over 1 cells" in text
    assert "1 of 2; over: gpt at 50%" in text
    assert "Did not run: sac_ilp: `AssertionError`" in text
    assert "differ by" in text
    assert not math.isnan(cells(RESULT, SCOPE.fractions)[0].recompute_ratio)
    assert {p["method"] for p in points(RESULT)["points"]} == {"checkpoint", "op list", "compile whole"}
    assert [p["correct"] for p in points(RESULT)["points"]] == [True, True, False, True]
    draw([RESULT], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_failure_in_a_line_names_no_folder_of_this_machine() -> None:
    assert (
        worker.in_a_line(OSError("cannot run\n /home/me/.venv/cbc, see /var/log/x")) == "OSError: cannot run cbc, see x"
    )
    assert worker.in_a_line(ValueError("a/b is 1/2")) == "ValueError: a/b is 1/2"
    assert worker.in_a_line(AssertionError()) == "AssertionError"
