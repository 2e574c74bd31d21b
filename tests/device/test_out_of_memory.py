"""A lack of memory is recognised in all its forms; training inside the budget lives where the plain step dies."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tightfit.device.out_of_memory import is_out_of_memory


def allocated_in_vain() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("the step failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        None,
    ],
    ids=str,
)
def test_other_errors(error: BaseException | None) -> None:
    assert not is_out_of_memory(error)


def test_a_real_failure_of_the_allocator() -> None:
    assert is_out_of_memory(allocated_in_vain())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size as Linux tells it")
@pytest.mark.exhaustive
def test_a_capped_process_trains_inside_the_budget_where_the_plain_step_dies() -> None:
    budget_bytes, half_gib = 280 * 2**20, 2**29
    # Huge pages make zeroing fresh memory, which takes most of this test's time, cheaper.
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.capped_process", "1600", str(budget_bytes)],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["plain_peak_bytes"] - budget_bytes >= half_gib
    # The plain step needs more than the whole cap allows: it cannot have had a chance.
    room_bytes = found["cap_bytes"] - found["own_bytes"]
    assert found["plain_peak_bytes"] - found["baseline_bytes"] > room_bytes
    assert found["plain"] == "out of memory"
    assert len(found["losses"]) == 1
    assert found["ok"] is not False
    assert found["measured_peak_bytes"] <= budget_bytes
    assert found["largest_bytes"] < found["cap_bytes"]
