"""`tightfit plan --explain` for a GPU that is not here: a ranked list of what would make the step fit."""

from __future__ import annotations

from dataclasses import replace

from tightfit.cli.levers import Lever, ranked
from tightfit.report.levers import format_levers

LEVER = Lever(
    name="optimizer",
    flags="--optimizer sgd",
    changes="training",
    fit="planned",
    peak_bytes=3 * 2**30,
    smallest_bytes=2**30,
    sample_ms=1.25,
)


def test_what_changes_least_is_first_then_what_is_fastest_and_last_what_does_not_fit() -> None:
    slow = replace(LEVER, changes="rounding", sample_ms=9)
    fast = replace(slow, sample_ms=3)
    near, far = (replace(LEVER, fit="no", changes="nothing", smallest_bytes=size) for size in (5, 6))
    assert ranked([far, LEVER, near, slow, fast]) == (fast, slow, LEVER, near, far)


def test_a_line_says_what_to_write_and_what_it_comes_to() -> None:
    lever = LEVER
    text = format_levers([lever], 4 * 2**30)
    assert "within 4.0 GiB" in text
    assert "--optimizer sgd  fits with recomputation: peak 3.0 GiB, from 1.0 GiB; 1.25 ms per sample" in text
    assert lever.to_json()["flags"] == "--optimizer sgd"
    assert "none is needed" in format_levers([], 2**30)
