"""The cost cache: right values back, nothing else believed, safe between processes, bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.device import stopwatch
from tightfit.profiling import cost_cache, costs
from tightfit.profiling.cost_cache import Cost, CostCache
from tightfit.profiling.signatures import SignatureTable

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TIGHTFIT_COST_CACHE")
    return tmp_path / "cache"


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def fill(folder: Path, count: int = 3) -> Path:
    known = CostCache(CPU)
    for number in range(count):
        known.put(f"call {number}", Cost(1.5 + number, 10 * number, ((4, 0), ()), number / 4))
    known.save()
    return only_file(folder)


def measure_small() -> tightfit.Profile:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Conv1d(8, 8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    return tightfit.measure(model, torch.randn(8, 8), loss=lambda m, b: m(b).sum(), optimizer=optimizer)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of operations that were run alone to be measured."""
    names: list[str] = []
    right = costs._run

    def run(call: Any, *rest: Any) -> Any:
        names.append(str(call.func))
        return right(call, *rest)

    monkeypatch.setattr(costs, "_run", run)
    return names


@pytest.mark.usefixtures("measured_costs")
def test_an_operation_is_run_alone_once_per_machine(
    folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "_MOST_RATIO", float("inf"))  # however busy this one is
    first = measure_small()
    assert len(set(ran)) > 5
    ran.clear()
    second = measure_small()
    assert ran == []
    assert second.signatures == first.signatures
    assert second.storages == first.storages
    assert set(first.measuring_ms) == {"observing", "workspace", "times", "mechanism", "tables"}
    only_file(folder)


