"""What single operations cost, remembered on disk: a machine measures each distinct operation once.

One small JSON file per *environment* (this PyTorch, this device, these threads and settings) in the user's cache
folder.  Only costs are kept, never plans: a wrong entry can make a plan slower or have a guarded run repaired, never a
gradient wrong.

* What was measured while others kept the processor busy is not remembered, and measured again the next time.
* A file is replaced whole, so several processes may use it at once.  Of two that write at the same time one may lose
  its entries, which are then measured again.
* A file that is damaged, of another version or of another environment is not read, and is written anew.
* The oldest entries go when a file holds more than `_MOST_ENTRIES`, the least recently written files when the folder
  holds more than `_MOST_FILES`.

`TIGHTFIT_COST_CACHE=off` turns it off; `TIGHTFIT_CACHE_DIR` names another folder than ``~/.cache/tightfit`` (or
``$XDG_CACHE_HOME/tightfit``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.profiling.output_strides import Layouts

_log = logging.getLogger(__name__)

#: Raised when what an entry means changes.
_FORMAT = "tightfit.operation-costs/7"
_MOST_ENTRIES = 20_000
_MOST_FILES = 16
_OFF = ("off", "0", "false", "no")


@dataclass(frozen=True, slots=True)
class Cost:
    """What running one operation alone showed."""

    ms: float
    """Shortest time of several runs: the host's."""
    workspace_bytes: int
    """Most memory held inside, beyond inputs and outputs."""
    layouts: Layouts
    """How each result lies in memory."""
    device_ms: float = 0.0
    """Shortest time of a device that works beside the host."""
    is_disturbed: bool = False
    """Others kept the host's processor from it at every run: the time says little, and is not remembered."""

    @property
    def slower_ms(self) -> float:
        """The longer of its two times."""
        return max(self.ms, self.device_ms)

    @property
    def is_dangerous(self) -> bool:
        """Whether running the operation alone broke the device, so that nothing else is known of it."""
        return self.ms < 0


_DANGEROUS = Cost(-1.0, 0, ())


class CostCache:
    """The costs known for one device under the present settings, and the file that they come from."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """Read what is known; `folder` is by default `cache_folder()`."""
        self._environment = _environment(device)
        digest = hashlib.sha256(json.dumps(self._environment).encode()).hexdigest()
        self._folder = folder or cache_folder()
        self._path = None if self._folder is None else self._folder / f"operation-costs-{digest[:16]}.json"
        self._known = self._read()
        self._new: dict[str, Cost] = {}

    def get(self, call: object) -> Cost | None:
        """Return what is known of a call, if anything.  Its `repr` must hold all that its cost depends on."""
        return self._known.get(_key(call))

    def put(self, call: object, cost: Cost) -> None:
        """Note what a call was measured to cost, unless others disturbed that; `save` writes it."""
        if not cost.is_disturbed:
            self._new[_key(call)] = cost

    def put_dangerous(self, call: object) -> None:
        """Note, and write at once, that running a call alone broke the device."""
        self.put(call, _DANGEROUS)
        self.save()

    def save(self) -> None:
        """Write what was noted, with what other processes wrote meanwhile.  A folder that cannot be written is let be:
        the costs are measured again next time.
        """
        if self._path is None or not self._new:
            return
        merged = self._read()
        for key, cost in self._new.items():
            other = merged.pop(key, cost)
            # The machine was busy in the slower of two measurements; a workspace errs to the safe side.
            workspace_bytes = max(cost.workspace_bytes, other.workspace_bytes)
            device_ms = min(cost.device_ms, other.device_ms)
            merged[key] = Cost(min(cost.ms, other.ms), workspace_bytes, cost.layouts, device_ms)
        self._known = dict(list(merged.items())[-_MOST_ENTRIES:])
        self._new = {}
        try:
            _replace(self._path, self._document(self._known))
            _forget_old_files(self._path.parent)
        except OSError as error:
            _log.info("the costs of operations cannot be kept in %s (%s)", self._path, error)

    def _document(self, known: Mapping[str, Cost]) -> str:
        costs = {k: "dangerous" if c.is_dangerous else astuple(c)[:-1] for k, c in known.items()}
        text = json.dumps(costs, separators=(",", ":"))
        head = {"format": _FORMAT, "environment": self._environment, "checksum": _checksum(text)}
        return f"{json.dumps(head)}\n{text}\n"

    def _read(self) -> dict[str, Cost]:
        if self._path is None:
            return {}
        try:
            head, text = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(head) != json.loads(
                json.dumps({"format": _FORMAT, "environment": self._environment, "checksum": _checksum(text)})
            ):
                raise ValueError("it is of another version or environment, or damaged")
            return {key: _cost(entry) for key, entry in json.loads(text).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            _log.info("the costs of operations in %s are not used: %s", self._path, error)
            return {}


class NoCache(CostCache):
    """Knows nothing beforehand, and writes nothing."""

    def __init__(self) -> None:
        self._path = None
        self._known = {}
        self._new = {}

    def put(self, call: object, cost: Cost) -> None:
        """Know it until this object is gone."""
        self._known[_key(call)] = cost


def _cost(entry: Any) -> Cost:
    if entry == "dangerous":
        return _DANGEROUS
    ms, workspace_bytes, layouts, device_ms = entry
    # A layout's second number may be -1.
    sizes = (workspace_bytes, *(number + (place == 1) for layout in layouts for place, number in enumerate(layout)))
    if not all(isinstance(time, float | int) and math.isfinite(time) and time >= 0 for time in (ms, device_ms)):
        raise ValueError("a time in it is no time")
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError("a size in it is no size")
    return Cost(float(ms), workspace_bytes, tuple(tuple(layout) for layout in layouts), float(device_ms))


def _key(call: object) -> str:
    return hashlib.sha256(repr(call).encode()).hexdigest()[:24]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path | None:
    """Return where costs are kept; None: they are not."""
    if os.environ.get("TIGHTFIT_COST_CACHE", "").strip().lower() in _OFF:
        return None
    if named := os.environ.get("TIGHTFIT_CACHE_DIR"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tightfit"
    try:
        return Path.home() / ".cache" / "tightfit"
    except RuntimeError:
        return None


def _environment(device: torch.device) -> dict[str, str]:
    """Return all that a cost depends on besides the call itself."""
    return {
        **device_for(device).cost_key(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "default dtype": str(torch.get_default_dtype()),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _forget_old_files(folder: Path) -> None:
    files = sorted(folder.glob("operation-costs-*.json"), key=_written)
    for path in files[: max(0, len(files) - _MOST_FILES)]:
        with contextlib.suppress(OSError):
            path.unlink()


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
