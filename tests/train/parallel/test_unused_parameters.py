"""Which parameters steps reach, and what becomes of a run in which one leaves out what others had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tightfit
from tests.train import user_code
from tests.train.launch.launching import TWO, finish, metrics, run, start
from tightfit.step.step import Step
from tightfit.train.parallel.unused_parameters import UnusedParameters, find_unused_parameters

WORDS = ["train", "--dataset", "tests.train.user_code:numbers", "--batch-size", "8", "--steps", "60", "--model"]


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (user_code.own_loss_model, UnusedParameters.NONE),
        (user_code.odd_model, UnusedParameters.SAME),
        (user_code.leaves_out_by_data, UnusedParameters.VARYING),
        (user_code.leaves_out_at_random, UnusedParameters.VARYING),
    ],
)
def test_what_is_known_of_steps(factory: type[torch.nn.Module], expected: UnusedParameters) -> None:
    batch = (torch.randn(8, 4), torch.randn(8, 1))
    model = factory()
    with tightfit.fit(model, batch, budget="1GiB") as applied:
        assert find_unused_parameters(model, batch, applied, Step()) is expected
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_each_step_may_use_other_parameters() -> None:
    """Not the same in the two processes, either."""
    ended = run(*WORDS, "tests.train.user_code:leaves_out_at_random", *TWO, "--mark", "two")
    assert "arning" not in ended.err


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_gradients_that_were_not_all_reduced_are_not_used() -> None:
    words = [*WORDS, "tests.train.user_code:leaves_out_later", *TWO, "--mark", "two"]
    words += ["--save-every", "1", "--log-every", "1"]
    ended = finish(start(*words))
    assert ended.code == 1
    assert ended.err.count("--ddp-find-unused-parameters on") == 1, ended.err
    assert "Traceback" not in ended.err
    steps = metrics("two", "tests.train.user_code-numbers")
    latest = Path("runs/tests.train.user_code-numbers/two/checkpoints/latest")
    assert latest.resolve().name == f"step-{len(steps):08}"  # the last one that changed anything
    last = len(steps) + 2
    run(*words, "--steps", str(last), "--resume", "auto", "--ddp-find-unused-parameters", "on")
    assert [line["step"] for line in metrics("two", "tests.train.user_code-numbers")] == list(range(1, last + 1))
