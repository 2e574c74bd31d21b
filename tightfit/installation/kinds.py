"""Several kinds of steps that take turns under one budget, such as the halves of a GAN's, and what each is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.errors import UnsupportedInput
from tightfit.records import Plan, Profile, Verdict
from tightfit.step.step import Step


@dataclass(frozen=True, kw_only=True)
class KindOfStep:
    """What `fit` found for one of several kinds of steps that share a budget."""

    plan: Plan
    """For the batch that was given."""
    profile: Profile
    """What the plan was solved from."""
    verdict: Verdict
    """The proof."""


def known_kind(steps: Mapping[str, Step], kind: str | None) -> str:
    """Return the name of the kind of step that is asked for; the only one needs no name.

    Raises:
        UnsupportedInput: there is none of that name, or there are several and none is named.
    """
    if kind is None and len(steps) == 1:
        return next(iter(steps))
    if kind is not None and kind in steps:
        return kind
    if "" in steps:
        raise UnsupportedInput(
            f"kind={kind!r} was asked for, but the plan has one kind of step. Leave out kind=, or give fit a mapping "
            "of steps: step={'critic': tightfit.Step(...), 'generator': tightfit.Step(...)}."
        )
    found = "no kind of step was named" if kind is None else f"kind={kind!r} was asked for"
    raise UnsupportedInput(
        f"{found}, and the plan has the kinds {', '.join(map(repr, steps))}. Each has a plan and a loss of its own. "
        "Name one of them: kind=."
    )
