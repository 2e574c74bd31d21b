"""The `Trainer` of transformers: the same script with one line more trains to the same bits, inside the budget."""

from __future__ import annotations

import copy
import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.utils.memory import should_reduce_batch_size  # noqa: E402  # below the skip

from tests.integrations.llama_trainer import BUDGET, Stream, Tokens, model, padded, trained  # noqa: E402  # below the skip
from tightfit import BudgetInfeasible, UnsupportedInput  # noqa: E402  # below the skip
from tightfit.device import memory as meter  # noqa: E402  # below the skip
from tightfit.installation.region_forward import RegionForward  # noqa: E402  # below the skip
from tightfit.integrations.transformers import TightfitCallback  # noqa: E402  # below the skip

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]


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
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.exhaustive),
        pytest.param({"bf16": True}, marks=pytest.mark.exhaustive),
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


class _OnBegin(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._action()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_resumed_with_batches_grouped_by_length_and_texts_written_in_between() -> None:
    """Half of a training, and the rest of it by another trainer; after each evaluation the model writes."""
    grouped = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in inspect.signature(transformers.TrainingArguments).parameters:
        grouped = {"group_by_length": True}  # type: ignore[dict-item]  # the spelling before version 5
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **grouped}
    options |= {"max_steps": 4}
    texts: dict[str, list[list[int]]] = {}

    def run(name: str, resume: str | None) -> Any:
        callback = None if name == "plain" else TightfitCallback(budget=BUDGET)
        writes = _OnEvaluate(texts.setdefault(name, []))
        return trained(
            callback,
            Tokens((16, 24, 32)),
            lambda trainer: trainer.add_callback(writes),
            resume,
            output_dir=name,
            **options,
        )

    run("plain", None), run("planned", None)
    plain, planned = (run(name, f"{name}/checkpoint-2") for name in ("plain", "planned"))
    check_same(plain, planned)
    assert texts["plain"] == texts["planned"]
    assert len(texts["plain"]) == 3


class _OnEvaluate(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    def __init__(self, texts: list[list[int]]) -> None:
        self._texts = texts

    def on_evaluate(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            self._texts += model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).tolist()


class _Meddling(transformers.TrainerCallback):  # type: ignore[misc]  # untyped
    """Looks at gradients before they are used, and predicts and writes between steps."""

    def __init__(self, trainer: Any, seen: list[tuple[str, Any]]) -> None:
        self._trainer, self._seen = trainer, seen

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self._seen.append(("gradients", [float(p.grad.double().sum()) for p in model.parameters()]))

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self._seen.append(("prediction", float(self._trainer.predict(Tokens((24,))).predictions.sum())))
        self._seen.append(("text", model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).tolist()))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_callbacks_see_and_do_between_steps_is_the_same() -> None:
    """Two data sets are evaluated, too, and the best checkpoint is loaded at the end."""
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "a_loss"}
    seen: dict[str, list[tuple[str, Any]]] = {"plain": [], "planned": []}

    def run(name: str) -> Any:
        def change(trainer: Any) -> None:
            trainer.eval_dataset = {"a": Tokens((16,)), "b": Tokens()}
            trainer.add_callback(_Meddling(trainer, seen[name]))

        callback = None if name == "plain" else TightfitCallback(budget=BUDGET)
        return trained(callback, Tokens((16, 24, 32)), change, output_dir=name, **options)

    plain, planned = run("plain"), run("planned")
    check_same(plain, planned)
    assert seen["plain"] == seen["planned"]
    assert [what for what, _ in seen["plain"]] == ["gradients", "prediction", "text"] * 4
    assert [trainer.state.best_global_step for trainer in (plain, planned)] == [plain.state.best_global_step] * 2


def test_a_budget_that_no_plan_keeps_is_memory_that_ran_out_to_a_trainer_that_looks_for_a_batch() -> None:
    looking = SimpleNamespace(
        args=SimpleNamespace(auto_find_batch_size=True), state=SimpleNamespace(train_batch_size=4)
    )
    with pytest.raises(RuntimeError, match="4 samples") as told, TightfitCallback()._told_to(looking):  # type: ignore[arg-type]  # what it asks of a trainer
        raise BudgetInfeasible(200, 100, "<loss>")
    assert should_reduce_batch_size(told.value)
    looking.args.auto_find_batch_size = False
    with pytest.raises(BudgetInfeasible), TightfitCallback()._told_to(looking):  # type: ignore[arg-type]  # what it asks of a trainer
        raise BudgetInfeasible(200, 100, "<loss>")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_trainer_that_looks_for_a_batch_that_fits_finds_one() -> None:
    """By its own search, for which the callback plans the largest batch of the size that it has come to."""
    with pytest.raises(BudgetInfeasible) as told:
        trained(TightfitCallback(budget="100KiB"), Tokens(), max_steps=1)
    callback = TightfitCallback(budget=told.value.required_bytes - 1)
    options = {"max_steps": 2, "eval_strategy": "no"}
    planned = trained(callback, Tokens(), auto_find_batch_size=True, **options)
    assert planned.state.train_batch_size == 3
    check_same(trained(None, Tokens(), per_device_train_batch_size=3, **options), planned)


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


def test_a_model_that_the_trainer_compiles_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match=r"Leave `torch_compile` out"):
        trained(TightfitCallback(), Tokens(), torch_compile=True)


def test_who_is_no_trainer_is_told_so() -> None:
    with pytest.raises(UnsupportedInput, match=r"no transformers.Trainer"):
        TightfitCallback().on_train_begin(None, None, None)  # type: ignore[arg-type]  # the mistake that is told


def test_what_the_trainer_notes_of_a_loss_is_not_of_planning() -> None:
    """TRL's trainers append their metrics whenever a loss is computed; others add up tensors in place."""

    class Noting(transformers.Trainer):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.notes: dict[str, list[int]] = {"calls": []}
            self.sums = {"train": {"steps": torch.tensor(0)}}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.notes["calls"].append(len(self.notes["calls"]))
            self.sums["train"]["steps"] += 1
            return super().compute_loss(*args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Noting(model(), arguments, train_dataset=Tokens(), data_collator=padded)
    trainer.add_callback(TightfitCallback(budget=BUDGET))
    trainer.train()
    assert trainer.notes["calls"] == [0, 1]
    assert trainer.sums["train"]["steps"] == 2


@pytest.mark.slow
def test_a_model_that_only_the_loss_knows_is_in_the_budget() -> None:
    """As the reference in DPO."""

    class Distilling(transformers.Trainer):  # type: ignore[misc]  # untyped
        teacher = None

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            with torch.no_grad():
                teachers = self.teacher(**inputs).loss
            return loss + teachers

    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Distilling(model(), arguments, train_dataset=Tokens(), data_collator=padded)
    trainer.teacher = model()
    callback = TightfitCallback(budget="8MiB")
    trainer.add_callback(callback)
    found: list[int] = []
    trainer.add_callback(_OnBegin(lambda: found.append(callback.applied.profile.baseline["reached"])))
    trainer.train()
    assert found == [meter.resident_bytes(trainer.teacher)]


def test_no_host_is_imported_before_it_is_asked_for() -> None:
    hosts = "{'transformers', 'accelerate', 'lightning'}"
    code = f"import sys, tightfit, tightfit.integrations; sys.exit(bool({hosts} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
