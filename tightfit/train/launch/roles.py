"""The role of this process, from its flags and its environment: alone, a member of a group, or a starter of others.

The flags mean what they mean in PyTorch's ImageNet example; the environment is that of torchrun (and of all that sets
the same variables), of ``torch.distributed``'s elastic agents, and of Slurm's srun.  Nothing here touches a device or
a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.errors import UnsupportedInput
from tightfit.train.launch.settings import DistributedSettings

#: Of the elastic run ids of processes that we start ourselves.
RUN_ID_PREFIX = "tightfit-"

_LAUNCHED = ("WORLD_SIZE", "RANK")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_EXAMPLES = (
    "Start it with a launcher, which sets them all: torchrun --nproc-per-node 2 -m tightfit train ...; "
    "or let tightfit start the processes: tightfit train --multiprocessing-distributed --nproc-per-node 2 ..."
)


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The only process of its run."""

    notice: str = ""
    """A note to print, if the user may have meant otherwise."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of several processes, all of which run already."""

    rank: int
    world_size: int
    local_rank: int
    """Rank on its node, and the number of its GPU."""
    shares_node: bool
    """Other processes of this node have other local ranks."""
    rendezvous: str
    """``tcp://HOST:PORT`` or ``file:///PATH``."""
    agent_hosts: bool = False
    """The launcher's agent holds the store of the rendezvous, not rank 0."""
    attempt: int = 0
    """How often the launcher has started the group again."""


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts the processes of this node, and waits for them."""

    processes: int
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None
    """``HOST:PORT``; None: there is one node, and any free port will do."""


Role = Alone | Member | Starter


def find_role(settings: DistributedSettings, environ: Mapping[str, str], device_count: int) -> Role:
    """Find the role of this process.

    Args:
        settings: the flags.
        environ: variables of the environment.
        device_count: GPUs of this node.

    Raises:
        UnsupportedInput: flags and environment contradict each other, or something is missing; it is named.
    """
    _check_local_rank(settings, environ)
    if environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX):
        return _launched(settings, environ)
    if settings.multiprocessing_distributed:
        return _starter(settings, environ, device_count)
    if settings.nproc_per_node is not None:
        raise UnsupportedInput(
            f"--nproc-per-node {settings.nproc_per_node} says how many processes to start, but nothing asks to start "
            f"any. Add --multiprocessing-distributed, or leave it out."
        )
    if settings.world_size == -1 and settings.rank == -1:
        if any(name in environ for name in (*_LAUNCHED, "LOCAL_RANK")):
            return _launched(settings, environ)
        if int(_number(environ, "SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            return _of_slurm(settings, environ)
        return Alone(notice=_alone_notice(settings))
    return _by_flags(settings, environ, device_count)


def _alone_notice(settings: DistributedSettings) -> str:
    if settings.dist_train or settings.local_rank is not None:
        return f"one process only, as no launcher has set {' and '.join(_LAUNCHED)}. {_EXAMPLES}"
    return ""


def _check_local_rank(settings: DistributedSettings, environ: Mapping[str, str]) -> None:
    known = _number(environ, "LOCAL_RANK")
    if settings.local_rank is not None and known is not None and settings.local_rank != known:
        raise UnsupportedInput(
            f"--local-rank is {settings.local_rank}, but LOCAL_RANK is {known}, so it is unclear which device this "
            f"process should take. Leave --local-rank out: current launchers set the variable."
        )


def _starter(settings: DistributedSettings, environ: Mapping[str, str], device_count: int) -> Starter:
    if "TORCHELASTIC_RUN_ID" in environ:
        raise UnsupportedInput(
            "--multiprocessing-distributed starts processes, but this process was itself started by torchrun, so there "
            "would be too many of them. Leave one of the two out."
        )
    if settings.strategy == "none":
        raise UnsupportedInput(
            "--multiprocessing-distributed starts several processes, but --strategy none asks for one. "
            "Leave one of the two out."
        )
    nodes = settings.world_size if settings.world_size != -1 else _number(environ, "WORLD_SIZE") or 1
    processes = settings.nproc_per_node or max(1, device_count)
    if nodes == 1:
        return Starter(processes=processes)
    rank = settings.rank if settings.rank != -1 else _number(environ, "RANK")
    if rank is None:
        raise UnsupportedInput(
            f"the run has {nodes} nodes, but it is not known which of them this is. "
            f"Give each its own --rank, from 0 to {nodes - 1}, or set RANK."
        )
    _check_range(rank, nodes, "node")
    if settings.dist_url.startswith("file://"):
        raise UnsupportedInput(
            f"--dist-url {settings.dist_url} is a file, but the rendezvous of several nodes is an address. "
            f"Write --dist-url tcp://HOST:PORT, where HOST is node 0."
        )
    return Starter(
        processes=processes,
        nodes=nodes,
        node_rank=rank,
        rendezvous=_rendezvous(settings, environ).removeprefix("tcp://"),
    )


def _launched(settings: DistributedSettings, environ: Mapping[str, str]) -> Role:
    """Find the role in a process started by torchrun, or by what sets the same variables."""
    needed = (*_LAUNCHED, *(_RENDEZVOUS if settings.dist_url.startswith("env://") else ()))
    _require(environ, needed)
    world_size, rank = _needed_number(environ, "WORLD_SIZE"), _needed_number(environ, "RANK")
    _check_range(rank, world_size, "process")
    ours = environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX)
    if world_size == 1 and not ours:
        return Alone(notice=_alone_notice(settings))
    if settings.strategy == "none":
        raise UnsupportedInput(
            f"--strategy none asks for one process, but the launcher has started {world_size}, which would all train "
            f"the same. Leave the launcher out, or write --strategy ddp."
        )
    local_rank = _number(environ, "LOCAL_RANK")
    if local_rank is None:
        local_rank = settings.local_rank if settings.local_rank is not None else 0 if world_size == 1 else None
    if local_rank is None:
        local_rank = _number(environ, "SLURM_LOCALID")
    if local_rank is None:
        raise UnsupportedInput(
            f"LOCAL_RANK is not set, though {_present(environ)} is, so it is not known which device this process "
            f"should take. {_EXAMPLES}"
        )
    return Member(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        shares_node=(_number(environ, "LOCAL_WORLD_SIZE") or world_size) > 1,
        # The rendezvous of our own processes is their agent's, whatever the flag says: it was about the nodes.
        rendezvous=_from_variables(environ) if ours else _rendezvous(settings, environ),
        agent_hosts=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and (ours or settings.dist_url.startswith("env://")),
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT") or 0,
    )


def _of_slurm(settings: DistributedSettings, environ: Mapping[str, str]) -> Member:
    """Find the role in a task of srun: one for each process."""
    _require(environ, ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    world_size, rank = _needed_number(environ, "SLURM_NTASKS"), _needed_number(environ, "SLURM_PROCID")
    rendezvous = settings.dist_url
    if rendezvous.startswith("env://"):
        host = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "localhost"))
        job = _number(environ, "SLURM_JOB_ID") or 0
        # A port that all tasks of the job know, and that another job of the same node does not have.
        port = environ.get("MASTER_PORT") or str(15000 + job % 20000)
        rendezvous = f"tcp://{host}:{port}"
    return Member(
        rank=rank,
        world_size=world_size,
        local_rank=_needed_number(environ, "SLURM_LOCALID"),
        shares_node=(_number(environ, "SLURM_NTASKS_PER_NODE") or world_size) > 1,
        rendezvous=rendezvous,
    )


def _by_flags(settings: DistributedSettings, environ: Mapping[str, str], device_count: int) -> Role:
    """Find the role in a process started by hand, by one command for each."""
    world_size = settings.world_size if settings.world_size != -1 else _number(environ, "WORLD_SIZE")
    rank = settings.rank if settings.rank != -1 else _number(environ, "RANK")
    for flag, value, variable in (("world-size", world_size, "WORLD_SIZE"), ("rank", rank, "RANK")):
        known = _number(environ, variable)
        if known is not None and value is not None and known != value:
            raise UnsupportedInput(
                f"--{flag} is {value}, but {variable} is {known}, so the processes would not agree. "
                f"Leave --{flag} out where a launcher has set the variable."
            )
    if world_size is None:
        raise UnsupportedInput(
            f"--rank {settings.rank} is the rank of one of several processes, but it is not known how many there are. "
            f"Add --world-size, or set WORLD_SIZE. {_EXAMPLES}"
        )
    if world_size == 1:
        _check_range(rank or 0, 1, "process")
        return Alone(notice=_alone_notice(settings))
    if settings.strategy == "none":
        raise UnsupportedInput(
            f"--world-size is {world_size}, but --strategy none asks for one process. Leave one of the two out."
        )
    if rank is None:
        raise UnsupportedInput(
            f"--world-size is {world_size}, but it is not known which of these processes this is. "
            f"Give each its own --rank, from 0 to {world_size - 1}, or set RANK. {_EXAMPLES}"
        )
    _check_range(rank, world_size, "process")
    local_rank = settings.local_rank if settings.local_rank is not None else _number(environ, "LOCAL_RANK")
    if local_rank is None:
        local_rank = settings.gpu if settings.gpu is not None else rank % max(1, device_count)
    return Member(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        shares_node=settings.gpu is None,
        rendezvous=_rendezvous(settings, environ),
    )


def _rendezvous(settings: DistributedSettings, environ: Mapping[str, str]) -> str:
    url = settings.dist_url
    if url.startswith("env://"):
        _require(environ, _RENDEZVOUS)
        return _from_variables(environ)
    if url.startswith("tcp://") and not re.fullmatch(r"tcp://[^/:]+:\d+/?", url):
        raise UnsupportedInput(
            f"--dist-url {url} does not name a host and a port, so it is not a rendezvous. "
            f"Write it like tcp://10.0.0.1:29500."
        )
    return url.rstrip("/") if url.startswith("tcp://") else url


def _from_variables(environ: Mapping[str, str]) -> str:
    return f"tcp://{environ['MASTER_ADDR']}:{_needed_number(environ, 'MASTER_PORT')}"


def _require(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        raise UnsupportedInput(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
            f"{f', though {_present(environ)} is' if _present(environ) else ''}, so the processes cannot find each "
            f"other. {_EXAMPLES}"
        )


def _present(environ: Mapping[str, str]) -> str:
    names = (*_LAUNCHED, "LOCAL_RANK", *_RENDEZVOUS, "SLURM_PROCID")
    return ", ".join(name for name in names if name in environ)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text.split("(")[0])  # Slurm writes 4(x2) for four tasks on each of two nodes
    except ValueError:
        raise UnsupportedInput(
            f"{name} is {text!r}, which is not a whole number, so the processes cannot be counted. Correct or unset it."
        ) from None


def _needed_number(environ: Mapping[str, str], name: str) -> int:
    found = _number(environ, name)
    if found is None:
        raise UnsupportedInput(f"{name} is empty, so the processes cannot be counted. Set it to a number.")
    return found


def _check_range(rank: int, count: int, what: str) -> None:
    if not 0 <= rank < count:
        raise UnsupportedInput(
            f"the rank is {rank}, but with {count} {what}{'es' if what == 'process' else 's'} ranks go from 0 to "
            f"{count - 1}. Correct --rank or RANK, or the number of them."
        )


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: ``gpu[03-05,9],cpu1`` begins with ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return nodes if match is None else match.group(1) + (match.group(2) or "")
