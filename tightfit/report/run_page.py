"""A run's folder as one self-contained HTML page: its settings, its proof, its metrics.

Everything on it is read from the folder's files, so that the page of a run that is still going, or was stopped, can be
made at any time (`tightfit report RUN_FOLDER`).  The summary of a finished run is in the page itself, as JSON in an
element that is not shown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tightfit.errors import PlanMismatch, UnsupportedInput, first_line
from tightfit.records import Plan
from tightfit.report.metric_rows import read_metric_rows
from tightfit.report.plan_table import format_table
from tightfit.report.svg_chart import Level, Line, line_chart
from tightfit.units import format_bytes

PAGE = "report.html"
#: What reading a file that we did not write ends in.
_NOT_OURS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
_DATA = '<script type="application/json" id="summary">'


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run's folder."""

    folder: Path
    plan: Plan
    metrics: Sequence[Mapping[str, Any]]
    """The rows of ``metrics.jsonl`` that can be read."""
    summary: Mapping[str, Any] | None
    """None: the run has not finished."""
    config: str
    command: str
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """DATASET/MARK."""
        return "/".join(self.folder.absolute().parts[-2:])


def read_run(folder: Path) -> RunFiles:
    """Read what `tightfit train` wrote into ``folder``.

    Raises:
        UnsupportedInput: it is no run's folder, a file in it is damaged, or recollect has written it.
    """
    refuse_recollect(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "plan.json").is_file():
        raise UnsupportedInput(
            f"{folder} holds no run: there is no config.yaml and plan.json in it. "
            f"Give the folder that `tightfit train` names at its start, ROOT_PATH/DATASET/MARK."
        )
    try:
        return RunFiles(
            folder=folder,
            plan=Plan.load(folder / "plan.json"),
            metrics=read_metric_rows(folder / "metrics.jsonl").rows,
            summary=_data_of(_text(folder / PAGE)),
            config=(folder / "config.yaml").read_text(encoding="utf-8"),
            command=_text(folder / "command.txt"),
            environment=dict(json.loads(_text(folder / "environment.json") or "{}")),
        )
    except (OSError, *_NOT_OURS, PlanMismatch) as problem:
        raise _unreadable(folder, problem) from None


def read_and_render(folder: Path) -> tuple[RunFiles, str]:
    """Read a run's folder, which somebody else may have written, and render its page.

    Raises:
        UnsupportedInput: as `read_run`, or what the files say makes no sense.
    """
    run = read_run(folder)
    try:
        page = render(run)
        page.encode("utf-8")
    except _NOT_OURS as problem:
        raise _unreadable(folder, problem) from None
    return run, page


def _unreadable(folder: Path, problem: Exception) -> UnsupportedInput:
    return UnsupportedInput(
        f"the run in {folder} cannot be read: {first_line(problem)}. A file there is damaged or of another version of "
        f"tightfit; restore it, or leave the page as it is."
    )


def refuse_recollect(folder: Path) -> None:
    """Raise `UnsupportedInput` for a run's folder that was written before tightfit had its name."""
    try:
        packages = json.loads(_text(folder / "environment.json") or "{}").get("packages", {})
    except (ValueError, AttributeError, RecursionError):  # damaged: whoever needs the file says so
        return
    if isinstance(packages, dict) and "recollect" in packages:
        version = packages["recollect"]  # None: it was not installed
        writer = f"recollect {version}" if version else "recollect"
        raise UnsupportedInput(
            f"the run in {folder} was written by {writer}, as tightfit was called before, so this version can neither "
            f"resume it nor show it. Keep the folder, and begin another run with --mark NAME."
        )


def render(run: RunFiles) -> str:
    """Render the page as HTML."""
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="sub">{escape(_subtitle(run))}</p>',
        '<div class="tiles">' + "".join(_tile(*tile) for tile in _tiles(run)) + "</div>",
    ]
    for title, chart in _charts(run):
        if chart:
            parts.append(f"<section><h2>{escape(title)}</h2>{chart}</section>")
    table = format_table(run.plan)
    parts.append("<section><h2>Plan</h2>")
    parts.append(f"<pre>{escape(table)}</pre>" if table else "<p>Nothing is recomputed: the plain step fits.</p>")
    parts.append("</section>")
    for title, text in (
        ("Command", run.command),
        ("Configuration", run.config),
        ("Environment", json.dumps(run.environment, indent=2)),
    ):
        parts.append(f"<section><h2>{title}</h2><pre>{escape(text.strip())}</pre></section>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · tightfit</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n"
        f"</main>{_data(run.summary)}</body></html>\n"
    )


def _data(summary: Mapping[str, Any] | None) -> str:
    return "" if summary is None else _DATA + json.dumps(summary).replace("<", "\\u003c") + "</script>"


def _data_of(page: str) -> Mapping[str, Any] | None:
    _, found, rest = page.partition(_DATA)
    return json.loads(rest.partition("</script>")[0]) if found else None


def _subtitle(run: RunFiles) -> str:
    plan = run.plan
    done = int(run.metrics[-1]["step"]) if run.metrics else 0
    state = "finished" if run.summary is not None else "not finished"
    return f"{plan.model} · {plan.optimizer or 'no optimizer'} · {plan.device} · {done:,} steps, {state}"


