"""What the processes of a run leave behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch.distributed as dist

from tests.train.launch.launching import GPT, free_port
from tightfit.cli.main import main
from tightfit.train.launch.roles import RUN_ID_PREFIX

pytestmark = pytest.mark.usefixtures("own_folder")


def test_after_an_error_the_group_is_gone_before_python_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads may else ask for Python's lock while Python ends, which aborts the process.

    After a whole run PyTorch's DDP itself keeps the group; nothing is on its way then.
    """
    environ = {"TORCHELASTIC_RUN_ID": f"{RUN_ID_PREFIX}test", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    groups: list[weakref.ref[Any]] = []
    right = dist.destroy_process_group

    def destroy() -> None:
        groups.append(weakref.ref(dist.group.WORLD))
        right()

    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    gc.disable()
    try:
        assert main([*GPT, "--dataset", "absent.txt"]) == 2
    finally:
        gc.enable()
    assert [group() for group in groups] == [None]
