"""Plans and verdicts as a notebook shows them."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given

from tests.records.test_json_codec import plans, some_verdict
from tightfit.records import Plan
from tightfit.units import format_bytes


class Cells(HTMLParser):
    """The texts of a table by their labels; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []
        self.rows = dict(zip(self.texts[1::2], self.texts[2::2], strict=True))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag in ("caption", "th", "td"):
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


@given(plans())
def test_a_plan_shows_its_figures_whatever_its_names_are(plan: Plan) -> None:
    rows = Cells(plan._repr_html_()).rows
    assert rows["budget"] == format_bytes(plan.budget_bytes)
    assert rows["peak"].startswith(format_bytes(plan.predicted_peak_bytes))
    assert rows["batch"] == plan.batch


def test_a_verdict_shows_what_the_command_line_prints() -> None:
    verdict = some_verdict()
    cells = Cells(verdict._repr_html_())
    assert cells.texts[0] == "Verdict"
    assert list(cells.rows.items()) == verdict.summary()
    assert cells.rows["verdict"].startswith("not fully proven")
    assert cells.rows["differs"] == "a, é"
