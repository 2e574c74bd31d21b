"""The picture of a frontier, and the file of peers' points that are drawn into it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.solver.profiles import chain_template, gpt_profile, profile_of
from tightfit.errors import UnsupportedInput
from tightfit.records import Plan
from tightfit.report.frontier_plot import check_output, draw_frontier, save_figure
from tightfit.report.peers import PeerPoint, Peers, load_peers
from tightfit.solver.frontier import frontier

pytest.importorskip("matplotlib")

MIB = 1 << 20
CHECKPOINT = {
    "method": "checkpoint", "parameter": "every block", "backend": "eager",
    "peak_bytes": 60 * MIB, "overhead_ratio": 0.31, "correct": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return frontier(gpt_profile(3), points=6)


def peers_of(*points: dict[str, Any]) -> Peers:
    return Peers(model="gpt", points=tuple(PeerPoint(**point) for point in points))


def lines(figure: Any) -> dict[str, Any]:
    """What is drawn, by its label in the legend."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def labelled(figure: Any, beginning: str) -> Any:
    (found,) = [line for label, line in lines(figure).items() if label.startswith(beginning)]
    return found


def test_the_curve_and_its_bound_are_the_plans(plans: list[Plan]) -> None:
    figure = draw_frontier(plans)
    curve = labelled(figure, "tightfit")
    assert list(curve.get_xdata()) == pytest.approx([plan.budget_bytes / MIB for plan in plans])
    assert list(curve.get_ydata()) == pytest.approx([100 * plan.overhead_ratio for plan in plans])
    assert figure.axes[0].get_xlabel() == "budget (MiB)"
    bound = labelled(figure, "lower bound")
    assert bound.get_linestyle() == "--"
    assert list(bound.get_ydata())[-1] == pytest.approx(0)
    baseline = labelled(figure, f"{plans[0].baseline_bytes / MIB:.1f} MiB: parameters")
    assert baseline.get_xdata()[0] == pytest.approx(plans[0].baseline_bytes / MIB)


def test_below_one_level_no_bound_is_drawn() -> None:
    deep = frontier(profile_of([chain_template(4)], [0] * 24), points=5)
    assert deep[0].shared_tapes
    figure = draw_frontier(deep)
    assert len(labelled(figure, "lower bound").get_xdata()) < len(labelled(figure, "tightfit").get_xdata())
    assert figure.axes[0].get_xlabel() == "budget (KiB)"


def test_the_budget_is_a_line_and_one_too_small_says_so(plans: list[Plan]) -> None:
    assert not any(label.startswith("your budget") for label in lines(draw_frontier(plans)))
    middle = (plans[0].budget_bytes + plans[-1].budget_bytes) // 2
    line = labelled(draw_frontier(plans, budget_bytes=middle), "your budget")
    assert line.get_xdata()[0] == pytest.approx(middle / MIB)
    assert "below" not in line.get_label()
    small = labelled(draw_frontier(plans, budget_bytes=plans[0].budget_bytes - 1), "your budget")
    assert "below the smallest" in small.get_label()


def test_a_huge_budget_does_not_squeeze_the_curve(plans: list[Plan]) -> None:
    plain = plans[-1]
    huge = replace(plain, budget_bytes=1000 * plain.budget_bytes)
    figure = draw_frontier([*plans, huge], budget_bytes=huge.budget_bytes)
    figure.draw_without_rendering()
    assert figure.axes[0].get_xlim()[1] < 1.5 * plain.budget_bytes / MIB
    assert "far to the right" in labelled(figure, "your budget").get_label()


