"""Row 26, "FSDP2: double recompute, dtype mismatch": bf16 blocks with a float32 buffer train under a plan; operations
are replayed exactly as often as the plan says, and nothing is gathered or reduced more often than in the plain step.
"""

from __future__ import annotations

from tests.train.parallel.test_fsdp import sharded_steps


def test_bf16_blocks_with_a_float32_buffer() -> None:
    for found in sharded_steps(2, "16", "3", "2", "bf16"):
        assert found["equal"] == [True] * 4
        assert found["equal_inside"]
        assert found["mismatches"] == 0
        replayed, planned = found["replayed"]
        assert replayed == planned > 0
        with_plan, without = found["exchanges"]
        # Three blocks: gathered for forward and for backward; what is left of the model stays gathered in between.
        assert with_plan == without == {"all_gather": 7, "reduce_scatter": 4}
