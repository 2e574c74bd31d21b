"""A time that others have disturbed is known as such, and replaced by what the thread itself took."""

from __future__ import annotations

import pytest

from tightfit.device import stopwatch
from tightfit.device.device import OperationTimer, OperationTimes
from tightfit.device.registry import device_for


class Clocks:
    """Clocks of the wall and of the processor, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.ran = 0.0
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(stopwatch.time, "thread_time", lambda: self.ran)

    def go(self, wall: float, ran: float) -> None:
        self.wall += wall
        self.ran += ran


@pytest.mark.parametrize(
    ("wall", "ran", "expected"),
    [
        (0.010, 0.010, (10.0, False)),
        (0.010, 0.009, (10.0, False)),
        (0.300, 0.010, (10.0, True)),  # of 300 ms it ran in ten
        (0.000020, 0.000001, (0.020, False)),  # two clocks that are read one after the other
        (0.010, 0.0, (10.0, False)),  # a clock that does not tell
    ],
)
def test_what_counts_is_the_time_in_which_the_thread_ran(
    wall: float, ran: float, expected: tuple[float, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks(monkeypatch)
    watch = stopwatch.Stopwatch()
    clocks.go(wall, ran)
    ms, is_disturbed = watch.read()
    assert (pytest.approx(ms), is_disturbed) == expected


def test_one_undisturbed_run_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    runs = iter([(0.2, 0.012), (0.010, 0.010), (0.4, 0.011)])
    times = OperationTimer(device_for("cpu")).times_ms(lambda: clocks.go(*next(runs)), 3)
    assert times == OperationTimes(pytest.approx(10.0), 0.0, False)
