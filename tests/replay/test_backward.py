"""Every way in which backward may be run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.replay.helpers import PATH, assert_same, differences, planned, snapshot
from tightfit.replay.installed import Installed

Tensor = torch.Tensor


def function(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout((x @ w).sin().exp(), 0.3).tanh() @ w


def twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def with_graph(loss: Tensor) -> None:
    loss.backward(create_graph=True)


def in_another_thread(loss: Tensor) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def under_autocast(loss: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()


def under_no_grad(loss: Tensor) -> None:
    with torch.no_grad():
        loss.backward()


def in_anomaly_mode(loss: Tensor) -> None:
    with torch.autograd.set_detect_anomaly(True):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True", "ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "backward", [twice, with_graph, in_another_thread, under_autocast, under_no_grad, in_anomaly_mode]
)
def test_backward(backward: Callable[[Tensor], None]) -> None:
    assert assert_same(function, backward=backward, calls=2).replayed_ops > 0


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_in_forward(outside: bool) -> None:
    def cast(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.layer_norm((x @ w).exp().tanh() @ w, (16,)).float()

    assert assert_same(cast, backward=torch.Tensor.backward if outside else under_autocast).replayed_ops > 0


@pytest.mark.parametrize("paths", [(), ("0", "1"), ("",)])
def test_double_backward(paths: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus()) for _ in "ab"])
    x = torch.randn(4, 8, requires_grad=True)

    def step() -> dict[str, Tensor | None]:
        model.zero_grad()
        (gradient,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        penalty = gradient.pow(2).sum()
        penalty.backward()
        x.grad = None
        return snapshot(model, penalty)

    plain = step()
    with planned(model, *paths):
        assert differences(plain, step()) == []
        assert differences(plain, step()) == []


def test_gradients_of_some_inputs_only() -> None:
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    installed = Installed(recipes={})

    def gradients(replay: bool) -> list[Tensor]:
        torch.manual_seed(0)
        if replay:
            with installed.region(PATH):
                y = function(x, w)
        else:
            y = function(x, w)
        return [*torch.autograd.grad(y.sum(), x, retain_graph=True), *torch.autograd.grad(y.sum(), [w])]

    for plain, replayed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, replayed)
    assert installed.statistics.replayed_ops > 0


def test_two_losses_from_one_region() -> None:
    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ w).sin()
        return y.exp().tanh(), y.cos().sigmoid()

    x, w = torch.randn(8, 16), torch.randn(16, 16)
    results = []
    for replay in (False, True):
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        installed = Installed(recipes={})
        if replay:
            with installed.region(PATH):
                first, second = both(leaf, weight)
        else:
            first, second = both(leaf, weight)
        first.sum().backward(retain_graph=True)
        del first
        second.sum().backward()
        results.append((leaf.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_may_be_inside_the_region_of_the_step() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    w = torch.randn(16, 16, requires_grad=True)
    gradients = []
    for inside in (True, False):
        torch.manual_seed(0)
        x.grad = w.grad = None
        installed = Installed(recipes={})
        with installed.region("<loss>"):
            with installed.region(PATH):
                y = function(x, w)
            loss = y.log_softmax(-1).pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert installed.statistics.replayed_ops > 0
        gradients.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]  # none is None


def test_a_graph_outlives_the_engine() -> None:
    """Handles stay valid when the plan is gone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU())
    batch = torch.randn(4, 8)
    plain_loss = model(batch).sum()
    plain_loss.backward()
    plain = snapshot(model, plain_loss)
    model.zero_grad()
    with planned(model, "") as installed:
        loss = model(batch).sum()
    assert "forward" not in vars(model)
    loss.backward()
    assert installed.statistics.replayed_ops > 0
    assert differences(plain, snapshot(model, loss)) == []


def test_gradient_accumulation_over_pending_graphs() -> None:
    """Two forwards before any backward, as a pipeline does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.GELU())
    batches = torch.randn(3, 4, 8)
    start = {name: b.clone() for name, b in model.named_buffers()}

    def step() -> dict[str, Tensor | None]:
        torch.manual_seed(1)
        model.load_state_dict(start, strict=False)
        model.zero_grad()
        losses = [model(batch).sum() for batch in batches]
        for loss in reversed(losses):
            loss.backward()
        return snapshot(model, losses[0])

    plain = step()
    with planned(model, ""):
        assert differences(plain, step()) == []
        assert differences(plain, step()) == []
