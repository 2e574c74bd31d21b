"""The `Trainer` of transformers: the same script with one line more trains to the same bits, inside the budget."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from tightfit import BudgetInfeasible, UnsupportedInput  # noqa: E402
from tightfit.device import memory as meter  # noqa: E402
from tightfit.installation.region_forward import RegionForward  # noqa: E402
from tightfit.integrations.transformers import TightfitCallback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]

BUDGET = 2_200_000


class Tokens(Dataset[Any]):
    """Samples of one length, or of three; each draws from the global generator, as augmentation does."""

    def __init__(self, lengths: tuple[int, ...] = (32,)) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> Mapping[str, torch.Tensor]:
        random.random()
        ids = torch.randint(0, 256, (self._lengths[number % len(self._lengths)],))
        return {"input_ids": ids, "labels": ids.clone()}


class Stream(IterableDataset[Any]):
    """Samples without numbers."""

    def __iter__(self) -> Any:
        yield from (Tokens()[number] for number in range(16))


def padded(rows: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(
    callback: TightfitCallback | None, data: Any, change: Callable[[Any], None] = lambda _: None, **options: Any
) -> Any:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, **{"num_train_epochs": 2, "eval_strategy": "epoch", **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model(), arguments, train_dataset=data, eval_dataset=Tokens(), data_collator=padded,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    change(trainer)
    trainer.train()
    return trainer


def check_same(plain: Any, planned: Any) -> None:
    """Every loss, every evaluation, every weight, and the random numbers that come next."""
    names = ("loss", "eval_loss", "grad_norm")
    logged = [[{n: line[n] for n in names if n in line} for line in t.state.log_history] for t in (plain, planned)]
    assert logged[0] == logged[1]
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), planned.model.parameters(), strict=True))
    assert not any(isinstance(vars(module).get("forward"), RegionForward) for module in planned.model.modules())
    assert "compute_loss" not in vars(planned)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=["accumulation", "checkpointing", "bf16"],
)
def test_one_line_and_the_same_bits(options: dict[str, Any]) -> None:
    plain = trained(None, Tokens(), **options)
    end = torch.rand(1), random.random(), np.random.rand()
    callback = TightfitCallback(budget=BUDGET)
    found: list[Any] = []
    planned = trained(callback, Tokens(), lambda trainer: _watch(trainer, callback, found), **options)
    assert (torch.rand(1), random.random(), np.random.rand()) == end
    check_same(plain, planned)
    assert found, "no step was looked at"
    assert [one for one in found if one.replayed_ops + one.recomputed_calls == 0] == []
    assert [one for one in found if one.mismatches + one.unplanned_calls] == []
    assert planned.state.log_history[0]["memory_peak_bytes"] <= BUDGET


def _watch(trainer: Any, callback: TightfitCallback, found: list[Any]) -> None:
    """Note the statistics of each training step."""
    step = trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        if callback.applied is not None:
            callback.applied.statistics.reset()
        loss = step(*args, **kwargs)
        assert callback.applied is not None
        found.append(copy.copy(callback.applied.statistics))
        return loss

    trainer.training_step = watched


@pytest.mark.slow
def test_the_measured_peak_is_within_the_budget() -> None:
    peaks: list[int] = []

    def measure(trainer: Any) -> None:
        step = trainer.training_step

        def measured(*args: Any, **kwargs: Any) -> Any:
            resident = meter.resident_bytes(trainer.model, args[1], trainer.optimizer.optimizer)
            loss, peak_bytes = meter.measure_peak(lambda: step(*args, **kwargs), resident)
            peaks.append(peak_bytes)
            return loss

        trainer.training_step = measured

    trained(TightfitCallback(budget=BUDGET), Tokens((24, 32, 16)), measure, num_train_epochs=1)
    assert max(peaks) <= BUDGET


@pytest.mark.slow
def test_lengths_that_vary_begin_with_the_longest() -> None:
    plain = trained(None, Tokens((16, 24, 32)))
    callback = TightfitCallback(budget=BUDGET)
    shapes: list[str] = []
    planned = trained(
        callback,
        Tokens((16, 24, 32)),
        lambda trainer: trainer.add_callback(_OnBegin(lambda: shapes.append(callback.applied.plan.batch))),
    )
    assert shapes[0].startswith("int64[4x32]")
    check_same(plain, planned)


class _OnBegin(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._action()


@pytest.mark.slow
def test_a_stream_is_planned_by_its_first_batch() -> None:
    options = {"max_steps": 2, "num_train_epochs": 1, "eval_strategy": "no"}
    check_same(trained(None, Stream(), **options), trained(TightfitCallback(budget=BUDGET), Stream(), **options))


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_told_before_the_first_step() -> None:
    callback = TightfitCallback(budget="100KiB")
    trainers: list[Any] = []
    with pytest.raises(BudgetInfeasible):
        trained(callback, Tokens(), trainers.append)
    assert trainers[0].state.global_step == 0
    callback.remove()
    assert "compute_loss" not in vars(trainers[0])


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended only when training begins: before, the trainer imports it."""
    begin = TightfitCallback.on_train_begin
    trainers: list[Any] = []

    def pretending(self: TightfitCallback, *args: Any, **about: Any) -> None:
        trainers[0].is_deepspeed_enabled = True
        begin(self, *args, **about)

    monkeypatch.setattr(TightfitCallback, "on_train_begin", pretending)
    with pytest.raises(UnsupportedInput, match="the Trainer runs DeepSpeed"):
        trained(TightfitCallback(), Tokens(), trainers.append)


def test_who_is_no_trainer_is_told_so() -> None:
    with pytest.raises(UnsupportedInput, match=r"no transformers.Trainer"):
        TightfitCallback().on_train_begin(None, None, None)  # type: ignore[arg-type]


def test_what_the_trainer_notes_of_a_loss_is_not_of_planning() -> None:
    """TRL's trainers append their metrics whenever a loss is computed."""

    class Noting(transformers.Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.notes: dict[str, list[int]] = {"calls": []}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.notes["calls"].append(len(self.notes["calls"]))
            return super().compute_loss(*args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Noting(model(), arguments, train_dataset=Tokens(), data_collator=padded)
    trainer.add_callback(TightfitCallback(budget=BUDGET))
    trainer.train()
    assert trainer.notes["calls"] == [0, 1]


def test_no_host_is_imported_before_it_is_asked_for() -> None:
    hosts = "{'transformers', 'accelerate', 'lightning'}"
    code = f"import sys, tightfit, tightfit.integrations; sys.exit(bool({hosts} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
