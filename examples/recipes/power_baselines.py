"""What a forecast has to beat: last week's value, a seasonal ARIMA, gradient boosting.

Each takes the series, the first step of the test and the steps of a day, and returns an array (days, steps of a day):
for each day of the test what was forecast at its midnight, from all before it.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from examples.recipes.power_data import DAYS, Power

Forecasts = npt.NDArray[np.float64]
#: Weeks before the test that ARIMA is fitted to.
_WEEKS_FITTED = 8


def midnights(power: Power, first: int) -> range:
    """Return the first step of each whole day of the test."""
    last = first + (len(power.values) - first) // power.steps_per_day * power.steps_per_day
    return range(first, last, power.steps_per_day)


def actual(power: Power, first: int) -> Forecasts:
    """Return what there was."""
    return np.stack([power.values[start : start + power.steps_per_day] for start in midnights(power, first)])


def seasonal_naive(power: Power, first: int) -> Forecasts:
    """Repeat the value of a week before."""
    starts = [start - power.week for start in midnights(power, first)]
    return np.stack([power.values[start : start + power.steps_per_day] for start in starts])


def arima(power: Power, first: int) -> Forecasts:
    """ARIMA(2, 0, 2)(0, 1, 0), the season a week, fitted once before the test: of how weeks differ from the last."""
    from statsmodels.tsa.arima.model import ARIMA

    week = power.week
    changes = power.values[week:] - power.values[:-week]
    begin = max(0, first - week - _WEEKS_FITTED * week)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own starting values
        fitted = ARIMA(changes[begin : first - week], order=(2, 0, 2), trend="n").fit()
        found = []
        for start, naive in zip(midnights(power, first), seasonal_naive(power, first), strict=True):
            found.append(naive + fitted.forecast(power.steps_per_day))
            fitted = fitted.append(changes[start - week : start - week + power.steps_per_day])
    return np.stack(found)


def gradient_boosting(power: Power, first: int) -> Forecasts:
    """Trees of xgboost on the values of earlier days at the same time, and the time itself: all known at midnight."""
    from xgboost import XGBRegressor

    features = _features(power)
    known = ~np.isnan(features).any(axis=1)
    known[first:] = False
    trees = XGBRegressor(
        n_estimators=300, max_depth=6, learning_rate=0.05, subsample=0.8, n_jobs=1, random_state=0, verbosity=0
    )
    trees.fit(features[known], power.values[known])
    predicted: npt.NDArray[np.float64] = trees.predict(features[first:]).astype(np.float64)
    days = len(midnights(power, first))
    return predicted[: days * power.steps_per_day].reshape(days, power.steps_per_day)


def _features(power: Power) -> npt.NDArray[np.float64]:
    values, day = power.values, power.steps_per_day
    count = len(values)
    time = np.arange(count)
    columns = [time % day, time // day % DAYS]
    for days in (1, 2, 7, 8, 14):
        lagged = np.full(count, np.nan)
        lagged[days * day :] = values[: count - days * day]
        columns.append(lagged)
    means = np.full(count, np.nan)  # of the last whole day
    for start in range(day, count, day):
        means[start : start + day] = values[start - day : start].mean()
    return np.stack([*columns, means], axis=1).astype(np.float64)
