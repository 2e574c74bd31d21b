"""A process that has finished ends well."""

from __future__ import annotations

import pytest

from tests.emulated_cuda.processes import run_script

SCRIPT = """
    import os, sys
    import torch, torch._dynamo  # what the optimizer imports

    for _ in range({count}):
        child = os.fork()
        if child == 0:
            model = torch.nn.Linear(8, 8).cuda()
            optimizer = torch.optim.SGD(model.parameters())
            model(torch.ones(2, 8, device="cuda")).sum().backward()
            optimizer.step()
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_process_that_takes_its_time_to_exit_is_not_aborted() -> None:
    """PyTorch's autograd thread would then meet the end of Python, and C++ end the process (see source/exit.c)."""
    assert run_script(SCRIPT.format(count=2), EXIT_MS=500).split() == ["0"] * 2


@pytest.mark.slow
def test_fifty_processes_end_well() -> None:
    assert run_script(SCRIPT.format(count=50)).split() == ["0"] * 50
