"""An interrupted `measure`, `fit` or `verify` leaves everything as it was, bit for bit, whenever that comes."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit import interrupts
from tightfit._torch_private import autograd, dispatch, profiler
from tightfit.interrupts import safe_point, waiting_interrupts
from tightfit.profiling.measure import measure_step
from tightfit.step.snapshot import TrainingState


class Block(nn.Module):
    """Has all that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.dropout = nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Dropout(0.2)
        self.calls = 0
        self.seen: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(random.random() + float(np.random.rand()))
        output: Tensor = inputs + self.dropout(self.up(self.norm(inputs)).tanh())
        return output


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(batch).square().mean()
    return value


class Setting:
    """A model in training, its optimizer, and what can be seen of both."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.batch = torch.randn(8, 16)
        self.model = nn.Sequential(Block(), Block(), Block())
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        loss(self.model, self.batch).backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        found = {name: value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            found[f"gradient {name}"] = parameter.grad.clone()
            for key, value in self.optimizer.state[parameter].items():
                found[f"{key} {name}"] = value.clone()
        return found | {"random": torch.get_rng_state()}

    def others(self) -> dict[str, Any]:
        """Plain attributes, hooks, generators, and what PyTorch holds for this thread and process."""
        generator = np.random.get_state(legacy=False)
        return {
            "modules": [
                (sorted(vars(module)), [len(vars(module)[name]) for name in vars(module) if name.endswith("_hooks")])
                for module in self.model.modules()
            ],
            "attributes": [(block.calls, list(block.seen)) for block in self.model],
            "hooks": [(p._backward_hooks, p._post_accumulate_grad_hooks, p._version) for p in self.model.parameters()],
            "gradients": [id(parameter.grad) for parameter in self.model.parameters()],
            "generators": (random.getstate(), generator["state"]["key"].tolist(), generator["state"]["pos"]),
            "stacks": (dispatch.dispatch_depth(), dispatch.function_mode_depth(), autograd.top_saved_tensor_hooks()),
            "modes": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), autograd.saved_tensor_hooks_allowed()),
            "process": (profiler.profiler_is_running(), gc.isenabled(), gc.get_freeze_count(), signal.getsignal(2)),
            "files": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
        }


def run_measure(one: Setting) -> None:
    tightfit.measure(one.model, one.batch, loss=loss, optimizer=one.optimizer)


def run_measure_for_real(one: Setting) -> None:
    step = tightfit.Step(loss=loss, optimizer=one.optimizer)
    measure_step(one.model, one.batch, step, concrete=True, untimed=True)


def run_fit(one: Setting) -> None:
    tightfit.fit(
        one.model, one.batch, budget="1GiB", loss=loss, optimizer=one.optimizer, grad_checkpoint="full"
    ).remove()


def run_verify(one: Setting) -> None:
    profile = tightfit.measure(one.model, one.batch, loss=loss, optimizer=one.optimizer)
    plan = tightfit.solve(profile, budget_bytes=2**30)
    tightfit.verify(one.model, one.batch, plan, loss=loss, optimizer=one.optimizer)


RUNS = [run_measure, run_measure_for_real, run_fit, run_verify]


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> None:
    """What is frozen may die, so that its count would tell nothing."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _python_handles_interrupts() -> Iterator[None]:
    """As in a terminal: a shell has its background jobs ignore Ctrl-C, and Python then has no handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def require_untouched(run: Callable[[Setting], None], expected: type[BaseException]) -> None:
    """Run it on a new setting: it raises, and changes nothing."""
    one = Setting()
    tensors, others = one.tensors(), one.others()
    with pytest.raises(expected):
        run(one)
    after = one.tensors()
    assert tensors.keys() == after.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], after[name])] == []
    assert one.others() == others


def count_calls(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int | None = None, raised: Any = None) -> Any:
    """Count the calls of a function, and raise at one of them and all later ones."""
    original, counter = getattr(owner, name), itertools.count()

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(counter) >= (float("inf") if at is None else at):
            raise raised
        return original(*args, **kwargs)

    patch.setattr(owner, name, counted)
    return counter


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_an_interrupt_at_a_safe_point(
    run: Callable[[Setting], None], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal is noted before the n-th safe point, whose handler runs there."""
    modules = [
        f"tightfit.{name}" for name in ("step.step", "step.snapshot", "profiling.observed_run", "profiling.costs")
    ]

    def counting(at: int | None) -> Any:
        counter = itertools.count()

        def counted() -> None:
            if next(counter) == at:
                signal.raise_signal(signal.SIGINT)
            safe_point()

        for module in modules:
            monkeypatch.setattr(f"{module}.safe_point", counted)
        return counter

    counter = counting(None)
    run(Setting())
    counting(int(share * next(counter)))
    require_untouched(run, KeyboardInterrupt)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("place", [0, -1])
def test_an_exception_in_a_step_of_the_optimizer(
    run: Callable[[Setting], None], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counter = count_calls(patch, torch.optim.AdamW, "step")
        run(Setting())
    steps = next(counter) - 1  # one is the setting's own
    at = 1 + place % steps
    count_calls(monkeypatch, torch.optim.AdamW, "step", at, ZeroDivisionError)
    require_untouched(run, ZeroDivisionError)


@pytest.mark.parametrize("run", [run_measure_for_real, run_fit, run_verify])
def test_a_signal_while_the_model_is_put_back_waits(
    run: Callable[[Setting], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = TrainingState.restore

    def signalled(self: TrainingState) -> None:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(TrainingState, "restore", restore)
        restore(self)

    monkeypatch.setattr(TrainingState, "restore", signalled)
    require_untouched(run, KeyboardInterrupt)


def test_a_signal_waits_for_a_safe_point_and_a_second_one_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    @waiting_interrupts()
    def interrupted(what: str) -> None:
        with waiting_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        reached.append(f"{what} waits")
        if what == "a safe point":
            safe_point()
        elif what == "a second one":
            signal.raise_signal(signal.SIGINT)
        reached.append(f"{what} ends")

    for what in ("a safe point", "a second one", "the end"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(what)
        assert signal.getsignal(signal.SIGINT) is before
        assert interrupts._pending == []
    assert reached == ["a safe point waits", "a second one waits", "the end waits", "the end ends"]


def test_other_threads_have_no_signals_to_wait_for() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with waiting_interrupts():
            safe_point()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_handler_that_was_set_meanwhile_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        with waiting_interrupts():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("place", ["observed_run.TrainingState", "costs._make_up"])
def test_an_exception_of_a_handler_is_no_failed_trial(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit (`signal.alarm`) raises what is an `Exception`, where those of operations are made do without."""
    module, name = place.split(".")
    home = importlib.import_module(f"tightfit.profiling.{module}")
    real = getattr(home, name)

    def expire(number: int, frame: object) -> None:
        raise TimeoutError

    def late(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)
        interrupts.safe_point()
        return real(*args, **kwargs)

    monkeypatch.setattr(home, name, late)
    before = signal.signal(signal.SIGALRM, expire)
    try:
        with pytest.raises(TimeoutError):
            tightfit.fit(nn.Linear(7, 5), torch.randn(3, 7), loss=lambda model, batch: model(batch).sum())
    finally:
        signal.signal(signal.SIGALRM, before)
