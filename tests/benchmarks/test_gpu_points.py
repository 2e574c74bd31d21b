"""The points measured on GPUs: how tables are read, and how right and wrong answers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_points.answers import Answer
from benchmarks.gpu_points.megatron_models import Rank, Sizes
from benchmarks.gpu_points.points import Outcome, Point
from benchmarks.gpu_points.table import format_summary, summary
from benchmarks.gpu_points.tables import points_of
from tightfit.simulation.training_loop import Clearing

COLUMNS = "model,batch,optimizer,family_kind,zero_grad_mode,iterations,card,nvml_delta_peak_bytes,real_oom,xmem_bytes"
XMEM = f"""{COLUMNS},cap_outcomes
VGG16,8,SGD,cnn,1,4,NVIDIA GeForce RTX 3060,1000,0,900,800:OOM;950:ok
T5-small,2,AdamW,lm,,4,NVIDIA GeForce RTX 4060,5000,1,,700:OOM;700:ok
"""
LITGPT = """model,method,devices,micro_batch,grad_accumulation_iters,peak_bytes_approx,states_GB_arithmetic
phi-3 (Phi-3-mini),full,1,4,2,1000,30.6
phi-2,full,2,4,1,1000,22.2
gemma-2b,LoRA,1,2,3,1000,5.0
"""
OTHERS = """group,model,batch,seq,precision,checkpointing,parallel,value,gib
syssim-gh200,llama3-8b,1,8192,bf16,recompute full,2 nodes TP4 DP2 ZeRO-1,2.5,
syssim-gh200,llama3-8b,1,8192,bf16,recompute none,1 GPU,OOM,
torchtitan,Llama3.1-8B,2,8192,bf16 mp (eager),selective AC,FSDP 128,67.0,67.0
torchtitan,Llama3.1-8B,2,8192,bf16 mp (compile),selective AC,FSDP 8,77.0,77.0
torchtune,Llama3.1-8B,2,2048,bf16,see recipe,1 GPU,18.9,18.9
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


def test_peaks_of_other_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "litgpt.csv").write_text(LITGPT)
    (tmp_path / "others.csv").write_text(OTHERS)
    too_little, sharded, lora, fits, fails, eager, compiled = points_of(tmp_path)
    assert too_little.contradicts_itself  # 30.6 GB of weights and states alone
    assert not sharded.contradicts_itself  # over two GPUs they may be less
    assert (sharded.processes, sharded.clearing) == (2, Clearing.LAST)
    assert (lora.clearing, lora.peak_bytes, lora.is_allocated) == (Clearing.NEVER, 1000, True)
    assert (fits.peak_bytes, fits.outcomes) == (2_500_000_000, (Outcome(None, True),))
    assert (fails.peak_bytes, fails.outcomes) == (None, (Outcome(None, False),))
    assert (eager.processes, eager.no_answer, eager.is_allocated) == (128, "", False)
    assert compiled.no_answer

    asked = [too_little, lora, compiled]
    answers = [
        Answer(too_little.name, allocated_bytes=31, reserved_bytes=40),
        Answer(lora.name, allocated_bytes=1010, reserved_bytes=2000),
        Answer(compiled.name, problem=compiled.no_answer),
    ]
    found = summary(asked, answers)
    assert found["litgpt"]["uncapped_rows"] == 1
    assert found["litgpt"]["uncapped_error_median"] == pytest.approx(0.01)
    assert found["torchtitan"]["rows_without_answer"] == [compiled.name]
    assert "uncapped allocated" in format_summary(asked, answers, found)


def test_a_rank_of_megatron_is_a_whole_model() -> None:
    """A part for each tensor-parallel rank; fp32 states are divided among those that have the same part."""
    sizes = Sizes(layers=1, hidden=16, heads=4, groups=2, feed_forward=32, tokens=8, positions=8, vocabulary=64)
    whole = Rank(sizes, tensor=1, data=1, recomputes=False)
    part = Rank(sizes, tensor=2, data=2, recomputes=True)
    assert part.output.weight.shape[0] * 2 == whole.output.weight.shape[0]
    assert part.output.get_buffer("weight_state0").numel() * 4 == whole.output.weight.numel()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    losses = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        model = Rank(sizes, tensor=1, data=1, recomputes=recomputes).to_empty(device="cpu")
        for tensor in (*model.parameters(), *(one for name, one in model.named_buffers() if "weight" in name)):
            torch.nn.init.normal_(tensor.detach(), std=0.1) if tensor.is_floating_point() else None
        for name, tensor in model.named_buffers():
            tensor.zero_() if "main" in name or "mask" in name or "bias" in name else None
        loss = model(tokens, tokens, tokens)
        loss.backward()
        assert all(one.abs().sum() > 0 for name, one in model.named_buffers() if name.endswith("weight_main"))
        losses.append(loss.item())
    assert losses[0] == losses[1]


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
