"""An installed forward is the model's own to everybody who looks; who goes round it computes right, and is told."""

from __future__ import annotations

import functools
import gc
import inspect
import typing
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.support.chains import ResidualMLP
from tightfit.errors import PromiseWarning
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor
BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
METHOD = ("__self__", "__code__", "__defaults__", "__kwdefaults__")
NAMES = ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__", *METHOD)


class Net(ResidualMLP):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        """Return a scalar."""
        return super().forward(x) * scale + shift


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net(2)


@pytest.fixture
def applied(model: Net) -> Iterator[tightfit.Applied]:
    plan = full_plan(tightfit.measure(model, BATCH), 2**30)
    with tightfit.apply(model, plan) as applied:
        yield applied


def look(forward: Callable[..., Any]) -> dict[str, Any]:
    """What libraries read of a forward."""
    return {
        **{name: getattr(forward, name) for name in NAMES},
        "signature": inspect.signature(forward),
        "specification": inspect.getfullargspec(forward),
        "hints": typing.get_type_hints(forward),
        "source": inspect.getsource(forward),
    }


def test_every_installed_forward_looks_like_the_original(model: Net) -> None:
    before = {name: look(module.forward) for name, module in model.named_modules()}
    with tightfit.apply(model, full_plan(tightfit.measure(model, BATCH), 2**30)) as applied:
        installed = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert installed == ["", "blocks.0", "blocks.1"]
        for name in installed:
            assert look(model.get_submodule(name).forward) == before[name]
        assert not hasattr(model.forward, "__wrapped_by__")
        assert applied.statistics.taped_ops == 0


def test_measuring_shows_the_model_its_own_signature() -> None:
    seen: list[list[str]] = []

    class Curious(Net):
        def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
            seen.append(list(inspect.signature(self.forward).parameters))
            return super().forward(x, scale, shift=shift)

    with tightfit.fit(Curious(2), BATCH, grad_checkpoint="full"):
        assert len(seen) > 3
        assert all(parameters == ["x", "scale", "shift"] for parameters in seen)


def test_transformers_generates_the_same_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained("tests/configs/llama.json", pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    prompt = torch.randint(1, 200, (2, 6))
    prompt[0, :4] = 0

    def tokens() -> Tensor:
        with torch.no_grad():
            return model.eval().generate(prompt, max_new_tokens=4, do_sample=False)  # type: ignore[no-any-return]  # transformers is not typed here

    plain = tokens()
    ids = torch.randint(1, 200, (2, 8))
    with tightfit.fit(model.train(), {"input_ids": ids, "labels": ids}, grad_checkpoint="full") as applied:
        assert applied.installed
        assert torch.equal(tokens(), plain)
        assert {"input_ids", "attention_mask", "labels"} <= set(
            inspect.signature(model.forward).parameters
        )  # Trainer's


def accelerate_wraps(model: nn.Module) -> None:
    """As accelerate does for mixed precision."""
    vars(model)["_original_forward"] = model.forward
    inner = model.forward.__func__ if hasattr(model.forward, "__func__") else model.forward

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = MethodType(wrapper, model) if inner is not model.forward else wrapper  # type: ignore[method-assign]  # as accelerate does it


def accelerate_unwraps(model: nn.Module) -> None:
    """As `accelerate.utils.extract_model_from_parallel` does with ``keep_fp32_wrapper=False``."""
    forward: Any = model.forward
    original = vars(model).pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]  # as accelerate does it


def test_wrapped_and_unwrapped_by_others_it_stays_planned(model: Net, applied: tightfit.Applied) -> None:
    expected = inspect.signature(model.forward)
    with applied.paused():
        plain = model(BATCH)
    for change in (accelerate_wraps, accelerate_unwraps):
        change(model)
        applied.statistics.reset()
        result = model(BATCH)
        assert torch.equal(result, plain)
        assert applied.statistics.dropped_slots > 0
        assert inspect.signature(model.forward) == expected
    applied.remove()
    applied.statistics.reset()
    model(BATCH).backward()  # somebody else's wrapper still calls the forward that was installed
    assert applied.statistics.taped_ops == 0


def ways_round(model: Net) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "__wrapped__": model.forward.__wrapped__,  # type: ignore[attr-defined]  # a forward that is installed has it
        "the class's own": lambda x: type(model).forward(model, x),
        "export": lambda x: torch.export.export(model, (x,)).module()(x),
        "trace": lambda x: torch.jit.trace(model, (x,))(x),  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", ["__wrapped__", "the class's own", "export", "trace"])
def test_a_step_that_goes_round_is_right_and_told_once(way: str, model: Net, applied: tightfit.Applied) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        plain = model(BATCH)
    forward = ways_round(model)[way]

    def step() -> Tensor:
        result: Tensor = forward(BATCH)
        result.backward()  # type: ignore[no-untyped-call]  # PyTorch's is not annotated
        optimizer.step()
        return result.detach()

    with pytest.warns(PromiseWarning, match=r"right, but .*fit\.") as told:
        result = step()
    assert torch.equal(result, plain)
    assert len([one for one in told if one.category is PromiseWarning]) == 1
    optimizer.zero_grad()
    step()


def test_planned_training_is_silent(model: Net, applied: tightfit.Applied) -> None:
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (model.blocks, model.head))
    for _ in range(2):
        for _ in range(2):  # accumulation
            model(BATCH).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.step()  # again, with the same gradients
            optimizer.zero_grad()
        with torch.no_grad():
            model.blocks[0](BATCH)
        model.eval()
        model.blocks[0](BATCH)
        model.train()
    with applied.paused():
        model(BATCH).backward()
    first.step()


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "planned"])
def test_a_model_that_nobody_uses_any_more_is_gone(removed: bool) -> None:
    model = Net(2)
    applied = tightfit.fit(model, BATCH, reference_budget_bytes=2**30)
    applied.loss(model, BATCH).backward()
    if removed:
        applied.remove()
    weights = weakref.ref(next(model.parameters()))
    del model, applied
    gc.collect()
    assert weights() is None
