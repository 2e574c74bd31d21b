"""What a run can be asked to do beyond taking steps: each feature has its effect, and resuming is exact with all on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from tests.train.runs import metrics, weights, workload
from tightfit.cli.main import main
from tightfit.step.microbatch import Microbatch
from tightfit.train.ema import MovingAverage
from tightfit.train.optimizers import make_optimizer
from tightfit.train.schedules import lr_at

RESNET = ["--model", "resnet-tiny", "--batch-size", "8", "--log-every", "1"]
LSTM = ["--model", "lstm-tiny", "--batch-size", "8", "--log-every", "1"]
OWN = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:numbers"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ optimizer, schedule


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("adafactor", torch.optim.Adafactor),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_every_optimizer_trains_within_its_budget(name: str, kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LSTM, "--steps", "2", "--optimizer", name, "--lr", "0.01", "--memory", "64MiB", "--json"]
    assert main(["train", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["measured_peak_bytes"] <= document["budget_bytes"]
    assert isinstance(workload(model="lstm-tiny", optimizer=name).optimizer, kind)


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    made = make_optimizer("adamw", model, lr=0.1, weight_decay=0.5, momentum=0.9, beta2=0.95)
    decay = {p.dim(): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decay == {2: 0.5, 1: 0.0}
    assert made.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_in_a_line_and_ends_where_it_shall(schedule: Any) -> None:
    rates = [
        lr_at(step, total_steps=20, highest=2.0, schedule=schedule, warmup_steps=4, min_ratio=0.1) for step in range(20)
    ]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    middle = {"constant": 2.0, "linear": 1.1, "cosine": 1.1}
    assert rates[11] == pytest.approx(middle[schedule])


def test_the_logged_learning_rate_is_the_schedules() -> None:
    words = ["--steps", "4", "--schedule", "linear", "--warmup-steps", "2", "--lr", "0.1"]
    assert main(["train", *LSTM, *words, "--mark", "m"]) == 0
    assert [line["lr"] for line in metrics("co2/m")] == pytest.approx([0.05, 0.1, 0.05, 0.0])


def test_gradients_are_clipped_and_their_norm_is_logged() -> None:
    words = ["--steps", "2", "--clip-norm", "1e-3", "--optimizer", "sgd", "--weight-decay", "0", "--mark", "m"]
    assert main(["train", *LSTM, *words]) == 0
    before = workload(model="lstm-tiny", batch_size=8).model.state_dict()
    after = weights("co2/m")
    moved = math.sqrt(sum(float((after[name] - before[name]).pow(2).sum()) for name in after))
    assert 0 < moved < 3 * 1e-3 * 1e-3  # two steps, momentum 0.9, learning rate 1e-3
    assert all(line["gradient_norm"] > 1e-3 for line in metrics("co2/m"))


def test_bf16_computes_in_bf16_and_keeps_weights_in_32_bits() -> None:
    assert main(["train", *OWN, "--steps", "2", "--log-every", "1", "--precision", "bf16", "--mark", "bf16"]) == 0
    assert main(["train", *OWN, "--steps", "2", "--log-every", "1", "--mark", "fp32"]) == 0
    losses = [[line["loss"] for line in metrics(f"tests.train.user_code-numbers/{mark}")] for mark in ("bf16", "fp32")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights("tests.train.user_code-numbers/bf16").values())


def test_fp16_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *LSTM, "--precision", "fp16", "--device", "cpu"]) == 2
    assert "--precision bf16" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.slow
def test_each_epoch_ends_with_an_evaluation_and_the_best_is_linked(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RESNET, "--batch-size", "512", "--epochs", "2", "--lr", "0.01", "--save-every", "1000", "--mark", "m"]
    assert main(["train", *words, "--json"]) == 0
    lines = metrics("digits/m")
    judged = [line for line in lines if "eval" in line]
    assert [line["step"] for line in judged] == [3, 6]
    assert all(0 <= line["eval"]["accuracy"] <= 1 and line["eval"]["samples"] > 300 for line in judged)
    document = json.loads(capsys.readouterr().out)
    best = max(judged, key=lambda line: line["eval"]["accuracy"])
    assert (document["best"], document["best_step"]) == (best["eval"]["accuracy"], best["step"])
    link = Path("runs/digits/m/checkpoints/best")
    assert link.resolve().name == f"step-{best['step']:08d}"


def test_evaluations_leave_no_trace_in_the_training() -> None:
    assert main(["train", *RESNET, "--steps", "4", "--eval-every", "1", "--mark", "often"]) == 0
    assert main(["train", *RESNET, "--steps", "4", "--mark", "once"]) == 0
    often, once = weights("digits/often"), weights("digits/once")
    assert all(torch.equal(often[name], once[name]) for name in once)


def test_a_run_stops_when_it_no_longer_improves(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LSTM, "--steps", "50", "--eval-every", "2", "--early-stop", "2", "--lr", "1e-12", "--json"]
    assert main(["train", *words, "--mark", "m"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stopped_early"] is True
    assert document["steps"] == document["best_step"] + 4 < 50
    assert (Path("runs/co2/m/checkpoints") / f"step-{document['steps']:08d}").is_dir()


@pytest.mark.parametrize("flag", [["--eval-every", "2"], ["--early-stop", "2"]])
def test_there_must_be_something_to_evaluate_on(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *OWN, *flag]) == 2
    assert "holds nothing out to evaluate on" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_other_data_can_be_evaluated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("other words " * 50)
    words = ["--model", "gpt-tiny", "--steps", "1", "--batch-size", "2", "--sequence-length", "16"]
    assert main(["train", *words, "--eval-dataset", "other.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval"]["bits_per_byte"] > 1
    assert main(["train", *words, "--eval-dataset", "digits", "--mark", "n"]) == 2
    assert "Evaluate on data of the same kind" in capsys.readouterr().err


def test_a_factory_may_hold_samples_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:divided_numbers"]
    assert main(["train", *words, "--steps", "2", "--eval-every", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval"]["loss"] > 0


# ------------------------------------------------------------------------------------------------ moving average


def test_the_average_is_what_is_saved_and_follows_its_rule() -> None:
    model = nn.Linear(2, 1, bias=False)
    average = MovingAverage(model, 0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    average.update(1)
    decay = 1 / 10
    assert torch.allclose(average.state_dict()["weight"], decay * start + (1 - decay) * (start + 1))
    own = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight.detach(), average.state_dict()["weight"]) is False
        assert not torch.equal(model.weight.detach(), own)
    assert torch.equal(model.weight.detach(), own)


def test_the_average_counts_in_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for mark, flags in (("plain", []), ("average", ["--ema-decay", "0.99"])):
        words = [*LSTM, "--steps", "2", "--memory", "64MiB", "--json", "--mark", mark, *flags]
        assert main(["train", *words]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["measured_peak_bytes"] <= document["budget_bytes"]
        peaks.append(document["measured_peak_bytes"])
    model = workload(model="lstm-tiny").model
    assert peaks[1] - peaks[0] == sum(p.nbytes for p in model.parameters())
    plain, average = weights("co2/plain"), weights("co2/average")
    assert any(not torch.equal(plain[name], average[name]) for name in plain)
    assert [line["loss"] for line in metrics("co2/plain")] == [line["loss"] for line in metrics("co2/average")]


# ------------------------------------------------------------------------------------------------ resume, rerun


EVERYTHING = [
    "--schedule", "cosine", "--warmup-steps", "2", "--clip-norm", "0.5", "--microbatch-size", "3", "--ema-decay", "0.9",
    "--eval-every", "2", "--grad-checkpoint", "full", "--workers", "1",
]  # fmt: skip


def same_files(one: str, other: str) -> None:
    a, b = (Path("runs") / run / "model.safetensors" for run in (one, other))
    assert a.read_bytes() == b.read_bytes()
    times = {"step_ms", "samples_per_second", "recompute_ratio", "peak_bytes", "memory_now_bytes", "budget_bytes"}

    def lines(run: str) -> list[dict[str, Any]]:
        return [
            {
                key: {k: v for k, v in value.items() if k != "peak_bytes"} if key == "eval" else value
                for key, value in line.items()
                if key not in times
            }
            for line in metrics(run)
        ]

    assert lines(one) == lines(other)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_with_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*RESNET, *EVERYTHING, "--steps", "5", "--save-every", "2"]
    assert main(["train", *words, "--mark", "whole"]) == 0
    from tightfit.train.loop import OptimizerStep

    take = OptimizerStep.take
    taken: list[int] = []

    def failing(self: OptimizerStep, microbatches: list[Microbatch]) -> Any:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return take(self, microbatches)

    monkeypatch.setattr(OptimizerStep, "take", failing)
    assert main(["train", *words, "--mark", "parts"]) == 130
    monkeypatch.setattr(OptimizerStep, "take", take)
    checkpoint = "runs/digits/parts/checkpoints/step-00000002"
    assert main(["train", *words, "--mark", "parts", "--resume", checkpoint]) == 0
    same_files("digits/whole", "digits/parts")
    a, b = (
        json.loads((Path("runs/digits") / mark / "checkpoints/latest/state.json").read_text())["progress"]
        for mark in ("whole", "parts")
    )
    assert a == b


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_saved_configuration_runs_the_run_again() -> None:
    assert main(["train", *RESNET, *EVERYTHING, "--steps", "3", "--mark", "first"]) == 0
    assert main(["train", "--config-file", "runs/digits/first/config.yaml", "--mark", "second"]) == 0
    same_files("digits/first", "digits/second")


def test_workers_change_nothing() -> None:
    words = ["--model", "tests.train.user_code:own_loss_model", "--dataset", "tests.train.user_code:noisy_numbers"]
    words += ["--steps", "4", "--log-every", "1"]
    assert main(["train", *words, "--mark", "none"]) == 0
    assert main(["train", *words, "--mark", "some", "--workers", "2"]) == 0
    same_files("tests.train.user_code-noisy_numbers/none", "tests.train.user_code-noisy_numbers/some")


# ------------------------------------------------------------------------------------------------ dry run, screen


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt-tiny", "--batch-size", "4", "--epochs", "2", "--memory", "2800KiB", "--dry-run"]
    assert main(["train", *words]) == 0
    text = capsys.readouterr().out
    for part in ("parameters", "causal-lm", "int64[4x65]", "peak at", "an epoch", "nothing was written"):
        assert part in text, part
    assert main(["train", *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 2 * document["steps_per_epoch"]
    assert document["predicted_peak_bytes"] <= document["budget_bytes"] == 2800 * 2**10 < document["plain_peak_bytes"]
    assert sum(document["parts_of_peak"].values()) == document["predicted_peak_bytes"]
    assert not Path("runs").exists()


def test_a_quiet_run_shows_the_end_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *LSTM, "--steps", "2", "--quiet", "--mark", "m"]) == 0
    out = capsys.readouterr().out
    assert "step 1/2" not in out
    assert "run folder" in out
    assert "step 1/2" in Path("runs/co2/m/log.txt").read_text()


def test_tensorboard_gets_every_logged_number() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", *LSTM, "--steps", "3", "--tensorboard", "--eval-every", "3", "--mark", "m"]) == 0
    events = EventAccumulator("runs/co2/m/tensorboard")
    events.Reload()
    assert {"loss", "lr", "peak_bytes", "eval/rmse"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in metrics("co2/m")]
    )


def test_a_verbose_run_shows_what_planning_does(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    try:
        words = ["--model", "tests.train.user_code:token_mean_model", "--batch-size", "4", "--steps", "10", "--verbose"]
        assert main(["train", *words, "--dataset", "tests.train.user_code:ragged_numbers", "--memory", "400KiB"]) == 0
    finally:
        logging.getLogger("tightfit").setLevel(logging.NOTSET)
    assert any("planned" in record.message for record in caplog.records)


def test_tensorboard_is_asked_for_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["train", *LSTM, "--tensorboard"]) == 2
    assert "tightfit[tensorboard]" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_deterministic_settings_end_with_the_run() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    assert main(["train", *LSTM, "--steps", "1", "--deterministic"]) == 0
    assert torch.are_deterministic_algorithms_enabled() == before


# ------------------------------------------------------------------------------------------------ preflight, disk


def test_the_largest_batch_is_planned_first_and_named_if_it_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tests.train.user_code:token_mean_model", "--dataset", "tests.train.user_code:ragged_numbers"]
    words += ["--batch-size", "4", "--steps", "12", "--log-every", "1"]
    assert main(["train", *words, "--memory", "120KiB", "--grad-checkpoint", "off"]) == 2
    said = capsys.readouterr().err
    assert "the largest of the run" in said
    assert "[4x400]" in said
    assert " 37" in said  # the long sample's number
    assert "--microbatch-size" in said
    assert not Path("runs").exists()


def fails_with(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", *LSTM, "--steps", "2", "--save-every", "1", "--mark", "m"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("tightfit.train.checkpoint.save_file", fails_with(error))
        assert main(["train", *LSTM, "--steps", "4", "--save-every", "1", "--mark", "m", "--resume"]) == 1
    said = capsys.readouterr().err
    assert "could not be written" in said
    assert "--resume auto" in said
    assert "Traceback" not in said
    state = json.loads(Path("runs/co2/m/checkpoints/latest/state.json").read_text())
    assert state["step"] == 2
