"""Time against peak memory, one panel for each model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.side_by_side.analysis import overhead, quartiles
from benchmarks.side_by_side.run import FamilyResult

_MIB = 2**20
#: Colours that people with colour-blindness can tell apart (Okabe and Ito 2008), and a shape for each.
_STYLES = {
    "checkpoint": ("#E69F00", "s"),
    "transformers": ("#D9A441", "+"),
    "op list": ("#009E73", "^"),
    "sac_ilp": ("#CC79A7", "D"),
    "fairscale": ("#56B4E9", "v"),
    "deepspeed": ("#999999", "x"),
    "torch_remat": ("#000000", "*"),
}


def draw(results: Sequence[FamilyResult], path: Path) -> None:
    """Write the picture; eager methods only, because compiled ones are compared to another plain step."""
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    handles = {}
    for panel, result in zip(axes, results, strict=False):
        plain = result.row("plain").setup
        for name, (colour, shape) in _STYLES.items():
            rows = [r for r in result.rows if r.setup.method.name == name and r.overheads and r.setup.equal]
            if not rows:
                continue
            handles[name] = panel.plot(
                [r.setup.peak_bytes / _MIB for r in rows],
                [100 * overhead(r) for r in rows],
                shape,
                color=colour,
                markersize=6,
                zorder=2,
            )[0]
        ours = sorted(
            (r for r in result.rows if r.setup.method.name == "tightfit" and r.overheads),
            key=lambda r: r.setup.peak_bytes,
        )
        middle = [100 * overhead(r) for r in ours]
        spread = [
            [100 * (overhead(r) - quartiles(r)[0]) for r in ours],
            [100 * (quartiles(r)[1] - overhead(r)) for r in ours],
        ]
        handles["tightfit"] = panel.errorbar(
            [r.setup.peak_bytes / _MIB for r in ours],
            middle,
            yerr=spread,
            color="#0072B2",
            marker="o",
            capsize=2,
            zorder=3,
        )
        bounds = [r for r in ours if r.setup.bound_overhead]
        if bounds:
            handles["no plan below (modelled)"] = panel.plot(
                [r.setup.method.value / _MIB for r in bounds],
                [100 * (r.setup.bound_overhead or 0.0) for r in bounds],
                ":",
                color="#0072B2",
                zorder=1,
            )[0]
        handles["plain"] = panel.plot([plain.peak_bytes / _MIB], [0], "o", color="black", fillstyle="none", zorder=2)[0]
        panel.set_title(result.family)
        panel.set_xlabel("peak memory, MiB")
        panel.set_ylabel("overhead, %")
        panel.set_ylim(bottom=min(-2.0, panel.get_ylim()[0]), top=min(panel.get_ylim()[1], 100.0))
        panel.grid(alpha=0.3)
    for panel in axes[len(results) :]:
        panel.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2 * columns)
    figure.savefig(path, dpi=110)
