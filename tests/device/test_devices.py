"""What a device answers, and how one is found.  CUDA is played by stand-ins; `tests/gpu` has the real one."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.device.cpu import CpuDevice
from tightfit.device.cuda import CudaDevice
from tightfit.device.memory import measure_peak
from tightfit.device.other import OtherDevice
from tightfit.device.placement import StreamWatch, device_of_call, generators_of
from tightfit.device.process_state import (
    deterministic_libraries,
    device_random_states,
    is_capturing,
    may_fork,
    set_device_random_states,
)
from tightfit.device.registry import accelerator_kind, device_named, devices, preferred_kind
from tightfit.errors import UnsupportedInput
from tightfit.operators.replayable import call_generator
from tightfit.profiling.cost_cache import CostCache

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two GPUs of 100 bytes, of which this process's allocator has 60 reserved; what was asked of them."""
    state: dict[str, Any] = {"calls": [], "stream": 7, "capturing": False, "generators": [[1], [2]], "current": 0}

    def note(name: str, result: Any = None) -> Any:
        def call(*args: Any) -> Any:
            state["calls"].append(name)
            return result

        return call

    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: state["capturing"],
        "get_device_name": lambda device: f"GPU {device.index}",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=100, major=9, minor=0, uuid="u"),
        "mem_get_info": lambda device: (30, 100),
        "memory_reserved": lambda device: 60,
        "max_memory_reserved": lambda device: 80,
        "memory_allocated": lambda device: 40,
        "max_memory_allocated": lambda device: 55,
        "synchronize": note("synchronize"),
        "empty_cache": note("empty_cache"),
        "reset_peak_memory_stats": note("reset"),
        "current_device": lambda: state["current"],
        "set_device": lambda device: state["calls"].append(device),
        "default_generators": (torch.Generator(), torch.Generator()),
        "get_rng_state_all": lambda: list(state["generators"]),
        "set_rng_state": lambda value, index: state["generators"].__setitem__(index, value),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("tightfit.device.cuda.process_bytes", lambda uuid: {os.getpid(): 65})
    monkeypatch.setattr("tightfit.device.cuda.current_cuda_stream", lambda index: state["stream"])
    return state


def test_a_device_is_found_by_all_that_is_on_it() -> None:
    found = device_for(CPU)
    assert isinstance(found, CpuDevice)
    assert device_for(torch.zeros(1)) is found
    assert device_for(nn.Linear(1, 1)) is found
    assert device_for(found) is found
    assert isinstance(device_for("cuda:1"), CudaDevice)
    assert device_for("cuda:1").torch_device == torch.device("cuda", 1)


def test_a_kind_that_nobody_registered_is_not_trusted() -> None:
    found = device_for(META)
    assert isinstance(found, OtherDevice)
    assert (found.kind, found.is_host, found.adds_atomically, found.generator()) == ("meta", False, True, None)
    assert found.random_state_bytes() == 0
    assert found.holds(torch.empty(1, device="meta"))
    assert not found.holds(torch.empty(1))
    assert device_named("meta") is None
    assert device_named("gpu") is None
    with pytest.raises(RuntimeError):
        device_for("gpu")


def test_the_processor() -> None:
    device = device_for(CPU)
    assert 0 < device.free_bytes() <= device.capacity_bytes()
    assert device.reserved_bytes() == 0
    assert device.round_up(513) == 513
    assert device.time_ms(lambda: sum(range(100_000))) > 0
    done: list[str] = []
    times = device.operation_timer().times_ms(lambda: done.append("run"), 3, before=lambda: done.append("before"))
    assert done == ["before", "run"] * 3
    assert times.host_ms > 0
    assert times.device_ms == 0
    assert device.generator() is torch.default_generator
    assert device.random_state_bytes() == torch.get_rng_state().numel()
    assert device.name() in device.cost_key()["device"]
    assert device.ambient_autocast() is None
    with device.autocast(torch.bfloat16):
        assert device.ambient_autocast() is torch.bfloat16
        with device.autocast(None):
            assert device.ambient_autocast() is None


def test_a_workspace_is_what_an_operation_holds_beyond_its_result() -> None:
    with device_for(CPU).workspace_meter() as meter:
        with meter.watch(3):
            inner = torch.empty(300)
            result = torch.empty(100)
            del inner
        with meter.watch(5):
            other = torch.empty(50)
    assert meter.workspace_bytes() == {3: 1200, 5: 0}
    assert result.numel() + other.numel() == 150


