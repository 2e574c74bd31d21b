"""Lightning's `Trainer`: the same script with one line more trains to the same bits, inside the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop  # noqa: E402

from tightfit import BudgetInfeasible, UnsupportedInput  # noqa: E402
from tightfit.device import memory as meter  # noqa: E402
from tightfit.installation.region_forward import RegionForward  # noqa: E402
from tightfit.integrations.lightning import TightfitCallback  # noqa: E402
from tightfit.units import parse_bytes  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]

BUDGET = "5MiB"


class Module(lightning.LightningModule):  # type: ignore[misc]
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


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def trained(callback: TightfitCallback | None, module: type[Module] = Module, **options: Any) -> tuple[Any, Any]:
    lightning.seed_everything(0, verbose=False)
    made = module()
    data = torch.utils.data.TensorDataset(torch.randn(1024, 64), torch.randn(1024, 64))
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", callbacks=[] if callback is None else [callback], **options,
    )  # fmt: skip
    loaders = [torch.utils.data.DataLoader(data, batch_size=256, shuffle=shuffle) for shuffle in (True, False)]
    trainer.fit(made, *loaders)
    return made, trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}],
    ids=["accumulation", "bf16"],
)
def test_one_line_and_the_same_bits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ran = trained(None, **options)
    callback = TightfitCallback(budget=BUDGET)
    end, advance = TightfitCallback.on_train_end, _TrainingEpochLoop.advance
    peaks: list[int] = []

    def checked(self: TightfitCallback, *args: Any) -> None:
        assert self.applied is not None
        assert self.applied.plans is not None
        counts = self.applied.statistics
        assert counts.replayed_ops + counts.recomputed_calls > 0
        assert self.applied.plans.statistics.mismatched_steps == 0
        end(self, *args)

    def metered(self: Any, fetcher: Any) -> None:
        """A whole batch: its forward, backward and optimizer step."""
        if callback.applied is None:  # the plan is made in this one
            advance(self, fetcher)
            return
        module, batch = self.trainer.lightning_module, [torch.empty(256, 64)] * 2
        resident = meter.resident_bytes(module, batch, self.trainer.optimizers[0])
        peaks.append(meter.measure_peak(lambda: advance(self, fetcher), resident)[1])

    monkeypatch.setattr(TightfitCallback, "on_train_end", checked)
    monkeypatch.setattr(_TrainingEpochLoop, "advance", metered)
    planned, planned_run = trained(callback, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
    assert ran.callback_metrics == planned_run.callback_metrics
    assert len(peaks) == 11
    assert max(peaks) <= parse_bytes(BUDGET)
    assert "training_step" not in vars(planned)
    assert not any(isinstance(vars(module).get("forward"), RegionForward) for module in planned.modules())


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="ByHand optimizes by hand"):
        trained(TightfitCallback(), ByHand)


def test_a_budget_that_is_too_small_ends_the_run_and_leaves_nothing() -> None:
    callback = TightfitCallback(budget="300KiB")
    with pytest.raises(BudgetInfeasible):
        trained(callback)
    assert callback.applied is None
