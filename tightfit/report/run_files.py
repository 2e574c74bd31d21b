"""Reading a run's folder, which somebody else may have written or a disk may have damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.errors import PlanMismatch, UnsupportedInput, first_line
from tightfit.records import Plan, Profile
from tightfit.report.metric_rows import read_metric_rows
from tightfit.units import format_bytes

PAGE = "report.html"
PROFILE = "profile.json"
#: What reading a file that we did not write ends in.
NOT_OURS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
_MIB = 2**20
#: What is read of a run's folder, or appended to, with the most bytes that it may reasonably have.
_MOST_BYTES = {
    "config.yaml": 10 * _MIB,
    "command.txt": 100 * _MIB,
    "environment.json": 10 * _MIB,
    "log.txt": None,
    "metrics.jsonl": 4096 * _MIB,
    "plan.json": 1024 * _MIB,
    PROFILE: 1024 * _MIB,
    PAGE: 1024 * _MIB,
}
_DATA = '<script type="application/json" id="summary">'


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The content of a run's folder."""

    folder: Path
    plan: Plan
    profile: Profile | None
    """The measured step that the plan was solved from; None in folders of versions that did not write it."""
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
    refuse_made_up(folder)
    refuse_recollect(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "plan.json").is_file():
        raise UnsupportedInput(
            f"{folder} holds no run: there is no config.yaml and plan.json in it. "
            f"Give the folder that `tightfit train` names at its start, ROOT_PATH/DATASET/MARK."
        )
    try:
        plan = Plan.load(folder / "plan.json")
        return RunFiles(
            folder=folder,
            plan=plan,
            profile=_profile_of(folder / PROFILE, plan),
            metrics=read_metric_rows(folder / "metrics.jsonl").rows,
            summary=_data_of(_text(folder / PAGE)),
            config=(folder / "config.yaml").read_text(encoding="utf-8"),
            command=_text(folder / "command.txt"),
            environment=dict(json.loads(_text(folder / "environment.json") or "{}")),
        )
    except (OSError, *NOT_OURS, PlanMismatch) as problem:
        raise unreadable(folder, problem) from None


def _profile_of(path: Path, plan: Plan) -> Profile | None:
    if not path.is_file():
        return None
    profile = Profile.load(path)
    if [region.key for region in profile.regions] != [region.key for region in plan.regions]:
        raise ValueError(f"{path.name} is of another step than plan.json")
    return profile


def unreadable(folder: Path, problem: Exception) -> UnsupportedInput:
    """Return the error that says so of a run's folder."""
    return UnsupportedInput(
        f"the run in {folder} cannot be read: {first_line(problem)}. A file there is damaged or of another version of "
        f"tightfit; restore it, or leave the page as it is."
    )


def refuse_made_up(folder: Path) -> None:
    """Raise `UnsupportedInput` for a run's folder whose files lead elsewhere or are too large to be a run's.

    What somebody else has sent must not get a file of ours into a page, nor have one of ours written to.
    """
    for name, most_bytes in _MOST_BYTES.items():
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UnsupportedInput(
                f"{path} leads out of the run's folder, to {path.resolve()}, so that is not how a run leaves it, and "
                f"nothing is read or written through it. Remove the link, or copy the file there."
            )
        if path.exists() and not path.is_file():
            raise UnsupportedInput(
                f"{path} is no file, so the run that it belongs to cannot be read. Remove it, or restore the file."
            )
        if most_bytes is not None and path.exists() and path.stat().st_size > most_bytes:
            raise UnsupportedInput(
                f"{path} has {format_bytes(path.stat().st_size)}, but no run makes it that large "
                f"(at most {format_bytes(most_bytes)}), so it is not read. Restore the file, or remove it."
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


def hidden_data(summary: Mapping[str, Any] | None) -> str:
    """Return the summary as an element of the page that is not shown."""
    return "" if summary is None else _DATA + json.dumps(summary).replace("<", "\\u003c") + "</script>"


def _data_of(page: str) -> Mapping[str, Any] | None:
    _, found, rest = page.partition(_DATA)
    return json.loads(rest.partition("</script>")[0]) if found else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
