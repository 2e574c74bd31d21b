"""The figures of README.md show what the committed report says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.landing_figure import LANDING, OURS, REPORT, draw, read_report
from benchmarks.side_by_side.families import FAMILIES


def test_all_points_of_the_report_are_read() -> None:
    models = read_report(REPORT.read_text(encoding="utf-8"))
    assert set(models) == set(FAMILIES)
    for model in models.values():
        ours = [point for point in model.points if point.method.startswith(OURS)]
        assert len(ours) == 7  # six budgets, and the smallest step
        assert all(point.equal for point in ours)
    gpt = {point.method: point for point in models["gpt"].points}
    assert gpt["checkpoint every 2"].overhead_percent == 24.9
    assert gpt["checkpoint every 2"].peak_percent == pytest.approx(100 * 117.7 / 196.5)
    assert models["gpt"].resident_percent == pytest.approx(100 * 28.2 / 196.5)
    assert not any(method.startswith("compile") for method in gpt)


def test_methods_with_other_results_are_told_apart() -> None:
    models = read_report(REPORT.read_text(encoding="utf-8"))
    unequal = {(model.name, point.method) for model in models.values() for point in model.points if not point.equal}
    assert ("resnet", "checkpoint every 1") in unequal  # its BatchNorm statistics
    assert ("t5", "fairscale") in unequal  # its gradients
    assert ("gpt", "checkpoint every 1") not in unequal


def test_the_figure_has_a_panel_for_each_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    models = read_report(REPORT.read_text(encoding="utf-8"))
    figure = draw([models[name] for name in LANDING], columns=2, titles=LANDING)
    assert [panel.get_title(loc="left") for panel in figure.axes] == list(LANDING.values())
    (legend,) = figure.legends
    assert {OURS, "plain PyTorch"} < {text.get_text() for text in legend.get_texts()}
    figure.savefig(tmp_path / "figure.png")
