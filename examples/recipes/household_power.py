"""Forecast electric power a day ahead: an LSTM with windows of weeks, inside a budget, beside ARIMA and xgboost.

    python -m examples.recipes.household_power                                        # England and Wales, from pmdarima
    python -m examples.recipes.household_power --file household_power_consumption.txt # one household: the UCI file

Run it from the repository's root.  It trains by `tightfit train` (the run folder, with its report, is in --output),
prints a table of errors on days that no method has seen, and draws the forecast of the first week of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.recipes import power_baselines
from examples.recipes.power_baselines import Forecasts, actual, midnights
from examples.recipes.power_data import Power, load_power
from tightfit.cli.main import main as tightfit

#: Days at the end that no method sees before it has forecast them, at most a fifth of all.
TEST_DAYS = 14


class DayAhead(nn.Module):
    """At each step, how the next day will differ from the same day a week before.

    The recurrent layer goes through the window a day at a time, so that a plan can recompute some days and keep others.
    """

    def __init__(self, steps_per_day: int, width: int) -> None:
        super().__init__()
        self.steps_per_day = steps_per_day
        self.lstm = nn.LSTM(6, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, steps_per_day))

    def forward(self, steps: Tensor) -> Tensor:
        """Map (batch, time, 6) to (batch, time, steps of a day)."""
        state = None
        days = []
        for day in steps.split(self.steps_per_day, dim=1):
            hidden, state = self.lstm(day, state)
            days.append(self.head(hidden))
        return torch.cat(days, dim=1)


class Windows:
    """Samples (time, 5): the power, scaled, and the time of day and of week as points on circles.

    Each begins a week before the window and ends a day after it.
    """

    def __init__(self, power: Power, first_test: int, window_days: int) -> None:
        self.power = power
        train = power.values[:first_test]
        self.mean, self.scale = float(train.mean()), float(train.std())
        time = np.arange(len(power.values))
        angles = [2 * np.pi * time / period for period in (power.steps_per_day, power.week)]
        circles = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
        scaled = (power.values - self.mean) / self.scale
        self.steps = torch.from_numpy(np.stack([scaled, *circles], axis=1)).float()
        self.length = power.week + (window_days + 1) * power.steps_per_day
        self.stride = max(1, power.steps_per_day // 4)
        self._count = (first_test - self.length) // self.stride + 1
        if self._count < 1:
            raise SystemExit(
                f"A window takes {self.length} steps, but there are {first_test} before the test. Give --window-days "
                f"below {window_days}, or a longer series."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return self.steps[index * self.stride : index * self.stride + self.length]

    def before(self, start: int) -> Tensor:
        """Return the inputs (time, 6) of the window that ends before step `start`."""
        day = self.power.steps_per_day
        return inputs_of(self.steps[start + day - self.length : start][None], self.power.week, 0)[0]


def inputs_of(steps: Tensor, week: int, day: int) -> Tensor:
    """Return what the model reads: the steps without the first week and the last day, and how they differ from last
    week's.
    """
    end = steps.shape[1] - day
    now, before = steps[:, week:end], steps[:, : end - week]
    return torch.cat([now, now[..., :1] - before[..., :1]], dim=-1)


@cache
def windows_of(file: str, window_days: int) -> Windows:
    """Read the series once for the model, the data and the forecast."""
    power = load_power(Path(file) if file else None)
    return Windows(power, first_test_of(power), window_days)


def first_test_of(power: Power) -> int:
    """Return the first step of the test: a midnight."""
    days = len(power.values) // power.steps_per_day
    return (days - min(TEST_DAYS, days // 5)) * power.steps_per_day


def dataset(file: str = "", window_days: int = 14) -> Windows:
    """Make the data for `tightfit train --dataset examples.recipes.household_power:dataset`."""
    return windows_of(file, window_days)


def model(file: str = "", window_days: int = 14, width: int = 64) -> tuple[nn.Module, Any]:
    """Make the model and its loss for `tightfit train --model examples.recipes.household_power:model`."""
    power = windows_of(file, window_days).power
    day, week = power.steps_per_day, power.week

    def loss(net: nn.Module, steps: Tensor) -> Tensor:
        values = steps[..., 0]
        next_days = values[:, week + 1 :].unfold(1, day, 1)
        week_before = values[:, 1 : values.shape[1] - week].unfold(1, day, 1)
        return nn.functional.smooth_l1_loss(net(inputs_of(steps, week, day)), next_days - week_before)

    return DayAhead(day, width), loss


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train by `tightfit train`; returns the summary of the run."""
    shared = [f"file={options.file}"] if options.file else []
    shared.append(f"window_days={options.window_days}")
    words = [
        "train", "--model", "examples.recipes.household_power:model", "--model-args", f"width={options.width}", *shared,
        "--dataset", "examples.recipes.household_power:dataset", "--dataset-args", *shared, "--memory", options.memory,
        "--batch-size", str(options.batch_size), "--steps", str(options.steps), "--lr", "5e-3", "--schedule", "cosine",
        "--warmup-steps", "10", "--clip-norm", "1.0", "--log-every", "20", "--reference-memory", "75%",
        "--root-path", str(options.output), "--mark", "day-ahead", "--json",
    ]  # fmt: skip
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = tightfit(words)
    if code:
        raise SystemExit(code)
    summary: dict[str, Any] = json.loads(printed.getvalue())
    return summary


