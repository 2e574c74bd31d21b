"""Kernels that do more than their schema says, memory that is not PyTorch's, and what remains unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tests.replay.helpers import assert_same, differences, run
from tests.replay.instructions import INSTRUCTIONS
from tests.replay.programs import Program, loss_of
from tightfit._torch_private.tensors import storage_key
from tightfit.operators import facts as ops
from tightfit.replay.contents import checksum
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor


class WriteFinder(TorchDispatchMode):
    """Runs each operation between two checksums of its arguments: which does it write without saying so?"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        info = ops.describe(func)
        self.seen.add(info.name)
        written = {storage_key(tensor) for tensor in ops.mutated_tensors(info, args, kwargs)}
        before = [
            (place, tensor, checksum(tensor))
            for place, argument in enumerate(args)
            if info.name not in EXEMPT
            for tensor in ops.tensors_in((argument,))
            if tensor.layout is torch.strided and storage_key(tensor) not in written
        ]
        result = func(*args, **kwargs)
        for place, tensor, expected in before:
            if checksum(tensor) != expected:
                self.found.setdefault(info.name, set()).add(place)
        return result


#: Runs in backward only, where nothing is recorded; what it writes is the workspace that forward saved for it alone.
EXEMPT = {"aten.mkldnn_rnn_layer_backward.default"}

Forward = Callable[[Tensor], Any]


def layers() -> dict[str, tuple[nn.Module | Forward, tuple[int, ...]]]:
    """Layers that hold state or are known to cheat, each with the shape of its input."""
    embedding = nn.Embedding(10, 8, max_norm=0.5)
    bag = nn.EmbeddingBag(10, 8, max_norm=0.5)
    return {
        "batch norm": (nn.BatchNorm2d(4), (2, 4, 6, 6)),
        "batch norm without average": (nn.BatchNorm1d(8, momentum=None), (4, 8)),
        "instance norm": (nn.InstanceNorm1d(4, track_running_stats=True), (2, 4, 6)),
        "functional batch norm": (lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8), training=True), (4, 8)),
        "batch norm in eval": (nn.BatchNorm1d(8).eval(), (4, 8)),
        "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), (4, 8)),
        "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (4, 8)),
        "renormalised embedding": (lambda x: embedding(x.argmax(1)), (4, 8)),
        "renormalised bag": (lambda x: bag(x.argmax(1)[None]), (4, 8)),
        "randomised relu": (nn.RReLU(), (4, 8)),
        "dropouts": (nn.Sequential(nn.Dropout(), nn.AlphaDropout(), nn.FeatureAlphaDropout()), (4, 8)),
        "fractional pooling": (nn.FractionalMaxPool2d(2, output_size=3), (1, 2, 8, 8)),
        "max pooling": (nn.MaxPool2d(2, return_indices=True), (1, 2, 8, 8)),
        "lstm": (nn.LSTM(8, 8, num_layers=2, dropout=0.2), (3, 2, 8)),
        "gru": (nn.GRU(8, 8, bidirectional=True), (3, 2, 8)),
        "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8)),
        "convolutions": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3, groups=2)), (1, 2, 8, 8)),
        "ctc": (
            lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])),
            (5, 1, 4),
        ),
        "fake quantisation": (
            lambda x: torch.fused_moving_avg_obs_fake_quant(
                x, torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1),
                torch.zeros(1, dtype=torch.int32), 0.01, 0, 255, 0,
            ),
            (4, 8),
        ),
    }  # fmt: skip


def test_the_table_of_undeclared_writes_is_complete_for_what_the_tests_use() -> None:
    finder = WriteFinder()
    torch.manual_seed(0)
    for forward, shape in layers().values():
        x = torch.rand(shape, requires_grad=True)
        with finder:
            result = forward(x)
            first = result[0] if isinstance(result, tuple) else result
            first.sum().backward()
    for name in INSTRUCTIONS:
        model = Program([("sin", 0, 0), (name, 0, 1)], 4, 8, 1)
        with finder:
            loss_of(model, model.batch)
    table = {name: set(places) for name, (places, _) in ops._UNDECLARED_WRITES.items()}
    assert {name: places for name, places in finder.found.items() if places - table.get(name, set())} == {}
    assert "aten.native_batch_norm.default" in finder.found  # it can find one
    assert len(finder.seen) > 150


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("tightfit_kernels", "FRAGMENT")
    yield library
    library._destroy()
    for func in [func for func in ops._INFO if str(func).startswith("tightfit_kernels")]:
        del ops._INFO[func]


