"""The page of a run in a browser: nothing is wider than the screen or cut off, narrow and wide, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.solver.profiles import chain_template, profile_of
from tightfit.report.run_files import RunFiles
from tightfit.report.run_page import render
from tightfit.solver.solver import Solver

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

#: Writes what it finds into the page: its width, text that an SVG cuts off, charts without height, its background.
LOOK = """<script>
const cut = [...document.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
  const box = text.getBBox(), view = svg.viewBox.baseVal;
  return box.x < 0 || box.y < 0 || box.x + box.width > view.width || box.y + box.height > view.height;
}).map(text => text.textContent));
const charts = [...document.querySelectorAll("svg")];
const flat = charts.filter(svg => svg.getBoundingClientRect().height < 100).length;
const scrolled = [...document.querySelectorAll(".table")].filter(table => table.scrollWidth > table.clientWidth).length;
document.body.dataset.found = JSON.stringify({ inner: innerWidth, cut, flat, scrolled, charts: charts.length,
  width: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor });
</script>"""


def page(logged_steps: int) -> str:
    profile = profile_of([chain_template(6, nbytes=2**20)], [0] * 6)
    solver = Solver(profile)
    plain = solver.plain(0).plain_peak_bytes
    row = {
        "epoch": 1,
        "loss": 2.5,
        "lr": 1e-3,
        "step_ms": 12.0,
        "peak_bytes": plain // 2,
        "samples_per_second": 12345.6,
    }
    run = RunFiles(
        folder=Path("a-dataset-with-a-rather-long-name/and-a-mark-that-is-hardly-shorter-than-that-for-sure"),
        plan=solver.solve((solver.minimum_budget()[0] + plain) // 2),
        profile=profile,
        metrics=[{**row, "step": step, "eval": {"loss": 2.6}} for step in range(1, logged_steps + 1)],
        summary=None,
        config="model: gpt\n",
        command="tightfit train\n",
        environment={"platform": "Linux-" + "x" * 90, "packages": {"torch": "2.13.0"}},
    )
    return render(run).replace("</body>", f"{LOOK}</body>")


@pytest.mark.parametrize(("width", "dark", "logged_steps"), [(1280, False, 40), (500, True, 1)])
def test_the_page_fits_the_screen(width: int, dark: bool, logged_steps: int, tmp_path: Path) -> None:
    assert BROWSER is not None
    (tmp_path / "page.html").write_text(page(logged_steps), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *scheme,
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    (text,) = re.findall(r'<body data-found="(.*?)"', shown.stdout)
    found = json.loads(unescape(text))
    assert found["inner"] == width
    assert found["width"] <= width
    assert found["cut"] == []
    assert found["flat"] == 0
    assert found["scrolled"] == 0
    assert found["charts"] == 6  # plain, planned, frontier, peaks, loss, throughput
    red = int(re.findall(r"\d+", found["paper"])[0])
    assert red < 60 if dark else red > 200
