"""What each region of a plan saves and what that costs: as a table for people and as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tightfit.records import Plan
from tightfit.units import format_bytes


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each recipe: the regions that share it, and its figures, which are of all their calls together."""
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


def format_table(plan: Plan, most: int | None = None) -> str:
    """The table; empty if nothing is recomputed.  `most`: lines for regions; those that save least share the last."""
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
    # What is not the first replay: writing operations down or running a module again, and replaying again where regions
    # share a tape.
    table.append(("recording, repeats", "", "", f"{added_ms - replay_ms:.2f} ms"))
    table.append(("all", str(calls), format_bytes(saved), f"{added_ms:.2f} ms"))
    if len(plan.regions) > calls:
        table.append(("left alone", str(len(plan.regions) - calls), "", ""))
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
    """Calls, bytes and milliseconds by what people call it: blocks by their recipe, other code by where it is."""
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
    """The regions' module paths; a long list by its ends."""
    paths = list(dict.fromkeys(paths))
    return f"{paths[0]} ... {paths[-1]}" if len(paths) > 2 else ", ".join(paths)
