"""The recipes of `examples/recipes`: the household's file is read as its clock meant it, and all of them train."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from examples.recipes import household_power, power_baselines
from examples.recipes.power_data import elapsed_minutes, load_power, read_household
from tightfit.cli.main import main

ROOT = Path(__file__).parent.parent
HEADER = "Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity"

pytestmark = pytest.mark.filterwarnings("ignore")


def kilowatts(hour: int) -> float:
    """What the household draws in each minute of an hour, by the hours since the file's first midnight."""
    return round(1.5 + np.sin(2 * np.pi * hour / 24) + 0.3 * np.sin(2 * np.pi * hour / 168) + hour / 1000, 3)


def household_file(path: Path, begin: datetime, days: int, gaps: dict[int, str]) -> Path:
    """Write a file in the UCI form, in the local time of France.

    gaps: by hour, "?" for values that are missing, "" for lines that are.
    """
    lines = [HEADER]
    utc = begin.replace(tzinfo=ZoneInfo("Europe/Paris")).astimezone(ZoneInfo("UTC"))
    for minute in range(days * 24 * 60):
        kind = gaps.get(minute // 60)
        if kind == "":
            continue
        local = (utc + timedelta(minutes=minute)).astimezone(ZoneInfo("Europe/Paris"))
        stamp = f"{local.day}/{local.month}/{local.year};{local:%H:%M:%S}"
        fields = ["?"] * 4 if kind == "?" else [f"{kilowatts(minute // 60):.3f}", "0.1", "240.0", "4.6"]
        lines.append(";".join([stamp, *fields]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("begin", [datetime(2008, 10, 20), datetime(2009, 3, 24)], ids=["autumn", "spring"])
def test_a_household_is_read_across_a_clock_change_and_gaps(begin: datetime, tmp_path: Path) -> None:
    gaps = {30: "?", 31: "", 32: "?", 210: "", 211: ""}
    power = read_household(household_file(tmp_path / "power.txt", begin, 14, gaps))
    assert (power.steps_per_day, power.unit, power.filled) == (24, "kW", 5)
    expected = np.array([kilowatts(hour) for hour in range(14 * 24)])
    for hour in (210, 211):  # the week before
        expected[hour] = expected[hour - 168]
    known = [hour for hour in range(14 * 24) if hour not in (30, 31, 32)]
    np.testing.assert_allclose(power.values[known], expected[known], atol=1e-9)
    assert np.isfinite(power.values).all()


def times(*texts: str) -> np.ndarray:
    return np.array(texts, dtype="datetime64[m]")


def test_a_clock_that_never_changes_is_left_alone() -> None:
    day = np.arange(np.datetime64("2009-03-29T00:00"), np.datetime64("2009-03-30T00:00"))
    assert elapsed_minutes(day).tolist() == list(range(1440))
    assert elapsed_minutes(times("2009-03-28T01:59", "2009-03-28T03:00")).tolist() == [119, 180]  # a gap, on a Saturday


def test_lines_out_of_order_are_named() -> None:
    with pytest.raises(ValueError, match="line 4 is not later"):
        elapsed_minutes(times("2009-05-01T00:00", "2009-05-01T00:01", "2009-05-01T00:00"))


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("Date,Power\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not in the UCI form"):
        read_household(tmp_path / "other.csv")


def test_without_a_file_and_without_pmdarima_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pmdarima.datasets", None)
    with pytest.raises(SystemExit, match="Give the UCI file"):
        load_power(None)


def test_no_method_sees_the_future(tmp_path: Path) -> None:
    """Changing what comes after a midnight changes no forecast that was made then."""
    power = read_household(household_file(tmp_path / "power.txt", datetime(2009, 5, 1), 35, {}))
    first = household_power.first_test_of(power)
    later = power.values.copy()
    later[first + 24 :] += 3.0
    other = household_power.Power(values=later, unit="kW", steps_per_day=24, origin="")
    methods = (power_baselines.seasonal_naive, power_baselines.arima, power_baselines.gradient_boosting)
    for method in methods:
        np.testing.assert_array_equal(method(power, first)[0], method(other, first)[0])
    windows = [household_power.Windows(one, first, 7) for one in (power, other)]
    assert (windows[0].before(first) == windows[1].before(first)).all()
    assert (windows[0].before(first + 48) != windows[1].before(first + 48)).any()


@pytest.mark.slow
def test_the_household_is_forecast_inside_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(power_baselines, "_WEEKS_FITTED", 1)
    file = household_file(tmp_path / "power.txt", datetime(2008, 10, 1), 35, {30: "?"})
    words = ["--file", str(file), "--window-days", "7", "--width", "8", "--batch-size", "4", "--steps", "2"]
    assert household_power.main([*words, "--memory", "600KiB", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "gradients equal, bit for bit" in shown
    assert {line.split()[0] for line in shown.splitlines() if line} >= {"seasonal-naive", "ARIMA", "xgboost", "LSTM"}
    assert (tmp_path / "out/day-ahead.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte-lm", "digits", "timm-cnn"])
def test_a_recipe_of_the_command_line_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "timm-cnn":
        pytest.importorskip("timm")
    monkeypatch.chdir(ROOT)
    words = ["train", "--config-file", f"examples/recipes/{name}.yaml", "--root-path", str(tmp_path), "--json"]
    assert main([*words, "STEPS", "1", "EVAL_SAMPLES", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured_peak_bytes"] <= found["budget_bytes"] < found["plain_peak_bytes"]
    assert found["gradients_equal"] is True


@pytest.mark.slow
def test_adapters_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.recipes import lora

    assert lora.main(["--steps", "2", "--sequence", "64", "--memory", "20MiB", "--output", str(tmp_path)]) == 0
    assert "gradients equal, bit for bit" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").is_file()
