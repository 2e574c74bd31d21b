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


@pytest.mark.slow
def test_an_autograd_thread_that_outlives_python_does_not_abort_the_process() -> None:
    """It did, with "terminate called without an active exception" (see source/exit.c)."""
    script = """
        import threading, time
        import torch

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                time.sleep(1.0)  # without Python's lock, which it takes again when Python has ended
                return gradient

        x = torch.ones(2, device="cuda", requires_grad=True)
        loss = Slow.apply(x).sum()
        threading.Thread(target=loss.backward, daemon=True).start()
        time.sleep(0.5)
        print("finished")
    """
    assert run_script(script, EXIT_MS=2500) == "finished\n"


@pytest.mark.slow
def test_fifty_processes_end_well() -> None:
    assert run_script(SCRIPT.format(count=50)).split() == ["0"] * 50
