"""The plain records that the four verbs exchange, as versioned JSON: `Profile`, `Plan`, `Verdict`. Needs no PyTorch."""

from tightfit.records.plan import (
    DROPPED_VALUE_HOST_BYTES,
    RERUN,
    TAPED_OP_HOST_BYTES,
    Decision,
    Group,
    KeepSet,
    KeptValue,
    Plan,
    PlannedRegion,
    Recipe,
    Rerun,
)
from tightfit.records.profile import (
    COMPONENTS,
    Event,
    EventKind,
    Op,
    Profile,
    Region,
    Signature,
    Slot,
    Storage,
    Value,
)
from tightfit.records.verdict import Verdict

__all__ = [
    "COMPONENTS",
    "DROPPED_VALUE_HOST_BYTES",
    "RERUN",
    "TAPED_OP_HOST_BYTES",
    "Decision",
    "Event",
    "EventKind",
    "Group",
    "KeepSet",
    "KeptValue",
    "Op",
    "Plan",
    "PlannedRegion",
    "Profile",
    "Recipe",
    "Region",
    "Rerun",
    "Signature",
    "Slot",
    "Storage",
    "Value",
    "Verdict",
]