def test_without_gpus_only_the_processor_is_offered() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    assert preferred_kind() is CpuDevice
    assert devices() == [device_for(CPU)]
    assert accelerator_kind() is CudaDevice
    assert accelerator_kind().count() == 0
    assert device_random_states() == {}
    assert not is_capturing()
    assert may_fork()


@pytest.mark.usefixtures("cuda")
def test_gpus_are_listed_and_preferred() -> None:
    assert preferred_kind() is CudaDevice
    assert [str(device.torch_device) for device in devices()] == ["cpu", "cuda:0", "cuda:1"]
    assert accelerator_kind("cpu") is CudaDevice
    assert not may_fork()


def test_cuda_memory_is_what_the_allocator_reserved_and_the_driver_counts(cuda: dict[str, Any]) -> None:
    device = device_for("cuda:1")
    assert (device.capacity_bytes(), device.free_bytes(), device.reserved_bytes()) == (100, 30, 60)
    assert device.held_bytes() == 60 + 5
    assert Budget.of("auto", device.torch_device).total_bytes == 95  # this process may have what the meter counts of it
    assert Budget.of("50%", device.torch_device).total_bytes == 50
    assert measure_peak(lambda: "result", 0, "cuda:1") == ("result", 80 + 5)
    assert cuda["calls"] == ["synchronize", "empty_cache", "reset", "synchronize"]
    cuda["calls"].clear()
    assert measure_peak(lambda: "result", 0, "cuda:1", from_empty=False) == ("result", 80 + 5)
    assert cuda["calls"] == ["synchronize", "reset", "synchronize"]  # the next step need not ask the driver again
    device.give_back()
    assert cuda["calls"].pop() == "empty_cache"
    assert [device.round_up(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with device.workspace_meter() as meter, meter.watch(4):
        pass
    assert meter.workspace_bytes() == {4: 15}


def test_cuda_is_waited_for_and_made_current(cuda: dict[str, Any]) -> None:
    assert device_for("cuda:1").time_ms(lambda: cuda["calls"].append("work")) > 0
    assert cuda["calls"] == ["synchronize", "work", "synchronize"]
    device_for("cuda:1").make_current()
    assert cuda["calls"].pop() == torch.device("cuda", 1)
    device_for("cuda").make_current()  # PyTorch takes no device without a number
    assert cuda["calls"].pop() == "synchronize"


def test_random_states_of_all_devices_are_put_back(cuda: dict[str, Any]) -> None:
    states = device_random_states()
    assert states == {"cuda": [[1], [2]]}
    cuda["generators"][:] = [[3], [4]]
    set_device_random_states({**states, "a kind of another version": []})
    assert cuda["generators"] == [[1], [2]]
    set_device_random_states({"cuda": [[5], [6], [7]]})  # a checkpoint from a machine with three
    assert cuda["generators"] == [[5], [6]]


def test_a_capture_is_noticed(cuda: dict[str, Any]) -> None:
    assert not is_capturing()
    cuda["capturing"] = True
    assert is_capturing()


def test_a_second_stream_is_noticed(cuda: dict[str, Any]) -> None:
    class OnGpu:
        is_cpu = False

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    first: Any = OnGpu(0)
    second: Any = OnGpu(1)
    watch = StreamWatch()
    assert watch.is_same(torch.zeros(1))
    assert watch.is_same(first)
    cuda["stream"] = 8
    assert watch.is_same(torch.zeros(1))
    assert not watch.is_same(first)
    assert watch.is_same(second)  # the first that was seen there
    cuda["stream"] = 7
    assert watch.is_same(first)
    assert not watch.is_same(second)


def test_where_a_call_runs(cuda: dict[str, Any]) -> None:
    scalar, on_meta = torch.zeros(()), torch.empty(1, device="meta")
    assert device_of_call([], {}) is device_for(CPU)
    assert device_of_call([scalar], {"device": "meta"}) is device_for(CPU)
    assert device_of_call([], {"device": "meta"}) is device_for(META)
    assert device_of_call([scalar, on_meta], {}) is device_for(META)
    assert generators_of([scalar, on_meta, on_meta]) == [torch.default_generator]
    assert device_for("cuda:1").generator() is torch.cuda.default_generators[1]
    assert device_for("cuda").generator() is torch.cuda.default_generators[0]


def test_without_a_number_a_gpu_is_the_current_one(cuda: dict[str, Any]) -> None:
    call = {"device": torch.device("cuda")}
    for current in (0, 1):
        cuda["current"] = current
        device = device_of_call([], call)
        assert call_generator((), call, device) is torch.cuda.default_generators[current]
        assert device.numbered() == torch.device("cuda", current)
        assert device_for("cuda:1").numbered() == torch.device("cuda", 1)
    assert device_for(CPU).numbered() == CPU


OWN = os.getpid()


@pytest.mark.parametrize(
    ("told", "outside"),
    [
        ({OWN: 65}, 5),
        ({-1: 90, OWN: 65}, 5),
        ({-1: 65}, 5),  # a container's: the number is the host's
        ({-1: 65, -2: 59}, 5),  # the other holds less than this process's allocator has reserved
        ({-1: 65, -2: 90}, 8),  # it could be either
        ({OWN: 20, -1: 65}, 5),  # a stranger that happens to have the number
        ({}, 8),  # WSL, for example
        ({OWN: 99}, 10),  # all users together hold 70
    ],
)
@pytest.mark.usefixtures("cuda")
def test_what_a_process_holds_outside_pytorch_is_told_by_the_driver_or_what_a_context_may_take(
    told: dict[int, int], outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tightfit.device.cuda.process_bytes", lambda uuid: told)
    monkeypatch.setattr("tightfit.device.cuda._CONTEXT_BYTES", 8)
    assert device_for("cuda:0").held_bytes() == 60 + outside


@pytest.mark.usefixtures("cuda")
def test_a_budget_beside_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[CudaDevice] = []
    monkeypatch.setattr(CudaDevice, "_start_cublas", lambda device: started.append(device))
    gpu = torch.device("cuda:0")
    budget = Budget.of("70 B + Context", gpu)
    assert (budget.total_bytes, budget.origin) == (75, "70 B + Context")
    assert started == [device_for(gpu)]  # or the context grows when the first step begins
    assert Budget.of("1KiB+context", CPU).total_bytes == 1024
    assert [Budget.of(text, gpu).origin for text in ("70B", "auto", "50%")] == ["", "all that is free", "50%"]
    for text in ("50%+context", "auto+context", "+context", "99B+context"):
        with pytest.raises(UnsupportedInput):
            Budget.of(text, gpu)


def test_an_error_about_a_budget_names_the_context() -> None:
    parts = {"parameters": 180 << 20, "context": 520 << 20}
    error = tightfit.BudgetInfeasible(700 << 20, 270 << 20, "optimizer step", parts)
    assert "the device's context and libraries 520.0 MiB" in str(error)
    assert "SIZE+context asks for a size beside the 520.0 MiB" in str(error)
    assert "+context" not in str(tightfit.BudgetInfeasible(2, 1, "optimizer step", {"parameters": 2}))


def test_libraries_are_deterministic_inside_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic_libraries():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("cuda")
def test_each_device_has_costs_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [device.cost_key() for device in devices()]
    assert len({key["device"] for key in keys}) == 3
    assert "cudnn" in keys[1]["libraries"]
    assert "cudnn" not in keys[0]["libraries"]
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    fast = device_for("cuda:0").cost_key()
    assert "matmul tf32" in fast["precision"]
    assert "conv " in fast["precision"]
    assert fast != keys[1]
    assert device_for(CPU).cost_key() == keys[0]
    from tightfit.profiling.cost_cache import Cost

    for number, device in enumerate(devices()):
        cache = CostCache(device.torch_device, tmp_path)
        assert cache.get("call") is None
        cache.put("call", Cost(float(number), 0, ()))
        cache.save()


def test_what_a_processor_frees_goes_back_so_that_nothing_is_reserved_or_capped() -> None:
    cpu = device_for("cpu")
    assert cpu.allocator_state(0, {"aten.mm.default"}) is None
    assert not cpu.caches_memory
    with cpu.uncapped():
        pass
    model = torch.nn.Linear(4, 4)
    with pytest.raises(UnsupportedInput, match=r"memory_cap=True .* CPU has none.* Leave memory_cap out"):
        tightfit.fit(model, torch.zeros(2, 4), loss=lambda m, b: m(b).sum(), memory_cap=True)
    assert "forward" not in vars(model)