def test_peers_have_a_marker_each_and_wrong_ones_are_crossed_out(plans: list[Plan]) -> None:
    other = {**CHECKPOINT, "parameter": "every 2nd", "peak_bytes": 80 * MIB}
    wrong = {**CHECKPOINT, "method": "quantised", "correct": False, "peak_bytes": 50 * MIB, "overhead_ratio": 0.1}
    figure = draw_frontier(plans, peers=peers_of(CHECKPOINT, other, wrong))
    checkpoint, quantised = labelled(figure, "checkpoint"), labelled(figure, "quantised")
    assert list(checkpoint.get_xdata()) == [60, 80]
    assert list(checkpoint.get_ydata()) == pytest.approx([31, 31])
    assert checkpoint.get_marker() != quantised.get_marker()
    assert checkpoint.get_color() != quantised.get_color()
    crosses = labelled(figure, "crossed out")
    assert crosses.get_marker() == "x"
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([50], pytest.approx([10]))
    assert not any(label.startswith("crossed") for label in lines(draw_frontier(plans, peers=peers_of(CHECKPOINT))))


def test_names_are_shown_as_they_are(plans: list[Plan], tmp_path: Path) -> None:
    figure = draw_frontier(plans, peers=peers_of({**CHECKPOINT, "method": "_$x_$y^{"}))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert r" _\$x_\$y^{" in legend
    save_figure(figure, tmp_path / "a.png", ".png")  # a formula would not parse


def test_the_legend_covers_nothing(plans: list[Plan]) -> None:
    figure = draw_frontier(plans, budget_bytes=MIB, peers=peers_of(CHECKPOINT))
    figure.draw_without_rendering()
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_tightbbox())


@pytest.mark.parametrize(("suffix", "beginning"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_each_kind_of_file(plans: list[Plan], suffix: str, beginning: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plot.tmp"
    check_output(path.with_suffix(suffix))
    save_figure(draw_frontier(plans), path, suffix)
    assert path.read_bytes().startswith(beginning)


@pytest.mark.parametrize(("name", "found"), [("a.jpeg", r"ends in \.jpeg"), ("plot", "has no suffix")])
def test_other_kinds_are_refused(name: str, found: str) -> None:
    with pytest.raises(UnsupportedInput, match=rf"{found}, which does not say .*\.png, \.svg or \.pdf"):
        check_output(Path(name))


def test_a_missing_matplotlib_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedInput, match=r"matplotlib is not installed.*tightfit\[report\]"):
        check_output(Path("a.png"))


def test_pyplot_is_not_imported_and_no_setting_changes() -> None:
    code = (
        "import sys\nimport tightfit.report.frontier_plot as plot\nassert 'matplotlib' not in sys.modules\n"
        "from tightfit.solver.frontier import frontier\nfrom tests.solver.profiles import gpt_profile\n"
        "import io, matplotlib\nbefore = matplotlib.rcParams.copy()\n"
        "plot.save_figure(plot.draw_frontier(frontier(gpt_profile(1), 3)), io.BytesIO(), '.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\nassert matplotlib.rcParams.copy() == before\n"
    )
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=600)
    assert result.returncode == 0, result.stderr


def test_peers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"model": "gpt", "points": [CHECKPOINT]}))
    assert load_peers(path) == peers_of(CHECKPOINT)


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        ("{", "it is not JSON"),
        ("[]", "it holds no object"),
        ({"model": "gpt"}, '"points" is missing'),
        ({"model": "gpt", "points": []}, '"points" is missing, empty'),
        ({"points": [CHECKPOINT]}, '"model" is missing'),
        ({"model": "gpt", "points": [CHECKPOINT, 3]}, r"points\[1\] is no object"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "method": None}]}, r"points\[0\]\.method is None instead of text"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "peak_bytes": 0.5}]}, r"points\[0\]\.peak_bytes is 0\.5"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "peak_bytes": -1}]}, r"points\[0\]\.peak_bytes is -1"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "overhead_ratio": float("nan")}]}, r"overhead_ratio is nan"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "overhead_ratio": True}]}, r"overhead_ratio is True"),
        ({"model": "gpt", "points": [{**CHECKPOINT, "correct": "yes"}]}, r"correct is 'yes' instead of true or false"),
    ],
)
def test_a_bad_file_of_peers_says_what_is_wrong(content: Any, trouble: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UnsupportedInput, match=rf"no points that can be drawn: .*{trouble}.* Write it like \{{"):
        load_peers(path)


def test_an_absent_file_of_peers(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match=r"cannot be read: No such file.*Check --peers"):
        load_peers(tmp_path / "absent.json")
