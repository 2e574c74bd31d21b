"""A run's folder as one self-contained HTML page: its verdict, the memory of a step, its plan, its metrics.

Everything on it is read from the folder's files, so that the page of a run that is still going, or was stopped, can be
made at any time (`tightfit report RUN_FOLDER`).  The summary of a finished run is in the page itself, as JSON in an
element that is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.report.charts import Chart
from tightfit.report.region_rows import region_rows
from tightfit.report.run_charts import memory_charts, run_charts
from tightfit.report.run_files import NOT_OURS, RunFiles, hidden_data, read_run, unreadable
from tightfit.report.run_verdict import RunVerdict, verdict_of
from tightfit.report.svg_chart import svg_chart
from tightfit.units import format_bytes

_STYLE = Path(__file__).with_name("run_page.css")
#: Rows of the regions' table; those that save least become one.
_MOST_ROWS = 24


def read_and_render(folder: Path) -> tuple[RunFiles, str]:
    """Read a run's folder, which somebody else may have written, and render its page.

    Raises:
        UnsupportedInput: as `read_run`, or what the files say makes no sense.
    """
    run = read_run(folder)
    try:
        page = render(run)
        page.encode("utf-8")
    except NOT_OURS as problem:
        raise unreadable(folder, problem) from None
    return run, page


def render(run: RunFiles) -> str:
    """Render the page as HTML."""
    verdict = verdict_of(run)
    parts = [
        f"<header><h1>{escape(run.name)}</h1>",
        f'<p class="sub">{escape(_subtitle(run))}</p></header>',
        f'<p class="verdict {verdict.state}">{escape(verdict.sentence)}</p>',
        '<div class="tiles">' + "".join(map(_tile, _tiles(run, verdict))) + "</div>",
        _section("The memory of one step", _grid(memory_charts(run)) + _peak_note(run)),
        _section("What the plan does", _regions(run)),
        _section("Training", _grid(run_charts(run))),
        _section("Environment", _definitions(_environment(run.environment))),
        _folded("Command", run.command) + _folded("Configuration", run.config),
    ]
    body = "\n".join(parts)
    style = _STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · tightfit</title><style>{style}</style></head>\n<body><main>\n{body}\n"
        f"</main>{hidden_data(run.summary)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _folded(title: str, text: str) -> str:
    text = escape(text.strip())
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>" if text else ""


def _grid(charts: Sequence[Chart]) -> str:
    figures = [f"<figure><figcaption>{escape(chart.title)}</figcaption>{svg_chart(chart)}</figure>" for chart in charts]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _subtitle(run: RunFiles) -> str:
    plan = run.plan
    done = int(run.metrics[-1]["step"]) if run.metrics else 0
    state = "finished" if run.summary is not None else "not finished"
    return f"{plan.model} · {plan.optimizer or 'no optimizer'} · {plan.device} · {done:,} steps, {state}"


def _tiles(run: RunFiles, verdict: RunVerdict) -> list[tuple[str, str, str]]:
    """Return rows of (what, figure, where it comes from)."""
    plan, summary = run.plan, run.summary or {}
    plain = summary.get("plain_peak_bytes", plan.plain_peak_bytes)
    tiles = [
        (
            "Peak memory",
            format_bytes(verdict.peak_bytes) if verdict.peak_bytes else "unknown",
            f"measured; budget {format_bytes(verdict.budget_bytes)}",
        ),
        ("Plain peak", format_bytes(plain), f"{summary.get('plain_peak_source', 'predicted')}, without a plan"),
        ("Added time", f"{plan.overhead_ratio:+.1%}", "predicted, of the plain step"),
        ("Gradients", verdict.gradients, verdict.compared),
    ]
    losses = [line["loss"] for line in run.metrics if line.get("loss") is not None]
    if losses:
        first = f"; {losses[0]:.4f} at the first" if len(losses) > 1 else ""
        tiles.append(("Loss", f"{losses[-1]:.4f}", f"at the last logged step{first}"))
    if summary.get("best") is not None:
        metric = str(summary["best_metric"]).replace("_", " ")
        tiles.append((f"Best {metric}", f"{summary['best']:.4g}", f"held out, at step {summary['best_step']:,}"))
    return tiles


def _tile(tile: tuple[str, str, str]) -> str:
    what, figure, source = map(escape, tile)
    return f'<div class="tile"><b>{what}</b><strong>{figure}</strong><span>{source}</span></div>'


def _peak_note(run: RunFiles) -> str:
    plan = run.plan
    parts = format_parts(parts_of_peak(plan.breakdown, plan.peak_where))
    reserved = plan.predicted_reserved_bytes - plan.predicted_allocated_bytes
    cached = (
        f" The charts show what is allocated; the allocator caches {format_bytes(reserved)} more." if reserved else ""
    )
    note = f"Predicted peak {format_bytes(plan.predicted_peak_bytes)}, at {plan.peak_where}: {parts}.{cached}"
    return f'<p class="note">{escape(note)}</p>'


def _regions(run: RunFiles) -> str:
    rows = region_rows(run.plan, run.profile)
    shown, rest = rows[:_MOST_ROWS], rows[_MOST_ROWS:]
    cells = [
        (
            row.label,
            f"{row.calls:,}",
            "" if row.kept_bytes is None else format_bytes(row.kept_bytes),
            format_bytes(row.recomputed_bytes) if row.recomputed_bytes else "-",
            f"{row.recompute_ms:.2f}" if row.recompute_ms else "-",
            row.reason,
        )
        for row in shown
    ]
    heads = ("regions", "calls", "kept", "recomputed", "ms paid", "why")
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in cells)
    calls, recomputed = sum(row.calls for row in rows), sum(row.recomputed_bytes for row in rows)
    kept = [row.kept_bytes for row in rows]
    total = "" if None in kept else format_bytes(sum(nbytes or 0 for nbytes in kept))
    added_ms = run.plan.predicted_step_ms - run.plan.plain_step_ms
    replay_ms = sum(row.recompute_ms for row in rows)
    foot = f"<td>all</td><td>{calls:,}</td><td>{total}</td><td>{format_bytes(recomputed)}</td><td>{replay_ms:.2f}</td>"
    why = "" if run.plan.is_plain else f"{added_ms:.2f} ms with recording and what is done meanwhile"
    more = f'<p class="note">{len(rest)} further kinds of regions are not shown.</p>' if rest else ""
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tfoot><tr>{foot}<td>{why}</td></tr></tfoot></table></div>{more}"
    )


def _environment(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, value) for name, value in found.items() if name != "packages"]
    packages = found.get("packages", {})
    rows += [(name, version) for name, version in packages.items() if version is not None]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in rows]


def _definitions(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value) or 'none'}</dd>" for name, value in rows)
    return f"<dl>{cells}</dl>" if cells else ""
