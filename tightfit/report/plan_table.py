"""A plan in a few lines, as a table of what its regions save and cost, and as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tightfit.peak_breakdown import parts_of_peak
from tightfit.records import Plan
from tightfit.units import format_bytes

#: Kinds of values that are kept for safety, in a table of few lines.
_MOST_KEPT = 2


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
    reached = ", batch and what only the loss reaches" if plan.breakdown.get("reached") else " and batch"
    peaks = (
        f"predicted peak {format_bytes(plan.predicted_peak_bytes)} of a budget of {format_bytes(plan.budget_bytes)} "
        f"(plain {format_bytes(plan.plain_peak_bytes)}; {format_bytes(plan.baseline_bytes)} of it are parameters, "
        f"gradients, optimizer state{reached})"
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
    return "\n".join(lines + _kept_lines(rows, most))


def _kept_lines(rows: list[dict[str, Any]], most: int | None) -> list[str]:
    kept: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for entry in row["kept_for_safety"]:
            kept[entry["op"], entry["reason"]] += entry["bytes"]
    entries = kept.most_common()
    shown = entries if most is None else entries[:_MOST_KEPT]
    lines = [
        f"  kept, whatever the budget: {format_bytes(nbytes)} of {op} ({reason})" for (op, reason), nbytes in shown
    ]
    if len(shown) < len(entries):
        rest = sum(nbytes for _, nbytes in entries[len(shown) :])
        lines.append(f"  kept, whatever the budget: {format_bytes(rest)} of {len(entries) - len(shown)} other kinds")
    return lines


def _lines(plan: Plan) -> dict[str, tuple[int, int, float]]:
    """Return calls, bytes and milliseconds by label."""
    found: dict[str, tuple[int, int, float]] = {}
    for region, label in zip(plan.regions, region_labels(plan, by_recipe=True), strict=True):
        if region.recipe >= 0:
            recipe = plan.recipes[region.recipe]
            calls, saved, added = found.get(label, (0, 0, 0.0))
            found[label] = (calls + 1, saved + recipe.dropped_bytes, added + recipe.replay_ms)
    return found


def region_labels(plan: Plan, *, by_recipe: bool = False) -> list[str]:
    """Return each region's label, for people: of blocks that are treated alike one, of other code where it is.

    by_recipe: number the recipes of calls of one module, and name their executors.
    """
    kinds: list[int | str] = []
    paths: dict[int | str, list[str]] = {}
    for region in plan.regions:
        path = region.key.partition("#")[0]
        kinds.append(_OWN_CODE.get(path, region.recipe))
        paths.setdefault(kinds[-1], []).append(path)
    named = {kind: kind if isinstance(kind, str) else _names(of_kind) for kind, of_kind in paths.items()}
    # Two calls of one module may have two recipes.
    shared = {label for label, count in Counter(named.values()).items() if count > 1}
    for kind, label in named.items():
        if by_recipe and isinstance(kind, int) and kind >= 0:
            number = f" ({kind})" if label in shared else ""
            executor = plan.recipes[kind].executor
            named[kind] = label + number
            if executor != "tape":
                named[kind] = f"{label}{number}, {executor} recomputation"
    return [named[kind] for kind in kinds]


#: The pseudo-regions, for people.
_OWN_CODE = {"<loss>": "the loss", "<model>": "between blocks"}


def _names(paths: list[str]) -> str:
    """Return the regions' module paths, a long list by its ends."""
    paths = list(dict.fromkeys(paths))
    return f"{paths[0]} ... {paths[-1]}" if len(paths) > 2 else ", ".join(paths)
