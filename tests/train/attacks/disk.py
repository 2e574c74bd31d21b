"""Disks that are full or fail, limits, permissions that are revoked, clocks that jump: what is said and kept.

Needs a system on which a small tmpfs can be mounted (root) for the full disks; without, those lines are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.train.attacks.runs import Fork, differences, newest_step, run_folder, start
from tests.train.attacks.subject import words

STEPS, SAVE_EVERY = 8, 2
KIB = 1024


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Callable[[], None]]:
    """A disk of so many bytes at the folder; what is yielded makes it large."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _last_line(fork: Fork) -> str:
    lines = [line for line in fork.said().splitlines() if line.startswith("tightfit:")]
    return (lines or fork.said().splitlines() or [""])[-1]


class Table:
    """What became of each attack."""

    def __init__(self, whole: Path) -> None:
        self._whole = whole
        self.lines: list[dict[str, object]] = []
        self.wrong = 0

    def add(
        self, what: str, first: Fork, again: Fork, run: Path, kept_step: int, codes: tuple[int, ...] = (0, 1, 2)
    ) -> None:
        """Note how the attacked run ended, and what the same command made of it afterwards."""
        code, then = first.finish(), again.finish()
        found = differences(run, self._whole) if then == 0 else [f"then exit {then}: {_last_line(again)}"]
        has_traceback = "Traceback" in first.said() + again.said()
        is_wrong = bool(found) or has_traceback or code not in codes
        self.wrong += is_wrong
        said = _last_line(first) if code else "(finished)"
        then_said = found or "the same bits"
        self.lines.append({"attack": what, "exit": code, "kept_step": kept_step, "said": said, "then": then_said})
        print(f"{what:<42} exit {code}  kept step {kept_step}  then {then_said}", flush=True)
        print(f"    {'TRACEBACK ' if has_traceback else ''}{said[:150]}", flush=True)


def after_first_save(action: Callable[[], object]) -> Callable[[], None]:
    """For a fork: do something as soon as its first checkpoint is written, when the next steps are being taken."""

    def prepare() -> None:
        from tightfit.train.checkpoint import Draft

        commit = Draft.commit

        def committed(self: Draft, *arguments: object) -> Path:
            folder = commit(self, *arguments)  # type: ignore[arg-type]  # passed on
            if self.step == SAVE_EVERY:
                action()
            return folder

        Draft.commit = committed  # type: ignore[assignment, method-assign]  # in this fork only

    return prepare


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def obey_permissions() -> None:
    """Take from root, in this process, the right to read and write whatever permissions say (capabilities(7))."""
    if os.getuid():
        return
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    sets[0].permitted &= ~0b110
    assert libc.capset(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())


