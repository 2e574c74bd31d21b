"""Lightning's `Trainer`: the same script with one line more trains to the same bits, inside the budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop  # noqa: E402  # below the skip

from tightfit import BudgetInfeasible, UnsupportedInput  # noqa: E402  # below the skip
from tightfit.device import memory as meter  # noqa: E402  # below the skip
from tightfit.errors import PromiseWarning  # noqa: E402  # below the skip
from tightfit.installation.region_forward import RegionForward  # noqa: E402  # below the skip
from tightfit.integrations.lightning import TightfitCallback  # noqa: E402  # below the skip
from tightfit.units import parse_bytes  # noqa: E402  # below the skip

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]

BUDGET = "5MiB"


class Module(lightning.LightningModule):  # type: ignore[misc]  # untyped
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)) for _ in range(6))
        )

    def training_step(self, batch: Any, number: int) -> Any:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.log("loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, number: int) -> None:
        inputs, targets = batch
        self.log("held out", nn.functional.mse_loss(self.net(inputs), targets))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Gan(lightning.LightningModule):  # type: ignore[misc]  # untyped
    """Two optimizers by hand, toggled, with a schedule of learning rates, and a moving average that it updates."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = Module().net, nn.Sequential(Module().net, nn.Linear(64, 1))
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def training_step(self, batch: Any, number: int) -> None:
        real, noise = batch
        critic, generator = self.optimizers()
        self.toggle_optimizer(critic)
        loss = softplus(-self.critic(real)).mean() + softplus(self.critic(self.generator(noise).detach())).mean()
        self.log("critic", loss)
        critic.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(critic, 1.0, "norm")
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        loss = softplus(-self.critic(self.generator(noise))).mean()
        self.log("generator", loss)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)
        self.lr_schedulers().step()
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("held out", self.critic(self.average(batch[1])).mean())

    def configure_optimizers(self) -> Any:
        critic, generator = (torch.optim.Adam(part.parameters()) for part in (self.critic, self.generator))
        return [critic, generator], [torch.optim.lr_scheduler.StepLR(generator, 2, 0.5)]


class InTurn(Gan):
    """Frees the gradients of a half with its turn, and begins with a batch that trains the critic alone."""

    def training_step(self, batch: Any, number: int) -> None:
        real, noise = batch
        critic, generator = self.optimizers()
        if number % 2 == 0:
            self.toggle_optimizer(critic)
            self.manual_backward(
                softplus(-self.critic(real)).mean() + softplus(self.critic(self.generator(noise).detach())).mean()
            )
            critic.step()
            critic.zero_grad()
            self.untoggle_optimizer(critic)
        else:
            self.toggle_optimizer(generator)
            self.manual_backward(softplus(-self.critic(self.generator(noise))).mean())
            generator.step()
            generator.zero_grad()
            self.untoggle_optimizer(generator)


class Crossing(Gan):
    """The second loss goes through what the generator made for the first."""

    def training_step(self, batch: Any, number: int) -> None:
        critic, generator = self.optimizers()
        made = self.generator(batch[1])
        critic.zero_grad()
        self.manual_backward(softplus(self.critic(made.detach())).mean())
        critic.step()
        generator.zero_grad()
        self.manual_backward(softplus(-self.critic(made)).mean() + self.generator(batch[1]).mean())
        generator.step()


