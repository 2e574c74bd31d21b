"""The points measured on GPUs: how tables are read, and how right and wrong answers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_points.answers import Answer
from benchmarks.gpu_points.points import Outcome, Point, points_of
from benchmarks.gpu_points.table import format_summary, summary
from tightfit.simulation.training_loop import Clearing

COLUMNS = "model,batch,optimizer,family_kind,zero_grad_mode,iterations,card,nvml_delta_peak_bytes,real_oom,xmem_bytes"
XMEM = f"""{COLUMNS},cap_outcomes
VGG16,8,SGD,cnn,1,4,NVIDIA GeForce RTX 3060,1000,0,900,800:OOM;950:ok
T5-small,2,AdamW,lm,,4,NVIDIA GeForce RTX 4060,5000,1,,700:OOM;700:ok
"""
TIMM = "model,img_size,batch_fit,batch_fail\nresnet50d,224,384,512\n"


@pytest.fixture
def points(tmp_path: Path) -> list[Point]:
    (tmp_path / "xmem.csv").write_text(XMEM)
    (tmp_path / "timm_brackets.csv").write_text(TIMM)
    return list(points_of(tmp_path))


def test_every_row_is_read(points: list[Point]) -> None:
    vision, language, fits, fails = points
    assert (vision.card, vision.image_size, vision.clearing) == ("rtx3060-12gb", 86, Clearing.BEFORE_BACKWARD)
    assert vision.outcomes == (Outcome(800, False), Outcome(950, True), Outcome(None, True))
    assert vision.peak_bytes == 1000
    assert language.image_size is None
    assert language.peak_bytes is None  # the run ended out of memory
    assert language.contradicts_itself
    assert not vision.contradicts_itself
    assert (fits.batch_size, fits.outcomes[0].ok) == (384, True)
    assert (fails.batch_size, fails.outcomes[0].ok) == (512, False)


def test_answers_are_counted_apart_and_a_missing_one_is_wrong(points: list[Point]) -> None:
    answers = [
        Answer(points[0].name, reserved_bytes=1100, fits=[True, True, False], fits_live=[True, True, True]),
        Answer(points[1].name, problem="cannot be built"),
        Answer(points[2].name, fits=[True], fits_live=[True]),
        Answer(points[3].name, fits=[False], fits_live=[True]),
    ]
    found = summary(points, answers)
    assert found["xmem"]["reserved"] == {"right": 1, "share": 1 / 6, "false_fits": 1, "false_does_not": 1}
    assert found["xmem"]["rows_without_answer"] == [points[1].name]
    assert found["xmem"]["rows_that_contradict_themselves"] == [points[1].name]
    assert found["xmem"]["uncapped_error_worst"] == pytest.approx(0.1)
    assert found["xmem"]["xmem"]["right"] == 3  # 900 bytes: too much for 800, enough for 950 and the card
    assert found["timm"]["reserved"]["right"] == 2
    assert found["timm"]["allocated_alone"]["false_fits"] == 1
    text = format_summary(points, answers, found)
    assert all(point.name in text for point in points)