def hidden_writer(library: torch.library.Library, name: str) -> Any:
    """An operator of somebody else's that doubles its argument and does not say so; its kernel is invisible."""
    library.define(f"{name}(Tensor x) -> Tensor")

    def kernel(x: Tensor) -> Tensor:
        array = x.detach().numpy()
        array *= 2
        return x * 1

    library.impl(name, kernel, "CPU")
    return getattr(torch.ops.tightfit_kernels, name)


@pytest.mark.parametrize("argument", ["made here", "saved", "from outside"])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_operator_that_writes_its_argument_unsaid(argument: str, calls: int, library: torch.library.Library) -> None:
    operator = hidden_writer(library, f"double_{argument.replace(' ', '_')}_{calls}")
    outside = torch.ones(8, 16)

    def function(x: Tensor, w: Tensor) -> Tensor:
        outside.fill_(1)
        product = x @ w
        written = {"made here": product.detach(), "saved": product.data, "from outside": outside}[argument]
        z = product.sin() * written.exp()
        return z * operator(written) * written.cos()

    assert_same(function, calls=calls)
    assert ops.describe(operator.default).undeclared_writes == (0,)


@pytest.mark.parametrize("times", [1, 200])
def test_memory_from_numpy_that_is_written_before_backward(times: int) -> None:
    """Noticed at every step, not only at the self-check: plain's gradients for what is small, else an error."""
    array = np.ones((times, 8, 16), dtype=np.float32)
    steps = 0

    def backward(loss: Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps > 2:
            array[:] = 5
        loss.backward()
        array[:] = 1

    def function(x: Tensor, w: Tensor) -> Tensor:
        return ((x @ w) * torch.from_numpy(array).exp()).sin()

    assert run(function, replay=True, calls=2, backward=backward).error is None
    plain = run(function, replay=False, backward=backward)
    found = run(function, replay=True, self_check=False, backward=backward)
    if times == 1:
        assert differences(plain.tensors, found.tensors) == []
    else:
        assert "behind PyTorch's back (for example through NumPy" in str(found.error)


def test_handed_out_memory_is_kept_and_the_plan_says_why() -> None:
    class Exposing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            z = y.sin()
            address = y.detach().numpy()
            z = z * y.exp()
            address[0] = 3
            return z.tanh() * y

    batch = torch.randn(4, 8)

    def step(model: nn.Module) -> dict[str, Tensor | None]:
        model.zero_grad()
        loss = model(batch).sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}

    model = Exposing()
    plain = step(model)
    profile = tightfit.measure(model, batch, loss=lambda m, x: m(x).sum())
    plan = full_plan(profile, 2**30)
    reasons = {kept.reason for recipe in plan.recipes for kept in recipe.kept_for_safety}
    assert any("handed out" in reason for reason in reasons), reasons
    with tightfit.apply(model, plan) as applied:
        for _ in range(2):
            assert differences(plain, step(model)) == []
        assert applied.statistics.written_after_drop == 0  # the plan knew


# ---------------------------------------------------------------- what remains unseen, and what then happens


@pytest.mark.parametrize("survives", [True, False])
def test_blind_spot_data_written_outside_every_planned_region(survives: bool) -> None:
    """A dropped tensor leaves its region and is written through `.data` where nothing watches.

    While it lives until backward, the self-check reads it as plain does, and refuses to drop it from then on.  If
    it is freed before, its new contents are gone, and with them the last trace of the write: backward gets the contents
    that the tensor had when autograd saved it, where plain PyTorch would silently read the new ones.
    """
    kept: list[Any] = []

    def function(x: Tensor, w: Tensor) -> Any:
        y = x @ w
        return y.sin(), y

    def after(result: Any) -> Tensor:
        result[1].data.mul_(3)
        if survives:
            kept.append(result[1])
        return result[0].sum()

    for calls in (1, 2):
        plain = run(function, replay=False, after=after, calls=calls)
        replayed = run(function, replay=True, after=after, calls=calls)
        assert replayed.error is None
        assert (differences(plain.tensors, replayed.tensors) == []) == survives


def test_blind_spot_a_parameter_s_data_swapped_before_backward() -> None:
    """`parameter.data = other` between forward and backward: saved-tensor hooks are given the old tensor, so backward
    uses the weights that forward used.  Plain PyTorch reads the new ones, for a parameter that is saved itself.
    """
    weight = nn.Parameter(torch.ones(8, 16))

    def backward(loss: Tensor) -> None:
        weight.data = torch.ones(8, 16) * 2
        loss.backward()

    def gradient(replay: bool) -> Tensor | None:
        weight.data = torch.ones(8, 16)
        found = run(lambda x, w: (x @ w) * weight, replay=replay, backward=backward)
        assert found.error is None
        return found.tensors["w.grad"]

    plain, replayed = gradient(False), gradient(True)
    assert plain is not None
    assert replayed is not None
    assert torch.equal(plain, replayed * 2)
