"""An operation that breaks the device while it is measured: the error names it, whatever fails afterwards."""

from __future__ import annotations

import pytest

from tests.emulated_cuda.processes import run_script

SCRIPT = """
    import torch
    from torch import nn
    import tightfit

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to("cuda")
    batch = torch.ones(4, 8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())

    def squares(model, batch):
        return model(batch).square().mean()

    try:
        {call}
    except tightfit.errors.DeviceLost as error:
        print(error)
"""


CALLS = {
    "measure": "tightfit.measure(model, batch, loss=squares)",
    "fit": "tightfit.fit(model, batch, budget='1GiB', loss=squares, optimizer=optimizer)",
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_named(name: str) -> None:
    message = run_script(SCRIPT.format(call=CALLS[name]), BROKEN_BY="tanh_kernel")
    assert message.startswith("aten.tanh.default, run alone on made-up data")
    assert "device-side assert triggered" in message