def _tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return rows of (what, figure, where it comes from)."""
    plan, summary = run.plan, run.summary or {}
    measured = summary.get("measured_peak_bytes") or max((line["peak_bytes"] for line in run.metrics), default=0)
    budget = summary.get("budget_bytes", plan.budget_bytes)
    plain = summary.get("plain_peak_bytes", plan.plain_peak_bytes)
    tiles = [
        ("Peak memory", format_bytes(measured) if measured else "unknown", f"measured; budget {format_bytes(budget)}"),
        ("Plain peak", format_bytes(plain), f"{summary.get('plain_peak_source', 'predicted')}, without recomputation"),
        ("Added time", f"{plan.overhead_ratio:+.1%}", "predicted, of the plain step"),
        ("Gradients", *_proof(summary.get("gradients_equal"))),
    ]
    losses = [loss for _, loss in _points(run, "loss")]
    if losses:
        tiles.append(("Loss", f"{losses[-1]:.4f}", f"at the last logged step; {losses[0]:.4f} at the first"))
    if summary.get("best") is not None:
        metric = str(summary["best_metric"]).replace("_", " ")
        tiles.append((f"Best {metric}", f"{summary['best']:.4g}", f"held out, at step {summary['best_step']:,}"))
    return tiles


def _proof(equal: bool | None) -> tuple[str, str]:
    if equal is None:
        return "unknown", "no proof in this folder: see log.txt"
    return ("equal" if equal else "DIFFER"), "compared with the plain step, bit for bit"


def _tile(what: str, figure: str, source: str) -> str:
    cells = f"<b>{escape(what)}</b><strong>{escape(figure)}</strong><span>{escape(source)}</span>"
    return f'<div class="tile">{cells}</div>'


def _charts(run: RunFiles) -> list[tuple[str, str]]:
    losses = [
        Line(name="training loss", points=_points(run, "loss"), of_many=statistics.fmean),
        Line(name="held-out loss", points=_evaluations(run, "loss")),
    ]
    charts = [("Loss", line_chart(losses, x_name="step"))]
    names = {name for line in run.metrics for name in line.get("eval", ())}
    others = sorted(names - {"loss", "samples", "peak_bytes"})
    for name in others:
        line = Line(name=name.replace("_", " "), points=_evaluations(run, name))
        charts.append((f"Held out: {line.name}", line_chart([line], x_name="step")))
    charts.append(("Memory", _memory_chart(run)))
    times = [Line(name="step", points=_points(run, "step_ms"), of_many=statistics.fmean)]
    charts.append(("Time of a step", line_chart(times, show=lambda y: f"{y:g} ms", x_name="step")))
    rates = [Line(name="learning rate", points=_points(run, "lr"))]
    charts.append(("Learning rate", line_chart(rates, show=lambda y: f"{y:.3g}", x_name="step")))
    return charts


def _memory_chart(run: RunFiles) -> str:
    budget = (run.summary or {}).get("budget_bytes", run.plan.budget_bytes)
    plain = run.plan.plain_peak_bytes
    unit, name = (2**30, "GiB") if plain >= 2**31 else (2**20, "MiB") if plain >= 2**21 else (2**10, "KiB")
    levels = [Level(name="plain peak", value=plain / unit)]
    if budget <= 2 * plain:  # else the curves would be a line at the bottom
        levels.append(Level(name="budget", value=budget / unit))
    peaks = Line(name="peak of the step", points=[(step, value / unit) for step, value in _points(run, "peak_bytes")])
    return line_chart([peaks], levels=levels, show=lambda y: f"{y:,.4g} {name}", x_name="step")


def _points(run: RunFiles, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in run.metrics if line.get(name) is not None]


def _evaluations(run: RunFiles, name: str) -> list[tuple[float, float]]:
    evaluated = [(line["step"], line["eval"].get(name)) for line in run.metrics if "eval" in line]
    return [(step, value) for step, value in evaluated if value is not None]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --rule: #dde2e9; --paper: #fff; --card: #f6f8fa;
  --line0: #2563b0; --line1: #c2570c; --level: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --rule: #333c48; --paper: #14181e;
  --card: #1d232b; --line0: #6ea8ee; --line1: #f0a060; --level: #ff8a80; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 32px 0 8px; }
.sub, .legend { color: var(--soft); margin: 4px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; margin-top: 24px; }
.tile { background: var(--card); border-radius: 8px; padding: 12px 14px; display: flex; flex-direction: column; }
.tile b { font-weight: 500; color: var(--soft); font-size: 13px; } .tile strong { font-size: 21px; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; }
pre { background: var(--card); border-radius: 8px; padding: 12px 14px; font-size: 13px; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } .tick { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot { opacity: 0; } .dot:hover { opacity: 1; }
.line0 { stroke: var(--line0); fill: var(--line0); } .line1 { stroke: var(--line1); fill: var(--line1); }
polyline.line { fill: none; } .level { stroke: var(--level); stroke-dasharray: 5 4; stroke-width: 1.5; }
.level-name { fill: var(--level); font-size: 12px; }
.key { font-size: 13px; margin-right: 18px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 18px; height: 0; border-top: 3px solid currentColor;
  vertical-align: middle; margin-right: 6px; }
.key.line0::before { color: var(--line0); } .key.line1::before { color: var(--line1); }
"""
