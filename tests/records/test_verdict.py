"""One verdict on several kinds of steps says what each of them would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.records.test_json_codec import some_verdict
from tightfit.records import Verdict


def test_a_verdict_on_several_kinds_of_steps() -> None:
    good = replace(
        some_verdict(), ok=True, compared_share=1.0, differing=(), unverified=(), not_reproducible=(), budget_bytes=100
    )
    small = replace(good, measured_peak_bytes=60, predicted_peak_bytes=70, step_ms=3.0, plain_step_ms=2.0)
    large = replace(good, measured_peak_bytes=90, predicted_peak_bytes=80, step_ms=5.0, plain_step_ms=3.0)
    both = Verdict.of_kinds({"critic": small, "generator": large})
    assert both.ok is True
    assert (both.measured_peak_bytes, both.predicted_peak_bytes) == (90, 80)
    assert both.overhead_ratio == pytest.approx(0.6)
    open_one = replace(small, ok=None, unverified=("layers#0",), plain_peak_source="predicted", compared_share=0.5)
    partly = Verdict.of_kinds({"critic": open_one, "generator": large})
    assert partly.ok is None
    assert partly.plain_peak_source == "predicted"
    assert "layers#0 (critic) cannot be compared alone" in partly.reason
    assert "50% of the gradients" in partly.reason
    wrong = replace(large, ok=False, gradients_equal=False, differing=("gradient of a", "layers#0: output 0"))
    failed = Verdict.of_kinds({"critic": open_one, "generator": wrong})
    assert failed.ok is False
    assert failed.gradients_equal is False
    assert "gradient of a (generator) differ from the plain step's" in failed.reason
    assert "(in layers#0)" in failed.reason