def permissions(root: Path, command: list[str], table: Table) -> None:
    """Revoke the right to write or to read in the midst of a run, or before it; then give it back."""
    runs = root / "runs"
    attacks = {
        "checkpoints/ not writable any more": ("checkpoints", 0o555),
        "run folder not writable any more": (".", 0o555),
        "run folder not to be entered any more": (".", 0o000),
        "metrics.jsonl not writable any more": ("metrics.jsonl", 0o444),
        "log.txt not writable any more": ("log.txt", 0o444),
    }
    for number, (what, (name, mode)) in enumerate(attacks.items()):
        run = run_folder(runs, f"permissions-{number}")
        full = [*command, "--mark", run.name, "--root-path", str(runs)]
        revoke = after_first_save(lambda path=run / name, mode=mode: path.chmod(mode))  # type: ignore[misc]  # bound

        def prepare(revoke: Callable[[], None] = revoke) -> None:
            obey_permissions()
            revoke()

        first = start(full, root / "first.txt", prepare)
        first.finish()
        (run / name).chmod(0o755 if name != "metrics.jsonl" else 0o644)
        table.add(what, first, start(full, root / "again.txt", obey_permissions), run, newest_step(run))
    for what, name, mode in (
        ("root path not writable at the start", ".", 0o555),
        ("newest checkpoint not readable at resume", "checkpoints/latest/training.safetensors", 0o000),
        ("config.yaml not readable at resume", "config.yaml", 0o000),
    ):
        folder = root / f"closed-{name.count('/')}-{mode}"
        run = run_folder(folder, "m")
        run.mkdir(parents=True)
        full = [*command, "--mark", "m", "--root-path", str(folder)]
        if name != ".":
            stopped = after_first_save(lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert start(full, root / "stopped.txt", stopped).finish() == 128 + signal.SIGTERM
        (run / name).chmod(mode)
        first = start(full, root / "first.txt", obey_permissions)
        first.finish()
        kept = newest_step(run)
        for path in run.rglob("*"):
            path.chmod(0o755)
        run.chmod(0o755)
        table.add(what, first, start(full, root / "again.txt", obey_permissions), run, kept)


def clocks(root: Path, command: list[str], table: Table) -> None:
    """Let the clock jump by years at every look, and give files times of another century, before and after."""
    for number, stamp in enumerate((0, 4_000_000_000)):
        run = run_folder(root / "runs", f"clock-{number}")
        full = [*command, "--mark", run.name, "--root-path", str(root / "runs")]

        def jumps() -> None:
            real, chance = time.time, random.Random(1)
            time.time = lambda: real() + chance.uniform(-1e9, 1e9)
            time.time_ns = lambda: int(1e9 * time.time())

        def stopped(jumps: Callable[[], None] = jumps) -> None:
            jumps()
            after_first_save(lambda: os.kill(os.getpid(), signal.SIGTERM))()

        first = start(full, root / "first.txt", stopped)
        first.finish()
        kept = newest_step(run)
        for path in (run, *run.rglob("*")):
            os.utime(path, (stamp, stamp), follow_symlinks=False)
        what = f"clock that jumps, then files of {time.gmtime(stamp).tm_year}"
        table.add(what, first, start(full, root / "again.txt", jumps), run, kept, codes=(128 + signal.SIGTERM,))


def failing_devices(root: Path, command: list[str], table: Table) -> None:
    """Let the disk fail at one flush after the other."""
    for place in range(0, 24, 3):
        run = run_folder(root / "runs", f"flush-{place}")
        full = [*command, "--mark", run.name, "--root-path", str(root / "runs")]

        def fails(place: int = place) -> None:
            flush, calls = os.fsync, iter(range(10**9))

            def fsync(descriptor: int) -> None:
                if place <= next(calls) < place + 3:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                flush(descriptor)

            os.fsync = fsync  # type: ignore[assignment]  # in this fork only

        first = start(full, root / "first.txt", fails)
        first.finish()
        table.add(f"flushes {place} to {place + 2} fail", first, start(full, root / "again.txt"), run, newest_step(run))


def no_files(root: Path, command: list[str], table: Table) -> None:
    """Let a process have no more open files than it has, in the midst of its run."""
    run = run_folder(root / "runs", "files")
    full = [*command, "--mark", run.name, "--root-path", str(root / "runs")]

    def no_more_files() -> None:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))

    first = start(full, root / "first.txt", after_first_save(no_more_files))
    first.finish()
    table.add("no more open files", first, start(full, root / "again.txt"), run, newest_step(run))


def read_only(root: Path, command: list[str], table: Table) -> None:
    """Let the disk become read-only in the midst of a run, as file systems do that find an error."""
    disk = root / "disk"
    with small_disk(disk, 64 * KIB**2):
        run = run_folder(disk, "m")
        full = [*command, "--mark", "m", "--root-path", str(disk)]
        remount = ["mount", "--options", "remount,ro", str(disk)]

        def revoke() -> None:
            for descriptor in os.listdir("/proc/self/fd"):  # a disk that is written to cannot be made so
                with suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(disk)):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), int(descriptor))
            subprocess.run(remount, check=True)

        first = start(full, root / "first.txt", after_first_save(revoke))
        first.finish()
        kept = newest_step(run)
        subprocess.run(["mount", "--options", "remount,rw", disk], check=True)
        again = start(full, root / "again.txt")
        again.finish()
        table.add("disk that becomes read-only", first, again, run, kept)