def forecast(weights: Path, options: argparse.Namespace) -> Forecasts:
    """Forecast each day of the test at its midnight, with the trained weights."""
    windows = windows_of(options.file, options.window_days)
    power, first = windows.power, first_test_of(windows.power)
    net = DayAhead(power.steps_per_day, options.width)
    net.load_state_dict(load_file(weights))
    net.eval()
    with torch.no_grad():
        changes = torch.stack([net(windows.before(start)[None])[0, -1] for start in midnights(power, first)])
    return power_baselines.seasonal_naive(power, first) + changes.double().numpy() * windows.scale


def errors_of(found: Forecasts, truth: Forecasts) -> tuple[float, float]:
    """Return the mean absolute error, and the root of the mean squared one."""
    return float(np.abs(found - truth).mean()), float(((found - truth) ** 2).mean() ** 0.5)


def draw(methods: dict[str, Forecasts], truth: Forecasts, power: Power, path: Path) -> None:
    """Draw the first week of the test."""
    from matplotlib.figure import Figure

    days = min(7, len(truth))
    time = np.arange(days * power.steps_per_day) / power.steps_per_day
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(time, truth[:days].ravel(), color="#1c2430", linewidth=2.2, label="measured")
    for (name, found), colour in zip(methods.items(), ("#8494a8", "#1a7f4b", "#c2570c", "#2563b0"), strict=True):
        axes.plot(time, found[:days].ravel(), color=colour, linewidth=1.3, label=name)
    axes.set_xlabel("days of the test")
    axes.set_ylabel(power.unit)
    axes.set_title(f"Forecast at midnight for the next day: {power.origin}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def main(words: list[str] | None = None) -> int:
    """Train, forecast, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="the UCI file; without it, the series that pmdarima brings")
    parser.add_argument("--memory", default="40MiB", help="budget of a training step")
    parser.add_argument("--window-days", type=int, default=14, help="how far back a window reaches")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"), help="folder for the run and the plot")
    options = parser.parse_args(words)
    if options.file and not Path(options.file).is_file():
        parser.error(
            f"there is no file {options.file}. Get it from archive.ics.uci.edu/dataset/235, or leave --file out"
        )
    power = windows_of(options.file, options.window_days).power
    first = first_test_of(power)
    truth = actual(power, first)
    print(f"data      {power.origin}: {len(power.values):,} steps, {power.filled:,} of them filled")
    print(f"test      the last {len(truth)} days, each forecast at its midnight")
    summary = train(options)
    methods = {
        "seasonal-naive": power_baselines.seasonal_naive(power, first),
        "ARIMA": power_baselines.arima(power, first),
        "xgboost": power_baselines.gradient_boosting(power, first),
        "LSTM": forecast(Path(summary["model_file"]), options),
    }
    print(
        f"training  peak {summary['measured_peak_bytes'] / 2**20:.1f} MiB of {options.memory}, plain "
        f"{summary['plain_peak_bytes'] / 2**20:.1f} MiB; gradients "
        f"{'equal, bit for bit' if summary['gradients_equal'] else 'NOT proven equal'}"
    )
    naive, _ = errors_of(methods["seasonal-naive"], truth)
    print(f"\n{'method':<15} {'MAE':>8} {'RMSE':>8}  MAE / seasonal-naive   ({power.unit})")
    for name, found in methods.items():
        mae, rmse = errors_of(found, truth)
        print(f"{name:<15} {mae:>8.3f} {rmse:>8.3f}  {mae / naive if naive else float('nan'):>8.2f}")
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "day-ahead.png"
    draw(methods, truth, power, picture)
    print(f"\nplot      {picture}\nrun       {summary['run_folder']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
