"""Runs the methods on one model: a process for each, set up one after the other, then timed in interleaved rounds."""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.families import TRANSFORMERS
from benchmarks.side_by_side.methods import Method
from benchmarks.side_by_side.worker import Job, Setup, in_a_line, serve

#: Steps of one turn; the first finds the caches full of another process's data and is not counted.
_TURN = 3
#: Turns of each backend's plain step in a round: the others are compared to their median.
_PLAIN_TURNS = 3


@dataclass(frozen=True)
class Scope:
    """How much is run."""

    families: tuple[str, ...]
    fractions: tuple[float, ...]
    """Budgets, as places between the smallest peak of an eager peer and the plain peak."""
    rounds: int
    every_k: tuple[int, ...]
    compiled: tuple[str, ...] = ()
    """Families on which compiled peers run, too."""
    ratios: tuple[float, ...] = ()
    """The partitioner's budgets there, beside 1."""
    more_peers: bool = True
    """Wrappers that do the same as `torch.utils.checkpoint` on every block, and torch_remat."""


@dataclass
class Row:
    """One method on one model."""

    setup: Setup
    times_ms: list[float] = field(default_factory=list)
    """Mean step time of each round."""
    overheads: list[float] = field(default_factory=list)
    """Over the same backend's plain step in the same round."""


@dataclass
class FamilyResult:
    """All rows of one model."""

    family: str
    rows: list[Row]
    budgets_bytes: list[int]

    def row(self, name: str, value: Any = None) -> Row:
        """The row of a method."""
        return next(r for r in self.rows if r.setup.method.name == name and r.setup.method.value == value)


@dataclass
class _Worker:
    setup: Setup
    process: BaseProcess | None = None
    connection: Connection | None = None


class FamilyRun:
    """The processes of one model."""

    def __init__(self, family: str, scope: Scope, folder: Path) -> None:
        self._family, self._scope, self._folder = family, scope, folder
        self._workers: list[_Worker] = []

    def run(self) -> FamilyResult:
        """Set up, time, and end the processes."""
        try:
            plain = self._start([Method("plain")])[0]
            if plain.setup.failure:
                raise RuntimeError(f"{self._family}: the plain step failed: {plain.setup.traceback}")
            peers = self._start(self._peers())
            peaks = [w.setup.peak_bytes for w in peers if w.setup.equal and w.setup.method.backend == "eager"]
            smallest, largest = min(peaks), plain.setup.peak_bytes
            budgets = [round(smallest + part * (largest - smallest)) for part in self._scope.fractions]
            self._start(self._by_sac_ilp(budgets))
            # Alone: it measures the operations' times.
            self._start([Method("tightfit", "at its smallest", value=0)])
            for part, budget in zip(self._scope.fractions, budgets, strict=True):
                self._start([Method("tightfit", f"at {part:.0%}", value=budget)])
            rows = [Row(worker.setup) for worker in self._workers]
            self._time(rows)
            return FamilyResult(self._family, rows, budgets)
        finally:
            self._end()

    def _peers(self) -> Iterable[Method]:
        scope = self._scope
        for k in scope.every_k:
            yield Method("checkpoint", f"every {k}", value=k)
        yield Method("op list", "all mm", value=True)
        yield Method("op list", "every second mm", value=False)
        if scope.more_peers:
            if self._family in TRANSFORMERS:
                yield Method("transformers", "every 1", value=1)
                yield Method("transformers", "every 2", value=2)
            yield Method("fairscale")
            yield Method("deepspeed")
            if self._family == "gpt":
                yield Method("torch_remat", "nothing kept", value=False)
                yield Method("torch_remat", "attention kept", value=True)
        if self._family in scope.compiled:
            for name in ("compile whole", "compile blocks"):
                for ratio in (1.0, *scope.ratios):
                    yield Method(name, f"ratio {ratio}", backend=name, value=ratio)

    def _by_sac_ilp(self, budgets: list[int]) -> list[Method]:
        from benchmarks.side_by_side.sac_ilp import decide

        labels = [f"at {part:.0%}" for part in self._scope.fractions]
        try:
            with ProcessPoolExecutor(1, mp_context=_context()) as pool:
                decisions = pool.submit(decide, self._family, budgets).result()
        except Exception as error:
            self._fail(Method("sac_ilp"), in_a_line(error))
            return []
        methods = []
        for label, decision in zip(labels, decisions, strict=True):
            if isinstance(decision, str):
                self._fail(Method("sac_ilp", label), decision)
            else:
                methods.append(Method("sac_ilp", label, value=decision))
        return methods

    def _fail(self, method: Method, failure: str) -> None:
        self._workers.append(_Worker(Setup(method, failure=failure)))

    def _start(self, methods: Iterable[Method]) -> list[_Worker]:
        """One after the other: some of them time operations."""
        started: list[_Worker] = []
        for method in methods:
            job = Job(self._family, method, self._folder / "plain.pt", self._folder / "operations.pt")
            here, there = multiprocessing.Pipe()
            process = _context().Process(target=serve, args=(job, there), daemon=True)
            process.start()
            there.close()
            try:
                setup = here.recv()
            except EOFError:
                process.join()
                setup = Setup(method, failure=f"the process ended with {process.exitcode}")
            said = setup.failure or f"{setup.peak_bytes / 2**20:.1f} MiB"
            print(f"  {self._family}, {method.label}: {said}", file=sys.stderr)
            started.append(_Worker(setup, process, here))
        self._workers += started
        return started

    def _time(self, rows: list[Row]) -> None:
        running = [(worker, row) for worker, row in zip(self._workers, rows, strict=True) if not row.setup.failure]
        order = random.Random(0)
        for _ in range(self._scope.rounds):
            turns = [pair for pair in running for _ in range(_PLAIN_TURNS if is_plain(pair[1].setup.method) else 1)]
            order.shuffle(turns)
            found: dict[int, list[float]] = {}
            for worker, row in turns:
                worker.connection.send(_TURN)
                times = worker.connection.recv()[1:]
                found.setdefault(id(row), []).append(sum(times) / len(times))
            plain_ms = {
                row.setup.method.backend: sorted(found[id(row)])[_PLAIN_TURNS // 2]
                for _, row in running
                if is_plain(row.setup.method)
            }
            for _, row in running:
                times = sorted(found[id(row)])
                row.times_ms.append(times[len(times) // 2])
                if (own := plain_ms.get(row.setup.method.backend)) is not None:
                    row.overheads.append(row.times_ms[-1] / own - 1)

    def _end(self) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.is_alive():
                worker.connection.send("quit")
                worker.process.join(timeout=10)
                worker.process.kill()


def is_plain(method: Method) -> bool:
    """What the others of its backend are compared to."""
    return method.name == "plain" or (method.backend != "eager" and method.value == 1.0)


def _context() -> Any:
    """Processes that start with the libraries loaded and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "tightfit", "tests.suite.vision"])
    return context


def run_family(family: str, scope: Scope) -> FamilyResult:
    """All methods on one model."""
    print(family, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        return FamilyRun(family, scope, Path(folder)).run()
