"""The plain records that the four verbs exchange, as versioned JSON: `Profile`, `Plan`, `Verdict`. Needs no PyTorch."""

from tightfit.records.allocator_state import AllocatorState
from tightfit.records.decision import Action, Decision, ValueName
from tightfit.records.plan import (
    DROPPED_SLOT_HOST_BYTES,
    TAPED_OP_HOST_BYTES,
    KeptValue,
    Plan,
    PlannedRegion,
    Recipe,
    SharedTape,
)
from tightfit.records.profile import Profile
from tightfit.records.step_tables import COMPONENTS, Event, EventKind, Op, Region, Signature, Slot, Storage, Value
from tightfit.records.stretch import StepWork, Stretch, step_ms
from tightfit.records.verdict import Verdict

__all__ = [
    "Action",
    "AllocatorState",
    "COMPONENTS",
    "DROPPED_SLOT_HOST_BYTES",
    "TAPED_OP_HOST_BYTES",
    "Decision",
    "Event",
    "EventKind",
    "KeptValue",
    "Op",
    "Plan",
    "PlannedRegion",
    "Profile",
    "Recipe",
    "Region",
    "SharedTape",
    "Signature",
    "Slot",
    "Storage",
    "StepWork",
    "Stretch",
    "Value",
    "ValueName",
    "Verdict",
    "step_ms",
]
