"""One applied plan: it opens a session for the forward of a thread, and closes it at the outermost call's end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tightfit._torch_private.autograd import current_graph_task
from tightfit.errors import UnsupportedInput
from tightfit.operators.region_names import is_module_below
from tightfit.replay.executors import RegionCall
from tightfit.replay.plan_state import PlanState
from tightfit.replay.session import Session


@dataclass(kw_only=True)
class Installed(PlanState):
    """The state of an applied plan, and the forwards that are under way."""

    sessions: dict[int, Session] = field(default_factory=dict)
    """Open sessions by thread."""

    @contextmanager
    def region(self, path: str) -> Iterator[None]:
        """Open a call of the region at `path` that is no module's call, in the thread's session (opened if need be)."""
        session, depth = self._enter(path, None)
        try:
            yield
        except BaseException:
            self._exit(session, depth)
            raise
        self._exit(session, depth)
        self._tell(session)

    def run(self, path: str, call: RegionCall) -> Any:
        """Make a call of the region module at `path` as its decision says; see `region`."""
        session, depth = self._enter(path, call)
        try:
            result = session.run(call)
        except BaseException:
            self._exit(session, depth)
            raise
        self._exit(session, depth)
        self._tell(session)
        return result

    def _enter(self, path: str, call: RegionCall | None) -> tuple[Session, int]:
        """Begin a region call; return its session, and how many calls were open in that."""
        thread = threading.get_ident()
        session = self.sessions.get(thread)
        if session is None:
            session = self.sessions[thread] = self._begin_session(path)
        depth = session.depth
        try:
            session.enter(path, call)
        except BaseException:
            self._exit(session, depth)
            raise
        return session, depth

    def _begin_session(self, path: str) -> Session:
        if self.sessions and current_graph_task() < 0:
            raise UnsupportedInput(
                "two threads run forward of one planned model at the same time. The plan's memory prediction and "
                "its bookkeeping are for one forward at a time. Use one process per device (torchrun), give each "
                "thread its own copy of the model, or call remove() first; nn.DataParallel is not supported."
            )
        if self.listener is not None and is_module_below(path) and current_graph_task() < 0:
            self.listener.region_alone(path)
        return Session(self, self.region)

    def _exit(self, session: Session, depth: int) -> None:
        """End a region call, and the session with its outermost one."""
        try:
            while session.depth > depth:  # before PyTorch 2.13, a checkpointed function that fails is not ended
                session.exit()
        finally:
            if session.is_over:
                self.sessions.pop(session.thread, None)
                session.close()

    def _tell(self, session: Session) -> None:
        if self.listener is not None and session.is_over:
            session.tell(self.listener)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the ops that this thread runs inside untaped: FSDP2's all-gathers and gradient reductions."""
        session = self.sessions.get(threading.get_ident())
        if session is None:
            yield
            return
        session.aside += 1
        try:
            yield
        finally:
            session.aside -= 1
