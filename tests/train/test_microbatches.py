"""Batches in parts: the training of the whole batch, in less memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.train.runs import metrics, workload
from tightfit.cli.main import main
from tightfit.distributed.process_group import ProcessGroup
from tightfit.train.data.loader import BatchLoader, to_device

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("model", ["lstm-tiny", "gpt-tiny"])
@pytest.mark.parametrize("split", [{"microbatch_size": 3}, {"accumulation_steps": 2}])
def test_microbatches_have_the_gradients_of_the_whole_batch(model: str, split: dict[str, int]) -> None:
    def gradients(**settings: int) -> list[torch.Tensor]:
        work = workload(model=model, batch_size=8, model_args={"dropout": 0.0}, **settings)
        parts = work.loader.microbatches(0)
        assert len(parts) == (3 if "microbatch_size" in settings else settings.get("accumulation_steps", 1))
        for part, share in zip(parts, work.shares(parts), strict=True):
            work.loss.share = share
            work.loss(work.model, to_device(part, work.device)).backward()
        return [p.grad.double() for p in work.model.parameters() if p.grad is not None]

    whole, parts = gradients(), gradients(**split)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_run_in_microbatches_needs_less_and_logs_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        "gpt-tiny",
        "--batch-size",
        "8",
        "--steps",
        "3",
        "--log-every",
        "1",
        "MODEL_ARGS.dropout",
        "0.0",
    ]
    peaks = []
    for mark, split in (("whole", []), ("parts", ["--microbatch-size", "2"])):
        assert main(["train", "--mark", mark, *split, "--json", *words]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["measured_peak_bytes"])
    assert peaks[1] < 0.5 * peaks[0]  # so is the memory of evaluations, which run as many samples at a time
    whole, parts = ([line["loss"] for line in metrics(f"python-source/{mark}")] for mark in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-5)


def test_a_batch_too_small_to_be_split_has_a_plan_that_fits_it() -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]
    words += ["--dataset-args", "count=20", "--batch-size", "16", "--microbatch-size", "4", "--epochs", "2"]
    assert main(["train", *words, "--grad-checkpoint", "full", "--mark", "m", "--log-every", "1"]) == 0
    assert [line["step"] for line in metrics("tests.train.user_code-numbers/m")] == [1, 2, 3, 4]
    work = workload(model="tests.train.user_code:own_loss_model", dataset="tests.train.user_code:numbers",
                    dataset_args={"count": 20}, batch_size=16, microbatch_size=4)  # fmt: skip
    assert work.shares(work.loader.microbatches(1)) == [1.0]


def test_a_custom_loss_says_what_it_is_a_mean_over() -> None:
    work = workload(model="tests.train.user_code:token_mean_model", dataset="tests.train.user_code:ragged_numbers",
                    batch_size=4, microbatch_size=2)  # fmt: skip
    parts = work.loader.microbatches(0)
    counts = [float((part != 0).sum()) for part in parts]
    assert work.shares(parts) == [count / sum(counts) for count in counts]


@pytest.mark.parametrize("model", ["gpt-tiny", "lstm-tiny", "resnet-tiny"])
def test_where_samples_weigh_alike_their_numbers_are_shares_enough(model: str) -> None:
    """So that no process has to ask the others."""

    class Silent(ProcessGroup):
        def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
            raise AssertionError("asked")

    work = workload(model=model, batch_size=8, microbatch_size=2)
    assert work.task.samples_weigh_alike
    for step in (0, work.order.steps_per_epoch - 1):
        found = []
        for rank in range(3):
            loader = BatchLoader(work.data, work.order, samples_at_a_time=2, rank=rank, world_size=3)
            own = replace(work, group=Silent(rank=rank, world_size=3), loader=loader)
            parts = loader.microbatches(step)
            found += [(share, work.task.weight(part)) for share, part in zip(own.shares(parts), parts, strict=True)]
        total = sum(weight for share, weight in found if share)
        expected = [3 * weight / total if share else 0.0 for share, weight in found]
        assert [share for share, _ in found] == pytest.approx(expected, rel=1e-12)
