"""Odd graphs: interleaved, interrupted, differentiated twice or in parts, from other threads, under transforms."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors, disable_saved_tensors_hooks, save_on_cpu
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.replay.helpers import snapshot
from tests.replay.scenario import BATCH, Left, Net, Stage, assert_equal, copied, loss_of, plan

Tensor = torch.Tensor

#: Much of this goes past the plan, which is told; here the bits count.
pytestmark = pytest.mark.filterwarnings("ignore::tightfit.errors.PromiseWarning")


def first_first(stage: Stage) -> Left:
    """Forward A, forward B, backward A, backward B."""
    a, b = stage.loss(), stage.loss(BATCH * 2)
    a.backward()
    b.backward()
    return snapshot(stage.model, a)


def last_first(stage: Stage) -> Left:
    a, b = stage.loss(), stage.loss(BATCH * 2)
    b.backward()
    a.backward()
    return snapshot(stage.model, a)


def one_backward_for_two_forwards(stage: Stage) -> Left:
    loss = stage.loss() * stage.loss(BATCH.flip(0))
    loss.backward()
    return snapshot(stage.model, loss)


def two_models(stage: Stage) -> Left:
    """Layers of two planned models take turns, inside two steps."""
    twin = Net()
    other = Stage(twin, tightfit.apply(twin, plan()) if stage.applied is not None else None)
    with stage.step(), other.step():
        x, y = stage.model.layers[0](BATCH), other.model.layers[0](BATCH)
        x = stage.model.layers[1](x + y)
        y = other.model.layers[1](y * x)
        loss = stage.model.head(x).sum() + other.model.head(y).sin().sum()
    loss.backward()
    if other.applied is not None:
        other.applied.remove()
    return snapshot(stage.model, loss) | copied(snapshot(other.model, loss), "other:")


def layers_in_another_order(stage: Stage) -> Left:
    with stage.step():
        x = BATCH
        for layer in (*reversed(stage.model.layers), stage.model.layers[1]):
            x = layer(x).sin()
        loss = stage.model.head(x).sum()
    loss.backward()
    return snapshot(stage.model, loss)


def generator(stage: Stage) -> Left:
    """Forward is a generator that is left and entered again, partly outside the step."""

    def parts(x: Tensor) -> Iterator[Tensor]:
        for layer in stage.model.layers:
            x = layer(x)
            yield x.sin()

    run = parts(BATCH)
    with stage.step():
        a = next(run)
    b = next(run)
    with stage.step():
        loss = (a * b * next(run)).sum()
    loss.backward()
    return snapshot(stage.model, loss)


def retained(stage: Stage) -> Left:
    loss = stage.loss()
    loss.backward(retain_graph=True)
    loss.backward(inputs=[stage.model.layers[1].up.weight], retain_graph=True)
    loss.backward()
    return snapshot(stage.model, loss)


def some_inputs(stage: Stage) -> Left:
    loss, model = stage.loss(), stage.model
    early, late = torch.autograd.grad(loss, [model.layers[0].up.weight, model.head.bias], retain_graph=True)
    (slope,) = torch.autograd.grad(loss, [model.layers[1].down.weight], create_graph=True)
    slope.pow(2).sum().backward()
    return snapshot(model, loss) | {"early": early, "late": late, "slope": slope.detach()}


def penalty_in_the_step(stage: Stage) -> Left:
    x = BATCH.clone().requires_grad_()
    with stage.step():
        loss = loss_of(stage.model, x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + slope.norm()
    loss.backward()
    return snapshot(stage.model, loss)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def rows_of_a_jacobian(stage: Stage) -> Left:
    x = BATCH.clone().requires_grad_()
    with stage.step():
        y = stage.model(x).sum(0)
    one_by_one = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y])
    (batched,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    y.sum().backward()
    return snapshot(stage.model, y.sum()) | {"rows": one_by_one, "batched": batched}


def other_threads(stage: Stage) -> Left:
    losses: list[Tensor] = []

    def work(backward: bool) -> None:
        if backward:
            losses[0].backward()
        else:
            losses.append(stage.loss())

    torch.manual_seed(2)
    for backward in (False, True):
        thread = threading.Thread(target=work, args=(backward,))
        thread.start()
        thread.join()
    return snapshot(stage.model, losses[0])


def two_backwards_at_once(stage: Stage) -> Left:
    losses = [stage.loss(BATCH * n) for n in (1, 2, 3)]
    parameters = list(stage.model.parameters())
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: torch.autograd.grad(losses[n], parameters)}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {f"{n}: {place}": grad for n in range(3) for place, grad in enumerate(found[n])}


def functional_call(stage: Stage) -> Left:
    weights = {name: (p * 1.5).detach().requires_grad_() for name, p in stage.model.named_parameters()}
    with stage.step():
        loss = torch.func.functional_call(stage.model, weights, (BATCH,)).sin().sum()
    (loss + stage.loss()).backward()
    return snapshot(stage.model, loss) | copied({name: w.grad for name, w in weights.items()}, "given:")


def vmap(stage: Stage) -> Left:
    with stage.step():
        loss = torch.vmap(stage.model, randomness="different")(torch.stack([BATCH, BATCH * 2])).sin().sum()
    loss.backward()
    return snapshot(stage.model, loss)


def transforms_around(stage: Stage) -> Left:
    """`torch.func.grad` of the planned model: runs plain, as hooks are forbidden there."""
    weights = {name: p.detach() for name, p in stage.model.named_parameters()}
    slopes = torch.func.grad(lambda w: torch.func.functional_call(stage.model, w, (BATCH,)).sin().sum())(weights)
    loss = stage.loss()
    loss.backward()
    return snapshot(stage.model, loss) | copied(slopes, "slope")


def checkpointed(stage: Stage, reentrant: bool = False) -> Left:
    x = BATCH.clone().requires_grad_()
    with stage.step():
        for layer in stage.model.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        loss = stage.model.head(x).sin().sum()
    (loss + stage.loss()).backward()
    return snapshot(stage.model, loss)


def reentrant(stage: Stage) -> Left:
    return checkpointed(stage, reentrant=True)


def hooks_around(stage: Stage) -> Left:
    with save_on_cpu():
        first = stage.loss()
    with disable_saved_tensors_hooks("not now"):
        second = stage.loss()
    third = stage.loss()
    (first + second + third).backward()
    return snapshot(stage.model, first)


def mutation_allowed(stage: Stage) -> Left:
    with allow_mutation_on_saved_tensors():
        with stage.step():
            hidden = stage.model.layers[0](BATCH)
            loss = hidden.sin().sum()
            hidden.mul_(2)
            loss = loss + stage.model.layers[1](hidden).sum()
        loss.backward()
    stage.loss().backward()
    return snapshot(stage.model, loss)


def no_grad_islands(stage: Stage) -> Left:
    with stage.step():
        with torch.no_grad():
            target = stage.model(BATCH).sigmoid()
            with torch.enable_grad():
                side = stage.model.layers[0](BATCH).sum()
        with torch.inference_mode():
            weight = stage.model.layers[2](BATCH).mean().item()
        loss = (stage.model(BATCH) * target.clone()).sum() * weight + side
    loss.backward()
    return snapshot(stage.model, loss)


GRAPHS: list[Callable[[Stage], Left]] = [
    first_first, last_first, one_backward_for_two_forwards, two_models, layers_in_another_order, generator, retained,
    some_inputs, penalty_in_the_step, rows_of_a_jacobian, other_threads, two_backwards_at_once, functional_call, vmap,
    transforms_around, checkpointed, reentrant, hooks_around, mutation_allowed, no_grad_islands,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("scenario", GRAPHS, ids=lambda scenario: scenario.__name__)
def test_equal_bits(scenario: Callable[[Stage], Left]) -> None:
    assert assert_equal(scenario).replayed_ops > 0


class Stop(BaseException):
    """Like KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [Stop, ValueError])
