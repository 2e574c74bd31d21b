"""Watch writes to what backward will still ask for: values of finished regions, found by their storage.

A tape hears of writes only while its own region runs.  Later regions, of the same forward or of the next one, may write
what it left behind: a buffer that they update, a result that they change through `.data`.  The session tells of every
write that it sees, and what is needed of the old contents is put aside then; see `before_write`.
"""

from __future__ import annotations

import weakref

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.replay.replayer import Replayer
from tightfit.replay.values import TapedValue


class WriteWatch:
    """The values of one applied plan that must survive a write to their storage."""

    def __init__(self) -> None:
        self.exposed: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Storages whose memory was handed out: from then on they may be written at any moment, unseen."""
        self.has_noticed = False
        """Somebody has written memory of whose being handed out nothing was known."""
        self.known: dict[int, bytes] = {}
        """What small storages held when the forward that runs read them, for marks to share."""
        self._by_storage: dict[int, list[tuple[weakref.ref[TapedValue], weakref.ref[Replayer]]]] = {}

    def add(self, key: int, value: TapedValue, tape: Replayer) -> None:
        """Watch a value of a tape that is in the storage with that key, or read from it."""
        self._by_storage.setdefault(key, []).append((weakref.ref(value), weakref.ref(tape)))

    def before_write(self, tensor: torch.Tensor) -> None:
        """Put aside what is needed of a tensor's storage, whose contents are about to change."""
        for value_reference, tape_reference in self._by_storage.pop(storage_key(tensor), ()):
            value, tape = value_reference(), tape_reference()
            # A value that lives reserves its storage's address, so the key still means that storage.  A tape lives as
            # long as a handle, without which nothing is needed any more.
            if value is not None and tape is not None:
                tape.before_write(value, tensor)

    def expose(self, tensor: torch.Tensor) -> None:
        """Note that the memory of the tensor's storage is handed out. To be safe, that counts as a write."""
        self.before_write(tensor)
        self._expose(tensor)

    def notice(self, tensor: torch.Tensor) -> None:
        """Note that the tensor's storage was written, unseen: what is to be put aside of it is not there any more."""
        self.has_noticed = True
        self._expose(tensor)

    def _expose(self, tensor: torch.Tensor) -> None:
        key, exposed = storage_key(tensor), self.exposed
        if key not in exposed:
            exposed[key] = weakref.ref(tensor.untyped_storage(), lambda _: exposed.pop(key, None))

    def prune(self) -> None:
        """Forget values that are gone, and what the last forward read."""
        self.known = {}
        alive = {key: [e for e in entries if e[0]() is not None] for key, entries in self._by_storage.items()}
        self._by_storage = {key: entries for key, entries in alive.items() if entries}
