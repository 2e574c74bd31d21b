"""`tightfit verify`: planned steps equal plain ones bit for bit, inside the budget, for each family of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import tightfit
from tests.train.runs import workload
from tightfit.cli.main import main
from tightfit.solver.solver import Solver
from tightfit.train import TrainConfig, build, resolve

CONFIGS = Path(__file__).parent.parent / "configs"

#: Each family's settings. gpt and GPT-2 drop out; resnet has BatchNorm in train mode and in-place ReLU.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt-tiny", "batch_size": 4},
    "resnet": {"model": "resnet-tiny", "batch_size": 8},
    "lstm": {"model": "lstm-tiny", "batch_size": 8},
    "llama": {"model": f"transformers:{CONFIGS / 'llama.json'}", "batch_size": 4, "sequence_length": 64},
    "gpt2": {"model": f"transformers:{CONFIGS / 'gpt2.json'}", "batch_size": 4, "sequence_length": 64},
}

#: How far a budget lies between the smallest that can be run (0) and what the plain step needs (1).
TIGHTNESS = {"tight": 0.1, "middle": 0.5, "ample": 1.5}


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def extremes() -> dict[str, tuple[int, int]]:
    """Smallest and plain peak of each family, filled as the tests need them."""
    return {}


def budget_of(family: str, tightness: str, known: dict[str, tuple[int, int]]) -> int:
    if family not in known:
        work = workload(**FAMILIES[family])
        batch, loss = work.microbatch(0).batch, work.task.loss
        solver = Solver(tightfit.measure(work.model, batch, loss=loss, optimizer=work.optimizer))
        known[family] = (solver.minimum_budget()[0], solver.plain(0).plain_peak_bytes)
    smallest_bytes, plain_bytes = known[family]
    return smallest_bytes + int((plain_bytes - smallest_bytes) * TIGHTNESS[tightness])


@pytest.mark.parametrize(
    ("family", "tightness"),
    [
        *((family, "tight") for family in FAMILIES if family not in ("gpt2", "gpt")),
        pytest.param("gpt2", "tight", marks=pytest.mark.exhaustive),  # as llama, which is of transformers, too
        pytest.param("gpt", "tight", marks=pytest.mark.exhaustive),
        ("gpt", "middle"),
        pytest.param("resnet", "middle", marks=pytest.mark.exhaustive),
        ("gpt", "ample"),
    ],
)
@pytest.mark.slow
def test_three_steps_equal_plain_inside_the_budget(
    family: str, tightness: str, extremes: dict[str, tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    budget_bytes = budget_of(family, tightness, extremes)
    plain_bytes = extremes[family][1]
    words = [word for name, value in FAMILIES[family].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code, verdict = run_json(capsys, "verify", *words, "--memory", str(budget_bytes), "--reference-memory", "50%")
    assert code == 0, verdict
    assert verdict["method"] == "whole-step"
    assert verdict["steps"] == 3
    assert verdict["plain_reproducible"]
    for what in ("loss", "gradients", "buffers", "rng"):
        assert verdict[f"{what}_equal"] is True, what
    assert verdict["max_abs_difference"] == 0
    assert verdict["measured_peak_bytes"] <= budget_bytes
    assert verdict["plain_peak_bytes"] == pytest.approx(plain_bytes, rel=0.02)
    assert (verdict["replayed_ops"] > 0) == (budget_bytes < plain_bytes)


def test_the_peak_holds_by_a_meter_that_is_not_ours() -> None:
    """The peak of a real step from the profiler's own trace, without tightfit's meter."""
    config, source = resolve(TrainConfig(model="gpt-tiny", batch_size=8))
    work = build(config, source)
    batch = work.microbatch(0).batch
    plain_bytes = tightfit.fit(work.model, batch, loss=work.task.loss, optimizer=work.optimizer).plan.plain_peak_bytes
    work = build(config, source)
    budget_bytes = int(plain_bytes * 0.6)
    applied = tightfit.fit(work.model, batch, budget=budget_bytes, loss=work.task.loss, optimizer=work.optimizer)

    def step() -> None:
        work.optimizer.zero_grad(set_to_none=False)
        applied.loss(work.model, batch).backward()
        work.optimizer.step()

    step()
    tensors = [*work.model.parameters(), *work.model.buffers(), batch]
    tensors += [parameter.grad for parameter in work.model.parameters()]
    tensors += [value for state in work.optimizer.state.values() for value in state.values()]
    before_bytes = sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = sorted(
        (event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    level_bytes = peak_bytes = before_bytes
    for event in events:
        level_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, level_bytes)
    assert plain_bytes * 0.4 < peak_bytes <= budget_bytes
