"""Forecasting: predict each step of a series from those before it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from tightfit.train.data.dataset_info import DataFacts
from tightfit.train.tasks.task import Sums, Task, mean_and_count, prediction_of, summed


def forecast(facts: DataFacts) -> Task:
    """Make the task for samples that are windows (time, features), one step longer than the sequence length.

    Where the data has a season, the error is set against the forecast that repeats the last season: below 1 is better.
    """

    def summarise(means: Mapping[str, float]) -> dict[str, float]:
        found = {"loss": means["loss"], "rmse": means["loss"] ** 0.5, "mae": means["mae"]}
        if "seasonal_error" in means:
            found["rmse_to_seasonal_naive"] = (means["last_step_error"] / means["seasonal_error"]) ** 0.5
        return found

    def measure(model: nn.Module, series: Tensor) -> Sums:
        prediction = prediction_of(model(series[:, :-1]), "prediction")
        target = series[:, 1:]
        count = float(target.numel())
        found: Sums = {
            "loss": mean_and_count(F.mse_loss(prediction, target), count),
            "mae": (summed((prediction - target).abs()), count),
        }
        season = facts.season
        if 0 < season < series.shape[1]:
            last = series[:, -1]
            number = float(last.numel())
            found["last_step_error"] = (summed((prediction[:, -1] - last) ** 2), number)
            found["seasonal_error"] = (summed((series[:, -1 - season] - last) ** 2), number)
        return found

    return Task(
        name="forecast",
        loss=next_step_loss,
        weight=lambda series: float(series[:, 1:].numel()),
        samples_weigh_alike=True,
        measure=measure,
        summarise=summarise,
    )


def next_step_loss(model: nn.Module, series: Tensor) -> Tensor:
    """Return the mean squared error of each step of a series, given those before it."""
    return F.mse_loss(prediction_of(model(series[:, :-1]), "prediction"), series[:, 1:])