@pytest.mark.parametrize("where", ["forward", "forward hook", "pack", "tensor hook", "retried"])
def test_interrupted(where: str, error: type[BaseException]) -> None:
    """After an interruption the model trains on as if nothing had been; a retained graph can be walked again."""

    def fail(*_: Any) -> Any:
        raise error

    def scenario(stage: Stage) -> Left:
        layer = stage.model.layers[1]
        random_state = torch.get_rng_state()
        if where == "forward":
            layer.norm.forward = fail  # type: ignore[method-assign]  # as users do it
        elif where == "forward hook":
            handle = layer.up.register_forward_hook(fail)
        elif where == "pack":
            handle = layer.up.register_forward_hook(lambda _m, _a, out: Refusing.apply(out, fail))
        else:
            handle = layer.up.weight.register_hook(fail)
        loss = None
        try:
            loss = stage.loss()
            loss.backward(retain_graph=True)
        except error:
            pass
        else:
            raise AssertionError("nothing was interrupted")
        if where == "forward":
            del layer.norm.__dict__["forward"]
        else:
            handle.remove()
        stage.model.zero_grad()
        if where == "retried":
            assert loss is not None
            loss.backward()
        torch.set_rng_state(random_state)
        loss = stage.loss()
        loss.backward()
        return snapshot(stage.model, loss)

    assert assert_equal(scenario).replayed_ops > 0


class Refusing(torch.autograd.Function):
    """Fails after having saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fail: Callable[[], None]) -> Tensor:
        ctx.save_for_backward(x, x * 2)
        fail()
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError


def test_a_module_shared_by_two_parents_and_one_that_calls_its_owner() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            self.left = nn.Sequential(self.inner, nn.GELU())
            self.right = nn.Sequential(nn.Softplus(), self.inner)

        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            y = self.left(x) * self.right(x)
            return self(y.sin(), depth - 1).exp() if depth else y

    from tests.replay.helpers import differences, planned

    def step(model: nn.Module) -> Left:
        model.zero_grad()
        loss = model(BATCH).sum()
        loss.backward()
        return snapshot(model, loss)

    plain = step(Shared())
    for paths in ((), ("",), ("left", "right"), ("inner",), ("", "inner", "right")):
        model = Shared()
        with planned(model, *paths) as installed:
            assert differences(plain, step(model)) == []
            assert differences(plain, step(model)) == []
        assert (installed.statistics.replayed_ops > 0) == bool(paths)
