"""What a process is, from flags and environment: as users of the ImageNet example, torchrun and Slurm expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tightfit.errors import UnsupportedInput
from tightfit.train.launch.devices import choose_backend, take_device
from tightfit.train.launch.roles import RUN_ID_PREFIX, Alone, Member, Role, Starter, find_role, first_host
from tightfit.train.launch.settings import DistributedSettings

RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    **RENDEZVOUS, "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


def role(environ: dict[str, str] | None = None, *, gpus: int = 0, **flags: Any) -> Role:
    return find_role(DistributedSettings(**flags), environ or {}, gpus)


def member(environ: dict[str, str] | None = None, **flags: Any) -> Member:
    found = role(environ, **flags)
    assert isinstance(found, Member)
    return found


def refusal(environ: dict[str, str] | None = None, *, gpus: int = 0, **flags: Any) -> str:
    with pytest.raises(UnsupportedInput) as caught:
        role(environ, gpus=gpus, **flags)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, {}),
        ({}, {"gpu": 0}),
        ({}, {"world_size": 1}),
        ({}, {"world_size": 1, "rank": 0}),
        ({}, {"strategy": "none"}),
        (RENDEZVOUS, {}),  # left over in the shell: no process has a rank
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}),  # a batch script without srun: it is the only process
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, {}),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {}),
    ],
)
def test_alone(environ: dict[str, str], flags: dict[str, Any]) -> None:
    assert role(environ, **flags) == Alone()


@pytest.mark.parametrize("flags", [{"dist_train": True}, {"local_rank": 0}])
def test_a_run_that_should_have_several_processes_and_has_one_says_so(flags: dict[str, Any]) -> None:
    found = role(**flags)
    assert isinstance(found, Alone)
    assert "one process only" in found.notice
    assert "torchrun --nproc-per-node 2 -m tightfit train" in found.notice


# ------------------------------------------------------------------------------------------------ launched


def test_torchrun() -> None:
    assert member(TORCHRUN) == Member(
        rank=3, world_size=4, local_rank=1, shares_node=True, rendezvous="tcp://10.0.0.1:29500", agent_hosts=True
    )
    assert member({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2


def test_the_old_launcher_passes_the_local_rank_as_a_flag() -> None:
    environ = {name: value for name, value in TORCHRUN.items() if "LOCAL" not in name and "ELASTIC" not in name}
    found = member(environ, local_rank=1)
    assert (found.local_rank, found.agent_hosts) == (1, False)
    assert member(TORCHRUN, local_rank=1).local_rank == 1
    assert "LOCAL_RANK is 1" in refusal(TORCHRUN, local_rank=0)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named_with_a_command_that_works(missing: str) -> None:
    message = refusal({name: value for name, value in TORCHRUN.items() if name != missing})
    assert message.startswith(f"{missing} is not set")
    assert "torchrun --nproc-per-node 2 -m tightfit train" in message
    assert "--multiprocessing-distributed" in message


def test_several_missing_variables_are_all_named() -> None:
    assert refusal({"RANK": "0"}).startswith("WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set, though RANK is")
    assert "LOCAL_RANK is not set" in refusal({**RENDEZVOUS, "WORLD_SIZE": "2", "RANK": "0"})


def test_a_rendezvous_of_its_own_needs_no_variables() -> None:
    environ = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    assert member(environ, dist_url="tcp://host:1234").rendezvous == "tcp://host:1234"
    assert member(environ, dist_url="file:///shared/meet").rendezvous == "file:///shared/meet"


# ------------------------------------------------------------------------------------------------ by hand


def test_started_by_hand() -> None:
    found = member(world_size=2, rank=1, dist_url="tcp://127.0.0.1:1234")
    assert (found.rank, found.world_size, found.local_rank) == (1, 2, 0)
    assert member(gpus=2, world_size=4, rank=3, dist_url="tcp://127.0.0.1:1234").local_rank == 1
    with_gpu = member(gpus=2, world_size=2, rank=0, gpu=1, dist_url="tcp://127.0.0.1:1234")
    assert (with_gpu.local_rank, with_gpu.shares_node) == (1, False)


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, {"world_size": 2}, "it is not known which of these processes this is"),
        ({}, {"rank": 1}, "it is not known how many there are"),
        ({}, {"world_size": 2, "rank": 0}, "MASTER_ADDR, MASTER_PORT are not set"),
        ({}, {"world_size": 2, "rank": 2, "dist_url": "tcp://h:1"}, "ranks go from 0 to 1"),
        ({}, {"world_size": 1, "rank": 3}, "the rank is 3"),
        (TORCHRUN, {"world_size": 2, "rank": 3}, "--world-size is 2, but WORLD_SIZE is 4"),
        (TORCHRUN, {"world_size": 4, "rank": 0}, "--rank is 0, but RANK is 3"),
        ({**TORCHRUN, "RANK": "4"}, {}, "ranks go from 0 to 3"),
        ({**TORCHRUN, "RANK": "three"}, {}, "RANK is 'three'"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, {}, "WORLD_SIZE is empty"),
        ({}, {"world_size": 2, "rank": 0, "dist_url": "tcp://host"}, "does not name a host and a port"),
        ({}, {"nproc_per_node": 2}, "nothing asks to start any"),
        (TORCHRUN, {"strategy": "none"}, "--strategy none asks for one process"),
        ({}, {"world_size": 2, "rank": 0, "strategy": "none"}, "--strategy none asks for one process"),
        (TORCHRUN, {"multiprocessing_distributed": True}, "too many of them"),
        ({}, {"multiprocessing_distributed": True, "strategy": "none"}, "asks for one"),
        ({}, {"multiprocessing_distributed": True, "world_size": 2}, "which of them this is"),
        ({}, {"multiprocessing_distributed": True, "world_size": 2, "rank": 2}, "ranks go from 0 to 1"),
        (
            {},
            {"multiprocessing_distributed": True, "world_size": 2, "rank": 0, "dist_url": "file:///x"},
            "is an address",
        ),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], flags: dict[str, Any], message: str) -> None:
    assert message in refusal(environ, **flags)


@pytest.mark.parametrize(
    "flags",
    [{"world_size": 0}, {"world_size": -2}, {"rank": -2}, {"gpu": -1}, {"nproc_per_node": 0}, {"dist_url": "ftp://x"},
     {"dist_timeout": 0}],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedInput):
        DistributedSettings(**flags)


# ------------------------------------------------------------------------------------------------ starting others


def test_one_process_for_each_gpu_of_the_node() -> None:
    assert role(gpus=4, multiprocessing_distributed=True) == Starter(processes=4)
    assert role(multiprocessing_distributed=True) == Starter(processes=1)
    assert role(gpus=4, multiprocessing_distributed=True, nproc_per_node=2) == Starter(processes=2)


def test_with_several_nodes_world_size_and_rank_are_theirs() -> None:
    flags = {"multiprocessing_distributed": True, "nproc_per_node": 2}
    expected = Starter(processes=2, nodes=3, node_rank=1, rendezvous="10.0.0.1:29500")
    assert role(world_size=3, rank=1, dist_url="tcp://10.0.0.1:29500", **flags) == expected
    assert role({**RENDEZVOUS, "WORLD_SIZE": "3", "RANK": "1"}, **flags) == expected


def test_what_we_started_is_a_member_whatever_its_flags_say() -> None:
    environ = {**TORCHRUN, "TORCHELASTIC_RUN_ID": RUN_ID_PREFIX + "1"}
    found = member(environ, multiprocessing_distributed=True, world_size=2, rank=1, dist_url="tcp://10.0.0.1:1")
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.rendezvous, found.agent_hosts) == ("tcp://10.0.0.1:29500", True)
    alone = {**environ, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    assert member(alone, multiprocessing_distributed=True).world_size == 1


# ------------------------------------------------------------------------------------------------ Slurm


def test_srun() -> None:
    found = member(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.shares_node) == (5, 8, 1, True)
    assert found.rendezvous == "tcp://gpu03:19711"
    assert member({**SLURM, **RENDEZVOUS}).rendezvous == "tcp://10.0.0.1:29500"
    assert "SLURM_LOCALID is not set" in refusal({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],cpu1", "gpu03"), ("gpu1,gpu2", "gpu1"), ("login", "login"), ("a-b[7]", "a-b7")],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# ------------------------------------------------------------------------------------------------ devices


def taken(found: Role, device: str = "auto", **flags: Any) -> str:
    assert not isinstance(found, Starter)
    return str(take_device(found, DistributedSettings(**flags), device))


def test_each_process_takes_the_gpu_of_its_local_rank(gpus: list[torch.device]) -> None:
    assert taken(member(TORCHRUN)) == "cuda:1"
    assert gpus == [torch.device("cuda:1")]
    assert taken(member(TORCHRUN), "cuda") == "cuda:1"
    assert taken(member(TORCHRUN), "cpu") == "cpu"
    assert taken(member(TORCHRUN, gpu=1), gpu=1) == "cuda:1"
    assert taken(Alone(), gpu=1) == "cuda:1"


@pytest.mark.parametrize(
    ("environ", "device", "flags", "message"),
    [
        (TORCHRUN, "auto", {"gpu": 0}, "all processes of this node on one GPU"),
        (TORCHRUN, "cuda:0", {}, "all processes of this node on one device"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "auto", {}, "local rank 2 has no GPU of its own"),
        ({}, "cpu", {"gpu": 0}, "they are not the same"),
        ({}, "auto", {"gpu": 7}, "'cuda:7' was asked for"),
    ],
)
def test_no_two_processes_on_one_gpu(
    environ: dict[str, str], device: str, flags: dict[str, Any], message: str, gpus: list[torch.device]
) -> None:
    with pytest.raises(UnsupportedInput, match=message):
        taken(role(environ, **flags), device, **flags)
    assert gpus == []


def test_without_gpus_every_process_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert taken(member(TORCHRUN)) == "cpu"


def test_the_backend_is_chosen_by_the_device() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, None) == "gloo"
    with pytest.raises(UnsupportedInput, match="nccl"):
        choose_backend(cpu, "nccl")
    with pytest.raises(UnsupportedInput, match="smoke"):
        choose_backend(cpu, "smoke")