class Silent(Module):
    """By hand, without telling the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def trained(callback: TightfitCallback | None, module: type[Any] = Module, **options: Any) -> tuple[Any, Any]:
    lightning.seed_everything(0, verbose=False)
    made = module()
    data = torch.utils.data.TensorDataset(torch.randn(1024, 64), torch.randn(1024, 64))
    trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", callbacks=[] if callback is None else [callback], **{"max_epochs": 3, **options},
    )  # fmt: skip
    loaders = [torch.utils.data.DataLoader(data, batch_size=256, shuffle=shuffle) for shuffle in (True, False)]
    trainer.fit(made, *loaders)
    return made, trainer


def peaks_of_batches(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Return the list to which the peak of each batch after so many will be added, of all that runs in it."""
    advance = _TrainingEpochLoop.advance
    ran = 0
    peaks: list[int] = []

    def metered(self: Any, fetcher: Any) -> None:
        nonlocal ran
        ran += 1
        if ran <= after:
            advance(self, fetcher)
            return
        resident = meter.resident_bytes(self.trainer.lightning_module, None, self.trainer.optimizers)
        peaks.append(meter.measure_peak(lambda: advance(self, fetcher), resident)[1])

    monkeypatch.setattr(_TrainingEpochLoop, "advance", metered)
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.exhaustive),
    ],
    ids=["accumulation", "bf16"],
)
def test_one_line_and_the_same_bits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ran = trained(None, **options)
    callback = TightfitCallback(budget=BUDGET)
    end = TightfitCallback.on_train_end
    peaks = peaks_of_batches(monkeypatch, after=1)  # in which the plan is made

    def checked(self: TightfitCallback, *args: Any) -> None:
        assert self.applied is not None
        assert self.applied.plans is not None
        counts = self.applied.statistics
        assert counts.replayed_ops + counts.recomputed_calls > 0
        assert self.applied.plans.statistics.mismatched_steps == 0
        end(self, *args)

    monkeypatch.setattr(TightfitCallback, "on_train_end", checked)
    planned, planned_run = trained(callback, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
    assert ran.callback_metrics == planned_run.callback_metrics
    assert len(peaks) == 11
    assert max(peaks) <= parse_bytes(BUDGET)
    assert "training_step" not in vars(planned)
    assert not any(isinstance(vars(module).get("forward"), RegionForward) for module in planned.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"precision": "bf16-mixed", "max_epochs": 1}, id="bf16", marks=pytest.mark.exhaustive),
    ],
)
def test_by_hand_each_backward_has_a_plan(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ran = trained(None, Gan, **options)
    callback = TightfitCallback(budget="10MiB")
    counts: list[Any] = []
    end = TightfitCallback.on_train_end

    def looked_at(self: TightfitCallback, *args: Any) -> None:
        assert self.applied is not None
        assert list(self.applied.kinds) == ["0", "1"]
        counts.append(copy.copy(self.applied.statistics))
        end(self, *args)

    monkeypatch.setattr(TightfitCallback, "on_train_end", looked_at)
    planned, planned_run = trained(callback, Gan, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
    assert ran.callback_metrics == planned_run.callback_metrics
    assert counts[0].replayed_ops + counts[0].recomputed_calls > 0
    assert "manual_backward" not in vars(planned)
    assert all(parameter.requires_grad for parameter in planned.generator.parameters())


@pytest.mark.parametrize("module", [Gan, InTurn])
def test_the_state_of_the_optimizer_whose_turn_comes_later_is_counted(
    module: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = peaks_of_batches(monkeypatch, after=2)  # each half has run once
    trained(TightfitCallback(budget="10MiB"), module, max_epochs=2)
    assert len(peaks) == 6
    assert max(peaks[1:]) <= parse_bytes("10MiB")  # what the first one frees of those before, the meter does not see


@pytest.mark.slow
def test_a_loss_through_an_earlier_phase_keeps_its_bits_and_is_told() -> None:
    plain, _ = trained(None, Crossing, max_epochs=1)
    with pytest.warns(PromiseWarning, match="computed before an earlier backward"):
        planned, _ = trained(TightfitCallback(budget="10MiB"), Crossing, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))


def test_a_backward_that_nobody_sees_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="Silent optimizes by hand, and its training_step calls no"):
        trained(TightfitCallback(), Silent)


def test_a_budget_that_is_too_small_ends_the_run_and_leaves_nothing() -> None:
    callback = TightfitCallback(budget="300KiB")
    with pytest.raises(BudgetInfeasible):
        trained(callback)
    assert callback.applied is None
