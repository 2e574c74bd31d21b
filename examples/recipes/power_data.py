"""Series of electric power: the UCI file of one household, or the demand of England and Wales that pmdarima brings.

The UCI file ("Individual household electric power consumption", archive.ics.uci.edu/dataset/235) has a line for each
minute, in local time: semicolons between fields, ``?`` for what is missing, days before months.  It becomes hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Minutes that an hour must have to count; one with fewer is missing.
LEAST_MINUTES = 30
DAYS = 7


@dataclass(frozen=True, kw_only=True)
class Power:
    """A series with equal steps and nothing missing, from midnight on."""

    values: npt.NDArray[np.float64]
    unit: str
    steps_per_day: int
    origin: str
    """Where it comes from, for people."""
    filled: int = 0
    """Steps that were missing, and repeat the value of the week before."""

    @property
    def week(self) -> int:
        """Steps in a week."""
        return DAYS * self.steps_per_day


def load_power(path: Path | None) -> Power:
    """Read the UCI file at `path`, or take the half-hourly series of pmdarima where that is None.

    Raises:
        ValueError: the file is not of that form.
        SystemExit: there is neither.
    """
    if path is not None:
        return read_household(path)
    try:
        from pmdarima.datasets import load_taylor
    except ModuleNotFoundError:
        raise SystemExit(
            "No file is given, and pmdarima, which brings a series of electricity demand, is not installed. Give the "
            "UCI file (household_power_consumption.txt of archive.ics.uci.edu/dataset/235) with --file, or "
            "`pip install pmdarima`."
        ) from None
    return Power(
        values=np.asarray(load_taylor(), dtype=np.float64) / 1000,
        unit="GW",
        steps_per_day=48,
        origin="electricity demand in England and Wales, half-hourly, 5 June to 27 August 2000 (Taylor 2003)",
    )


def read_household(path: Path) -> Power:
    """Read a file in the form of the UCI one, into hourly means.

    Raises:
        ValueError: a column is missing, a date cannot be read, or lines are out of order.
    """
    import pandas

    columns = ["Date", "Time", "Global_active_power"]
    try:
        table = pandas.read_csv(path, sep=";", na_values=["?"], usecols=columns, dtype={"Date": str, "Time": str})
    except ValueError as problem:
        raise ValueError(
            f"{path} is not in the UCI form: {problem}. Its first line names {';'.join(columns)} and more."
        ) from None
    stamps = pandas.to_datetime(table["Date"] + " " + table["Time"], format="%d/%m/%Y %H:%M:%S")
    minutes = elapsed_minutes(stamps.to_numpy().astype("datetime64[m]"))
    kilowatts = pandas.to_numeric(table["Global_active_power"]).to_numpy(dtype=np.float64)
    hourly = _hourly(minutes, kilowatts)
    values, filled = _filled(hourly, week=24 * DAYS)
    return Power(values=values, unit="kW", steps_per_day=24, origin=f"{path.name}, hourly means", filled=filled)


def elapsed_minutes(local: npt.NDArray[np.datetime64]) -> npt.NDArray[np.int64]:
    """Return the minutes since midnight of the first day that have passed at each line of local time.

    Where clocks go back, on the last Sunday of October, an hour is there twice: lines jump back by less than an hour.
    Where they go forward, on the last Sunday of March, the hour from two to three is not there; a file whose clock
    never changes has it, or has lost it with more around it.

    >>> import numpy as np
    >>> elapsed_minutes(np.array(["2007-03-25T01:59", "2007-03-25T03:00"], dtype="datetime64[m]")).tolist()
    [119, 120]
    """
    local = local.astype("datetime64[m]")
    minutes = (local - local[0].astype("datetime64[D]")).astype(np.int64)
    steps = np.diff(minutes)
    back = (steps <= 0) & (steps > -60) & _is_change(local[1:], month=10, hours=(1, 2))
    if np.any((steps <= 0) & ~back):
        line = int(np.argmax((steps <= 0) & ~back)) + 3
        raise ValueError(f"line {line} is not later than the line before it, so the minutes cannot be told apart.")
    forward = (steps == 61) & _is_change(local[1:], month=3, hours=(3,))
    shift = 60 * (np.cumsum(back) - np.cumsum(forward))
    return minutes + np.concatenate([[0], shift])


def _is_change(local: npt.NDArray[np.datetime64], *, month: int, hours: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Tell which times are in the given hours of the month's last Sunday."""
    days = local.astype("datetime64[D]")
    first = days.astype("datetime64[M]")
    is_sunday = (days.astype(np.int64) + 3) % 7 == 6
    is_last = days + np.timedelta64(7, "D") >= (first + 1).astype("datetime64[D]")
    hour = (local - days).astype("timedelta64[h]").astype(np.int64)
    is_month = first.astype(np.int64) % 12 + 1 == month
    result: npt.NDArray[np.bool_] = is_sunday & is_last & is_month & np.isin(hour, hours)
    return result


def _hourly(minutes: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the means of hours; NaN for those of which too little is known."""
    there = ~np.isnan(values)
    hours = minutes[there] // 60
    count = int(minutes[-1] // 60) + 1
    sums = np.bincount(hours, weights=values[there], minlength=count)
    known = np.bincount(hours, minlength=count)
    return np.where(known >= LEAST_MINUTES, sums / np.maximum(known, 1), np.nan)


def _filled(values: npt.NDArray[np.float64], week: int) -> tuple[npt.NDArray[np.float64], int]:
    """Return the series from its first week that is whole at its start on, missing hours repeating the week before."""
    values = values.copy()
    missing = np.isnan(values)
    for place in np.flatnonzero(missing):
        before = values[place - week] if place >= week else np.nan
        values[place] = np.nanmean(values[: 2 * week]) if np.isnan(before) else before
    return values, int(missing.sum())
