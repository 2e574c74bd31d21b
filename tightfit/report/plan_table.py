"""A plan in a few lines, as a table of what its regions save and cost, and as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tightfit.peak_breakdown import parts_of_peak
from tightfit.records import Plan
from tightfit.units import format_bytes


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each recipe: the regions that share it, and its figures for all their calls together."""
    regions: dict[int, list[str]] = {}
    for region in plan.regions:
        if region.recipe >= 0:
            regions.setdefault(region.recipe, []).append(region.key)
    return [
        {
            "regions": keys,
            "calls": len(keys),
            "dropped_bytes": len(keys) * plan.recipes[number].dropped_bytes,
            "replay_ms": round(len(keys) * plan.recipes[number].replay_ms, 9),
            "executor": plan.recipes[number].executor,
            "kept_for_safety": [
                {"op": kept.op, "reason": kept.reason, "bytes": len(keys) * kept.nbytes}
                for kept in plan.recipes[number].kept_for_safety
            ],
        }
        for number, keys in regions.items()
    ]


def plan_figures(solved: Plan) -> dict[str, Any]:
    """Return the figures of a plan as plain data; its decisions are in its file."""
    names = (
        "model", "batch", "device", "optimizer", "budget_bytes", "predicted_peak_bytes", "peak_where",
        "baseline_bytes", "plain_peak_bytes", "predicted_step_ms", "plain_step_ms", "overhead_ratio",
        "lower_bound_ms", "exactness", "excluded", "checkpoints",
    )  # fmt: skip
    return {
        **{name: getattr(solved, name) for name in names},
        "breakdown": dict(solved.breakdown),
        "parts_of_peak": parts_of_peak(solved.breakdown, solved.peak_where),
        "tape_host_bytes": solved.tape_host_bytes,
        "regions": len(solved.regions),
        "planned_regions": sum(region.recipe >= 0 for region in solved.regions),
        "recipes": plan_rows(solved),
    }


def format_plan(plan: Plan) -> str:
    """Format a plan's decisions and peaks in two or three lines."""
    planned = [plan.recipes[region.recipe] for region in plan.regions if region.recipe >= 0]
    peaks = (
        f"predicted peak {format_bytes(plan.predicted_peak_bytes)} of a budget of {format_bytes(plan.budget_bytes)} "
        f"(plain {format_bytes(plan.plain_peak_bytes)}; {format_bytes(plan.baseline_bytes)} of it are parameters, "
        f"gradients, optimizer state and batch)"
    )
    if plan.excluded:
        peaks += f"\n        left untouched, as asked: {', '.join(plan.excluded)}"
    for reason in sorted(set(plan.checkpoints.values()) - {""}):
        left = [path.strip("<>").partition(" ")[2] for path, why in plan.checkpoints.items() if why == reason]
        peaks += f"\n        checkpointed by the model itself, as {reason}: {', '.join(left)}"
    if plan.takes_over_checkpoints:
        taken = [path.strip("<>").partition(" ")[2] for path, why in plan.checkpoints.items() if not why]
        peaks += f"\n        the model's own checkpointing is this plan's to decide: {', '.join(taken)}"
    if not planned:
        return f"plan    nothing is recomputed: the plain step fits\n        {peaks}"
    dropped_bytes = sum(recipe.dropped_bytes for recipe in planned)
    recursive = (
        "\n        this budget needs recursive recomputation: tensors passed between blocks are recomputed too, some "
        "more than once"
    )
    return (
        f"plan    {len(planned)} of {len(plan.regions)} regions recompute {format_bytes(dropped_bytes)}, predicted "
        f"slowdown {plan.overhead_ratio:+.1%}\n        {peaks}{recursive if plan.shared_tapes else ''}"
    )


def format_table(plan: Plan, most: int | None = None) -> str:
    """Format the table; empty if nothing is recomputed.  Beyond ``most`` lines, those that save least become one."""
    rows = plan_rows(plan)
    if not rows:
        return ""
    lines_of = sorted(_lines(plan).items(), key=lambda entry: -entry[1][1])
    if most is not None and len(lines_of) > most:
        rest = [figures for _, figures in lines_of[most - 1 :]]
        others = (sum(f[0] for f in rest), sum(f[1] for f in rest), sum(f[2] for f in rest))
        lines_of = [*lines_of[: most - 1], (f"{len(rest)} others", others)]
    replay_ms = sum(row["replay_ms"] for row in rows)
    added_ms = plan.predicted_step_ms - plan.plain_step_ms
    saved = sum(row["dropped_bytes"] for row in rows)
    calls = sum(row["calls"] for row in rows)
    table = [("regions", "calls", "saved", "added")]
    table += [(label, str(line[0]), format_bytes(int(line[1])), f"{line[2]:.2f} ms") for label, line in lines_of]
    # All but the first replay: recording ops or recomputing a whole module, and further replays where regions share a
    # tape.
    # Beside a device it may be less than nothing: what the one does while the other is behind takes no time.
    beside = "recording, repeats" if added_ms >= replay_ms else "done meanwhile"
    table.append((beside, "", "", f"{added_ms - replay_ms:.2f} ms"))
    table.append(("all", str(calls), format_bytes(saved), f"{added_ms:.2f} ms"))
    if len(plan.regions) > calls:
        table.append(("nothing dropped", str(len(plan.regions) - calls), "", ""))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines = [
        f"  {line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}".rstrip()
        for line in table
    ]
    return "\n".join(lines + _kept_lines(rows))


def _kept_lines(rows: list[dict[str, Any]]) -> list[str]:
    kept: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for entry in row["kept_for_safety"]:
            kept[entry["op"], entry["reason"]] += entry["bytes"]
    return [
        f"  kept, whatever the budget: {format_bytes(nbytes)} of {op} ({reason})"
        for (op, reason), nbytes in kept.most_common()
    ]


def _lines(plan: Plan) -> dict[str, tuple[int, int, float]]:
    """Return calls, bytes and milliseconds by label: of blocks by their recipe, of other code by where it is."""
    paths: dict[int | str, list[str]] = {}
    figures: dict[int | str, tuple[int, int, float]] = {}
    for region in plan.regions:
        if region.recipe < 0:
            continue
        recipe = plan.recipes[region.recipe]
        path = region.key.partition("#")[0]
        kind = _OWN_CODE.get(path, region.recipe)
        paths.setdefault(kind, []).append(path)
        calls, saved, added = figures.get(kind, (0, 0, 0.0))
        figures[kind] = (calls + 1, saved + recipe.dropped_bytes, added + recipe.replay_ms)
    named = [(kind if isinstance(kind, str) else _names(paths[kind]), kind) for kind in figures]
    labels = [label for label, _ in named]
    # Two calls of one module may have two recipes.
    unique = {kind: label if labels.count(label) == 1 else f"{label} ({kind})" for label, kind in named}
    for kind in unique:
        if isinstance(kind, int) and plan.recipes[kind].executor != "tape":
            unique[kind] += f", {plan.recipes[kind].executor} recomputation"
    return {unique[kind]: line for kind, line in figures.items()}


#: The pseudo-regions, for people.
_OWN_CODE = {"<loss>": "the loss", "<model>": "between blocks"}


def _names(paths: list[str]) -> str:
    """Return the regions' module paths, a long list by its ends."""
    paths = list(dict.fromkeys(paths))
    return f"{paths[0]} ... {paths[-1]}" if len(paths) > 2 else ", ".join(paths)
