"""Use the GPU that was chosen and no other, without a word about it when distributed: "You have chosen a specific GPU.
This will completely disable data parallelism".

See https://github.com/pytorch/examples/issues/1001.
"""

from __future__ import annotations

import pytest
import torch

from tightfit.errors import UnsupportedInput
from tightfit.train.launch.devices import take_device
from tightfit.train.launch.roles import Alone, Member
from tightfit.train.launch.settings import DistributedSettings

SECOND = Member(rank=1, world_size=2, local_rank=1, shares_node=True, rendezvous="tcp://127.0.0.1:1")


@pytest.mark.parametrize("role", [Alone(), SECOND])
def test_that_gpu_and_no_word(
    role: Alone | Member,
    gpus: list[torch.device],
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    second = torch.device("cuda", 1)
    assert take_device(role, DistributedSettings(gpu=1), "auto") == second  # the run's introduction names it
    assert gpus == [second]
    assert not list(recwarn)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_process_alone_has_the_current_gpu_by_its_number(device: str, gpus: list[torch.device]) -> None:
    assert take_device(Alone(), DistributedSettings(), device) == torch.device("cuda", 0)
    assert gpus == []  # PyTorch makes none current without a number


def test_the_same_gpu_for_all_is_an_error(gpus: list[torch.device]) -> None:
    with pytest.raises(UnsupportedInput, match=r"would put all processes of this node on one GPU; this one's is 1"):
        take_device(SECOND, DistributedSettings(gpu=0), "auto")
