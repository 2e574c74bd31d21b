"""Notes between the processes of a run, beside all collectives: from any thread, and without waiting for anybody.

Collectives are the main thread's: all processes make the same ones in the same order.  What a thread beside it has to
tell goes through the store of the rendezvous instead.
"""

from __future__ import annotations

import json
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # documented


class Notes:
    """Leaves notes in a store, and looks for those that others left there.

    Both raise RuntimeError where the store is gone.
    """

    def __init__(self, store: Store) -> None:
        """``store``: the rendezvous's; a clone of it is used, so that nobody waits for what another thread asks it."""
        self._store = store.clone()  # type: ignore[attr-defined]  # documented

    def leave(self, key: str, note: Any) -> None:
        """Leave what JSON can hold under a key that nobody has used before."""
        self._store.set(key, json.dumps(note))

    def take(self, key: str) -> Any:
        """Return the note under a key, and remove it; None: there is none yet."""
        if not self._store.check([key]):
            return None
        note = json.loads(self._store.get(key).decode())
        self._store.delete_key(key)
        return note