def full_disks(root: Path, command: list[str], table: Table, sizes: int) -> None:
    """Step through disks on which a run meets each of its writes without room."""
    needed = sum(path.stat().st_size for path in table._whole.rglob("*") if path.is_file() and not path.is_symlink())
    for number in range(sizes):
        nbytes = (4 + number * (needed // KIB + 64) // sizes // 4 * 4) * KIB
        disk = root / "disk"
        with small_disk(disk, nbytes) as enlarge:
            run = run_folder(disk, "m")
            full = [*command, "--mark", "m", "--root-path", str(disk)]
            first = start(full, root / "first.txt")
            first.finish()
            kept = newest_step(run)
            enlarge()
            again = start(full, root / "again.txt")
            again.finish()
            table.add(f"disk of {nbytes // KIB} KiB", first, again, run, kept)


def limits(root: Path, command: list[str], table: Table, sizes: int) -> None:
    """Limit the size of any one file, and the address space, so that writes and allocations fail."""
    largest = max(path.stat().st_size for path in table._whole.rglob("*") if path.is_file())
    for number in range(sizes):
        nbytes = largest * (number + 1) // sizes - 1
        run = run_folder(root / "runs", f"limit-{number}")
        full = [*command, "--mark", f"limit-{number}", "--root-path", str(root / "runs")]

        def limit(nbytes: int = nbytes) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

        first = start(full, root / "first.txt", limit)
        first.finish()
        kept = newest_step(run)
        table.add(f"files of {nbytes // KIB} KiB at most", first, start(full, root / "again.txt"), run, kept)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for more_mib in (0, 8, 32, 64):
        run = run_folder(root / "runs", f"space-{more_mib}")
        full = [*command, "--mark", f"space-{more_mib}", "--root-path", str(root / "runs")]

        def space(nbytes: int = held + more_mib * KIB**2) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))

        first = start(full, root / "first.txt", space)
        first.finish()
        kept = newest_step(run)
        table.add(f"{more_mib} MiB more address space", first, start(full, root / "again.txt"), run, kept)


def folders(root: Path, command: list[str], table: Table) -> None:
    """Move the folder away in the midst of a run; names outside of ASCII; a process that is stopped for a while."""
    runs = root / "runs"
    run = run_folder(runs, "moved")
    full = [*command, "--mark", "moved", "--root-path", str(runs)]
    first = start(full, root / "first.txt")
    while newest_step(run) < 2 and not first.has_ended():
        time.sleep(0.001)
    run.rename(runs / "elsewhere")
    first.finish()
    if run.exists():
        run.rename(runs / "made-anew")
    (runs / "elsewhere").rename(run)
    table.add("folder moved, and moved back", first, start(full, root / "again.txt"), run, newest_step(run))

    for what, odd in (("a path outside of ASCII", "Läufe — прогон 走\u0301"), ("a path of two lines", " a\n\t'b\" ")):
        full = [*command, "--mark", "größe 走", "--root-path", str(root / odd)]
        first = start(full, root / "first.txt")
        first.finish()
        (made,) = (root / odd).glob("*/*")
        table.add(what, first, start(full, root / "again.txt"), made, newest_step(made))

    run = run_folder(runs, "stopped")
    full = [*command, "--mark", "stopped", "--root-path", str(runs)]
    first = start(full, root / "first.txt")
    while newest_step(run) < 2 and not first.has_ended():
        time.sleep(0.001)
    first_is_there = not first.has_ended()
    if first_is_there:
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(first.pid, signal.SIGCONT)
    first.finish()
    table.add("stopped for 5 s, and continued", first, start(full, root / "again.txt"), run, newest_step(run))


def main() -> int:
    """Read the command line and attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=24, help="full disks, and limits on the size of files")
    parser.add_argument("--output", type=Path, help="a file for one line of JSON for each attack")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disk-") as name:
        root = Path(name)
        command = words(STEPS, SAVE_EVERY)
        whole = start([*command, "--mark", "whole", "--root-path", str(root / "runs")], root / "whole.txt")
        assert whole.finish() == 0, whole.said()
        table = Table(run_folder(root / "runs", "whole"))
        folders(root, command, table)
        permissions(root, command, table)
        clocks(root, command, table)
        failing_devices(root, command, table)
        no_files(root, command, table)
        limits(root, command, table, max(1, options.sizes // 3))
        try:
            with small_disk(root / "probe", KIB**2):
                pass
        except (OSError, subprocess.CalledProcessError):
            print("no tmpfs can be mounted here: full disks are left out")
        else:
            read_only(root, command, table)
            full_disks(root, command, table, options.sizes)
        if options.output is not None:
            options.output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in table.lines))
        print(f"\n{len(table.lines)} attacks; a traceback, a wrong exit code, or other bits afterwards: {table.wrong}")
        return 1 if table.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
