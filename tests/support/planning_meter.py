"""Meters everything, also what tightfit itself meters in between: only one profiler can run in a process."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from tightfit._torch_private.profiler import profiler_is_running, profiler_memory_events
from tightfit.device import host_meter as meter_module

_Profile = torch.profiler.profile


class PlanningMeter:
    """The peak, in bytes above the level at its beginning, of all that runs inside the context."""

    def __init__(self) -> None:
        self.level = 0
        self.peak = 0
        self._own: Any = None

    def __enter__(self) -> PlanningMeter:
        meter = self

        class Nested(_Profile):
            """A profiler started by what is metered: takes turns with the meter's own."""

            def __enter__(self) -> Any:
                meter._stop()
                return super().__enter__()

            def __exit__(self, *error: Any) -> Any:
                result = super().__exit__(*error)
                meter._add(self)
                meter._start()
                return result

        torch.profiler.profile = Nested  # type: ignore[misc]  # replaced for the test
        meter_module.profiler_is_running = lambda: False
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.profiler.profile = _Profile  # type: ignore[misc]  # replaced for the test
        meter_module.profiler_is_running = profiler_is_running
        self._stop()

    def _start(self) -> None:
        self._own = _Profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._own.__enter__()

    def _stop(self) -> None:
        self._own.__exit__(None, None, None)
        self._add(self._own)

    def _add(self, profile: Any) -> None:
        for _, nbytes in profiler_memory_events(profile):
            self.level += nbytes
            self.peak = max(self.peak, self.level)
