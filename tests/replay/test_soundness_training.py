"""What training loops do around a planned model: hooks, scalers, optimizers in backward, averages, copies."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tightfit
from tests.replay.helpers import differences, snapshot
from tests.replay.scenario import BATCH, Left, Net, Stage, assert_equal, copied, loss_of, plan
from tightfit import UnsupportedInput
from tightfit.solver.solver import full_plan

Tensor = torch.Tensor


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_every_kind() -> None:
    def scenario(stage: Stage) -> Left:
        model, seen = stage.model, []
        first, second, third = model.layers
        first.register_full_backward_hook(lambda _m, grads, _o: tuple(g if g is None else g * 0.5 for g in grads))
        second.register_full_backward_pre_hook(lambda _m, grads: tuple(g * 2 for g in grads))
        second.register_forward_hook(lambda _m, _a, out: out * 1.5)
        third.register_forward_pre_hook(lambda _m, args: (args[0].sin(),))
        third.up.register_forward_hook(lambda _m, _a, out: out.tanh())  # inside a region
        third.down.register_forward_hook(lambda _m, _a, out: out.register_hook(lambda g: g * 3) and None)
        first.up.weight.register_hook(lambda grad: grad * 3)
        second.down.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum().detach()))
        loss = stage.loss()
        loss.backward()
        return snapshot(model, loss) | {"seen": torch.stack(seen)}

    assert assert_equal(scenario).replayed_ops > 0


def test_an_optimizer_in_backward() -> None:
    """Parameters are written as soon as their gradient is there, while other regions still wait for their replay."""

    def scenario(stage: Stage) -> Left:
        optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in stage.model.parameters()}

        def hook(parameter: Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in stage.model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        for _ in range(3):
            loss = stage.loss()
            loss.backward()
        with stage.step():  # and with the backward inside the step
            loss = loss_of(stage.model, BATCH)
            loss.backward()
        return snapshot(stage.model, loss)

    assert assert_equal(scenario).replayed_ops > 0


@pytest.mark.parametrize("autocast", ["around the step", "inside the step"])
def test_autocast_with_a_grad_scaler(autocast: str) -> None:
    def scenario(stage: Stage) -> Left:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(stage.model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if autocast == "inside the step":
                with stage.step(), torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(stage.model, BATCH)
            else:
                with torch.autocast("cpu", torch.bfloat16), stage.step():
                    loss = loss_of(stage.model, BATCH)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return snapshot(stage.model, loss.float()) | {"scale": torch.tensor(scaler.get_scale())}

    assert assert_equal(scenario).replayed_ops > 0


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.filterwarnings("ignore:the loss of this step:tightfit.errors.PromiseWarning")
def test_deterministic_mode() -> None:
    """Uninitialised memory is filled with NaN there: what is computed from it must be the same NaN."""

    def scenario(stage: Stage) -> Left:
        with stage.step():
            hidden = stage.model.layers[0](BATCH)
            noise = torch.empty(4, 8).masked_fill_(hidden.detach() > 0, 0.5).nan_to_num(0.25)
            chosen = hidden.index_put((torch.tensor([1, 1]),), noise[:2], accumulate=True).cumsum(0)
            loss = stage.model.head(chosen * noise).sin().sum()
        loss.backward()
        return snapshot(stage.model, loss)

    assert assert_equal(scenario).replayed_ops > 0


def test_parameters_replaced_between_steps() -> None:
    def scenario(stage: Stage) -> Left:
        for number in range(3):
            loss = stage.loss()
            loss.backward()
            stage.model.layers[1].up.weight = nn.Parameter(torch.full((16, 8), 0.1 * number))
            stage.model.layers[0].down.weight.data = torch.ones(8, 16) * number
        loss = stage.loss()
        loss.backward()
        return snapshot(stage.model, loss)

    assert assert_equal(scenario).replayed_ops > 0


def test_an_average_of_the_weights_is_unplanned() -> None:
    def scenario(stage: Stage) -> Left:
        average = AveragedModel(stage.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(stage.model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = stage.loss()
            loss.backward()
            optimizer.step()
            average.update_parameters(stage.model)
        before = stage.taped()
        average.zero_grad()
        mean_loss = loss_of(average, BATCH)
        mean_loss.backward()
        assert stage.taped() == before
        return snapshot(stage.model, loss) | copied(snapshot(average, mean_loss), "average:")

    assert_equal(scenario)


def test_a_copy_made_while_a_backward_is_pending() -> None:
    def scenario(stage: Stage) -> Left:
        loss = stage.loss()
        twin = copy.deepcopy(stage.model)
        buffer = io.BytesIO()
        torch.save(stage.model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        loss.backward()
        left = snapshot(stage.model, loss)
        for name, model in (("twin", twin), ("loaded", loaded)):
            other = loss_of(model, BATCH)
            other.backward()
            left |= copied(snapshot(model, other), name)
        return left

    assert assert_equal(scenario).replayed_ops > 0


@pytest.mark.parametrize("again", [False, True])
def test_removed_with_a_backward_pending(again: bool) -> None:
    def scenario(stage: Stage) -> Left:
        loss = stage.loss()
        if stage.applied is not None:
            stage.applied.remove()
            if again:
                stage.applied = tightfit.apply(stage.model, plan())
        gc.collect()
        second = loss_of(stage.model, BATCH * 2)
        (loss + second).backward()
        if stage.applied is not None:
            stage.applied.remove()
        return snapshot(stage.model, loss)

    assert_equal(scenario)


class Sub(torch.Tensor):
    """A subclass that only has another name."""


def test_a_tensor_subclass_is_kept_and_the_plan_says_why() -> None:
    def scenario(stage: Stage) -> Left:
        loss = stage.loss(BATCH.as_subclass(Sub))
        loss.backward()
        left = snapshot(stage.model, loss)
        return {name: t if t is None else t.as_subclass(Tensor) for name, t in left.items()}

    assert_equal(scenario)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x).as_subclass(Sub) * 2).sin().as_subclass(Tensor)

    profile = tightfit.measure(Wrapped(), BATCH, loss=lambda m, x: m(x).sum())
    reasons = {op.keep_reason for op in profile.ops}
    assert any("subclass Sub" in reason for reason in reasons), reasons
    drops = {drop for recipe in full_plan(profile, 2**30).recipes for drop in recipe.drop}
    assert drops == set()


def test_a_model_in_eval_mode_takes_the_kernels_that_plain_takes() -> None:
    """A frozen encoder in eval mode has a fast path, which it leaves when a function mode is on."""

    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = layer.eval().requires_grad_(False)
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.head(self.encoder(x).sin())).exp()

    batch = BATCH.view(1, 4, 8)
    model = Tuned()
    profile = tightfit.measure(model, batch, loss=lambda m, x: m(x).sum())

    def step() -> Left:
        model.zero_grad()
        loss = model(batch).sum()
        loss.backward()
        return snapshot(model, loss)

    plain = step()
    with tightfit.apply(model, full_plan(profile, 2**30)) as applied:
        assert differences(plain, step()) == []
        assert (applied.statistics.mismatches, applied.statistics.replayed_ops > 0) == (0, True)


def test_function_transforms_in_forward_are_refused_with_their_reason() -> None:
    class Slopes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda y: self.layers[0](y).sum())(x) * super().forward(x).sum()

    with pytest.raises(UnsupportedInput, match=r"torch\.func"):
        tightfit.measure(Slopes(), BATCH, loss=lambda m, x: m(x).sum())
