"""A predicted step as a file that pytorch.org/memory_viz opens."""

from __future__ import annotations

import pickle
from pathlib import Path

from tightfit.records import Plan, Profile
from tightfit.simulation.memory_snapshot import memory_snapshot
from tightfit.train.files import replacing


def write_snapshot(path: Path, profile: Profile, plan: Plan) -> None:
    """Write the step of a profile under a plan, as ``torch.cuda.memory._dump_snapshot`` writes a real one."""
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(memory_snapshot(profile, plan.decisions, plan.shared_tapes)))