def test_it_can_be_turned_off(folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), torch.randn(1, 4)
    tightfit.measure(model, batch, cost_cache=False)
    assert ran
    assert not folder.exists()
    monkeypatch.setenv("TIGHTFIT_COST_CACHE", "off")
    ran.clear()
    tightfit.measure(model, batch)
    assert ran
    assert not folder.exists()


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIGHTFIT_COST_CACHE")
    monkeypatch.delenv("TIGHTFIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_cache.cache_folder() == tmp_path / "tightfit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cost_cache.cache_folder() == tmp_path / ".cache" / "tightfit"


def test_what_is_put_comes_back(folder: Path) -> None:
    fill(folder)
    known = CostCache(CPU)
    assert known.get("call 2") == Cost(3.5, 20, ((4, 0), ()), 0.5)
    assert known.get("call 3") is None


@pytest.mark.parametrize("change", ["threads", "precision", "deterministic"])
def test_another_environment_has_costs_of_its_own(folder: Path, change: str) -> None:
    fill(folder)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        if change == "threads":
            torch.set_num_threads(threads + 1)
        elif change == "precision":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.use_deterministic_algorithms(True)
        assert CostCache(CPU).get("call 0") is None
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
    assert CostCache(CPU).get("call 0") is not None


PRECISION = """
import sys, torch
from tightfit.profiling.cost_cache import CostCache
torch.set_num_threads(int(sys.argv[1]))
host = torch.device("cpu")
known = CostCache(host).get("call 0") is not None
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
torch.backends.cuda.matmul.fp32_precision = "tf32"
print(known, CostCache(host).get("call 0") is None)
"""


def test_precision_chosen_by_the_newer_switches(folder: Path) -> None:
    """After any of them `torch.get_float32_matmul_precision` raises, for as long as the process lives."""
    fill(folder)
    command = [sys.executable, "-c", PRECISION, str(torch.get_num_threads())]
    assert subprocess.check_output(command, text=True).split() == ["True", "True"]


def test_calls_that_differ_in_anything_have_different_keys() -> None:
    table = SignatureTable()
    x = torch.randn(4, 4)
    add, alpha = torch.ops.aten.add.Tensor, {"alpha": 2}
    for args, kwargs in (
        ((x, x), {}),
        ((x, x), alpha),
        ((x, x.t()), {}),
        ((x, x[:2]), {}),
        ((x, x[2:]), {}),
        ((x, x.double()), {}),
        ((x, 1.0), {}),
        ((x, 1), {}),
    ):
        table.add(add, args, kwargs)
    with torch.no_grad():
        table.add(add, (x, x), {})
    table.add(torch.ops.aten.sub.Tensor, (x, x), {})
    assert len({cost_cache._key(call) for call in table.calls}) == 10


def damage(path: Path, how: str) -> None:
    text = path.read_text()
    head, body = text.splitlines()
    if how == "cut short":
        path.write_text(text[: len(text) // 2])
    elif how == "one digit changed":
        path.write_text(text.replace("[1.5,", "[1.4,"))
    elif how == "binary":
        path.write_bytes(bytes(range(256)))
    elif how == "empty":
        path.write_text("")
    elif how == "other version":
        path.write_text(text.replace("operation-costs/7", "operation-costs/0"))
    elif how == "other machine":
        path.write_text(text.replace('"threads": "', '"threads": "7'))
    elif how == "deeply nested":
        path.write_text("[" * 100_000 + "\n" + body)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        entries = {"negative time": [-1.0, 0, []], "text": ["1", 0, []], "nan": [float("nan"), 0, []]}
        entries |= {"negative size": [1.0, -1, []], "a short entry": [1.0], "no entry": None, "size": [1.0, 0, [0.5]]}
        costs_text = json.dumps({cost_cache._key("call 0"): entries[how]})
        wrong = json.loads(head) | {"checksum": cost_cache._checksum(costs_text)}
        path.write_text(f"{json.dumps(wrong)}\n{costs_text}\n")


DAMAGES = ["cut short", "one digit changed", "binary", "empty", "other version", "other machine", "deeply nested"]
DAMAGES += ["negative time", "text", "nan", "negative size", "a short entry", "no entry", "size"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_or_foreign_file_is_not_believed_and_is_written_anew(folder: Path, how: str) -> None:
    path = fill(folder)
    damage(path, how)
    known = CostCache(CPU)
    assert known.get("call 0") is None
    known.put("call 0", Cost(2.0, 0, ()))
    known.save()
    assert CostCache(CPU).get("call 0") == Cost(2.0, 0, ())


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    damage(fill(folder), "a folder")
    known = CostCache(CPU)
    known.put("call 0", Cost(2.0, 0, ()))
    known.save()
    assert CostCache(CPU).get("call 0") is None
    assert [p.name for p in folder.iterdir() if p.suffix == ".part"] == []


def test_two_measurements_leave_the_shorter_time_and_the_larger_scratch(folder: Path) -> None:
    first, second = CostCache(CPU), CostCache(CPU)
    first.put("call", Cost(2.0, 10, ((1,),), 4.0))
    first.save()
    second.put("call", Cost(3.0, 20, ((1,),), 0.5))
    second.put("other", Cost(1.0, 0, ()))
    second.save()
    assert CostCache(CPU).get("call") == Cost(2.0, 20, ((1,),), 0.5)
    assert CostCache(CPU).get("other") == Cost(1.0, 0, ())


@pytest.mark.usefixtures("measured_costs")
def test_what_others_disturbed_is_measured_again_the_next_time(
    folder: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sine = SignatureTable()
    sine.add(torch.ops.aten.sin.default, (torch.ones(4),), {})
    monkeypatch.setattr(stopwatch, "_ALWAYS_SECONDS", -1e3)  # nothing is that fast
    disturbed = costs.measure_costs(sine.calls, CPU, CostCache(CPU))
    assert disturbed.signatures[0].ms >= 0
    assert not folder.exists()
    monkeypatch.setattr(stopwatch, "_MOST_RATIO", float("inf"))
    runs = len(ran)
    costs.measure_costs(sine.calls, CPU, CostCache(CPU))
    assert len(ran) > runs
    runs = len(ran)
    costs.measure_costs(sine.calls, CPU, CostCache(CPU))
    assert len(ran) == runs


def test_it_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "_MOST_ENTRIES", 5)
    monkeypatch.setattr(cost_cache, "_MOST_FILES", 2)
    fill(folder, 8)
    assert CostCache(CPU).get("call 2") is None
    assert CostCache(CPU).get("call 3") is not None
    folder.joinpath("unrelated.json").write_text("{}")
    for number in range(3):
        old = folder / f"operation-costs-{number}.json"
        old.write_text("")
        os.utime(old, (number, number))
    fill_again = CostCache(CPU)
    fill_again.put("new", Cost(1.0, 0, ()))
    fill_again.save()
    assert len(list(folder.glob("operation-costs-*.json"))) == 2
    assert folder.joinpath("unrelated.json").exists()
    assert CostCache(CPU).get("new") is not None


WRITER = """
import sys, torch
from pathlib import Path
from tightfit.profiling.cost_cache import Cost, CostCache
for number in range(20):
    known = CostCache(torch.device("cpu"), Path(sys.argv[1]))
    known.put(f"writer {sys.argv[2]} call {number}", Cost(1.0, 0, ((number,),)))
    known.save()
"""


@pytest.mark.slow
def test_several_processes_never_leave_half_a_file(folder: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(number)]) for number in range(2)]
    while any(process.poll() is None for process in writers):
        if folder.exists() and list(folder.glob("operation-costs-*")):
            assert len(only_whole(folder)) >= 1
    assert [process.returncode for process in writers] == [0, 0]
    known = CostCache(CPU)
    assert sum(known.get(f"writer {w} call {n}") == Cost(1.0, 0, ((n,),)) for w in range(2) for n in range(20)) >= 20
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def only_whole(folder: Path) -> dict[str, Cost]:
    """What a reader sees at some moment while others write."""
    (path,) = folder.glob("operation-costs-*.json")
    head, text = path.read_text().splitlines()
    assert json.loads(head)["checksum"] == cost_cache._checksum(text)
    return {key: cost_cache._cost(entry) for key, entry in json.loads(text).items()}
