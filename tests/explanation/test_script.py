"""`tightfit explain SCRIPT`: what an unchanged script holds, to the byte, and what is said where it never trains."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.explanation.pasting import pasted
from tests.support import warm_start
from tightfit.cli.main import main

SCRIPTS = Path(__file__).parent / "scripts"
#: Imports all itself, and limits apply to it; `_warm` replaces `sys.executable`.
REAL = sys.executable
#: As explain says, where there is a limit.
UNDER_A_LIMIT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}

LOOP = """
import sys
import torch
from torch import nn

assert sys.argv[1:] == ["--json", "-x"]
torch.manual_seed(0)
data = torch.randn(4, 64, 16)
net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
opt = torch.optim.Adam(net.parameters())
for i in range(4):
    x = data[i].clone()
    out = net(x)
    loss = out.square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print("loss", loss.item(), torch.rand(1).item())
open("finished", "w").close()
"""


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch, own_folder: None) -> None:
    """Children are forked from a process that has imported PyTorch, and their standard streams are files."""
    monkeypatch.setattr("tightfit.explanation.script.sys.executable", warm_start.python())


def explained(*words: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["explain", *words])
    shown = capfd.readouterr()
    return code, shown.out, shown.err


def metered(module: str, script: Path, *words: str, python: str | None = None) -> dict[str, Any]:
    command = [python or warm_start.python(), "-m", f"tests.explanation.{module}", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **UNDER_A_LIMIT})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_loop_is_explained_to_the_byte_and_stopped_after_its_second_step(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("loop.py").write_text(LOOP)
    code, out, err = explained("--json", "loop.py", "--json", "-x", capfd=capfd)
    assert code == 0
    found = json.loads(out)
    meter = metered("metered_script", Path("loop.py"), "--json", "-x")
    seen = found["seen"]
    assert seen["total_bytes"] == meter["peak_bytes"]
    assert sum(sum(part.values()) for part in seen["modules"].values()) == seen["total_bytes"]
    assert seen["components"]["other"] == 4 * 64 * 16 * 4  # the data
    assert found["model"] == "Sequential"
    assert "opt.step()" in found["ways"][0]["code"]  # by its own name; so small a model has nothing to recompute
    # What it printed is what it prints without: the same losses and random numbers, until it was ended.
    plain = subprocess.run(
        [warm_start.python(), "loop.py", "--json", "-x"], capture_output=True, text=True, timeout=600
    )
    losses = re.findall("^loss .*$", plain.stdout, re.MULTILINE)
    assert re.findall("^loss .*$", err, re.MULTILINE) == losses[:1]
    assert len(losses) == 4
    Path("finished").unlink()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["loop.py"]


@pytest.mark.parametrize(
    ("script", "exit_code", "told"),
    [
        ("import torch\nraise KeyError('no data')\n", 1, "KeyError: 'no data'"),
        ("print('ready')\n", 2, "ended without a training step"),
        ("import sys\nsys.exit(0)\n", 2, "ended without a training step"),
        ("import sys\nsys.exit(3)\n", 3, "it exited with code 3"),
        ("import sys\nsys.exit('no GPU here')\n", 1, "it exited with 'no GPU here'"),
        ("name = input()\n", 1, "EOFError"),
        ("\x7fELF\x00\x00", 2, "is not a Python script"),
        ("def broken(:\n", 2, "is not a Python script"),
        ("import os\nos._exit(7)\n", 7, "ended with code 7 past tightfit"),
        ("import os\nos.kill(os.getpid(), 9)\n", 137, "killed by the system"),
        (
            "import torch\nmodel = torch.nn.Linear(2, 2)\nmodel(torch.ones(1, 2))\n",
            2,
            "ended without a training step",
        ),
        ("import torch\ntorch.empty(2**50)\n", 1, "ran out of memory before its first training step"),
    ],
)  # fmt: skip
def test_a_script_that_does_not_train_is_told_so(
    script: str, exit_code: int, told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("script.py").write_text(script)
    code, out, err = explained("script.py", capfd=capfd)
    assert code == exit_code
    assert out == ""
    assert told in err
    own = [line for line in err.splitlines() if "tightfit/explanation" in line]
    assert own == []  # no frame of ours


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.py"], "does not exist"),
        (["."], "is a folder"),
        ([], "no script is given"),
        (["--memory", "lots", "x.py"], "is not a memory size"),
        (["--jsn", "x.py"], "no flag --jsn"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(
    words: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("x.py").write_text("")
    code, _, err = explained(*words, capfd=capfd)
    assert code == 2
    assert told in err


# ------------------------------------------------------------------------------------------- six kinds of scripts

#: What the exhaustive ones have, others have, too; two of them also run out of memory below.
CASES = [
    pytest.param("cnn_autocast", marks=pytest.mark.exhaustive),
    pytest.param("nanogpt", marks=pytest.mark.exhaustive),
    "gan",
    pytest.param("lstm", marks=pytest.mark.exhaustive),
    pytest.param("hf_finetune", marks=pytest.mark.exhaustive),
    pytest.param("lightning_module", marks=pytest.mark.exhaustive),
    pytest.param("language_model", marks=pytest.mark.exhaustive),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_script_as_people_write_it(name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The total is the meter's, all bytes have an owner, and the first thing that would help does what was promised."""
    pytest.importorskip({"hf_finetune": "accelerate", "lightning_module": "lightning"}.get(name, "torch"))
    script = SCRIPTS / f"{name}.py"
    words = [str(tmp_path / "output")] if name in ("hf_finetune", "lightning_module") else []
    code, out, _ = explained("--json", str(script), *words, capfd=capfd)
    assert code == 0
    found = json.loads(out)
    seen, way = found["seen"], found["ways"][0]
    meter = metered("metered_script", script, *words)
    assert seen["total_bytes"] == pytest.approx(meter["peak_bytes"], rel=0.01)
    assert sum(sum(part.values()) for part in seen["modules"].values()) == seen["total_bytes"]
    assert sum(seen["components"].values()) == seen["total_bytes"]
    source = pasted(script.read_text(), way["code"])
    if name == "gan":
        assert "# fake: read after the loss, too" in way["code"]
    Path("pasted.py").write_text(source)
    trained = metered("metered_plan", Path("pasted.py"), *words)
    assert trained["proof"]["ok"] is not False
    batch_bytes = seen["components"]["batch"]
    # The trainers' callbacks leave room for the batch that a loader has fetched ahead.
    ahead = batch_bytes if "TightfitCallback" in way["code"] else 0
    assert trained["proof"]["peak_bytes"] == pytest.approx(way["peak_bytes"] - ahead, rel=0.02)
    if name != "gan":  # of whose step one pass of three is planned
        # A loop's variables hold other batches beside the step's: the one before, and what it was made of.
        beside = seen["components"]["other"] + 4 * batch_bytes
        assert trained["step_peak_bytes"] <= 1.02 * (way["budget_bytes"] + beside)


@pytest.fixture(scope="module")
def imported_bytes() -> int:
    """The address space of a process that has imported what explains a script."""
    code = "import tightfit.explanation.session; print(open('/proc/self/statm').read().split()[0])"
    environment = {**os.environ, **UNDER_A_LIMIT}
    shown = subprocess.run([REAL, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    return int(shown.stdout) * resource.getpagesize()


def limited_python(limit_bytes: int, folder: Path) -> str:
    """Return a Python whose address space is limited, which imports all itself."""
    executable = folder / "limited"
    executable.write_text(f'#!/bin/sh\nulimit -v {limit_bytes // 1024}\nexec "{REAL}" "$@"\n')
    executable.chmod(0o755)
    return str(executable)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "room_mib", "left_bytes"),
    # The logits, which such loops hold while they compute the next ones: no part of a step by itself.
    [
        pytest.param("accumulated_gpt", [], 360, 16 * 128 * 1024 * 4, marks=pytest.mark.exhaustive),
        pytest.param("nanogpt", ["288", "2"], 340, 288 * 64 * 256 * 4, marks=pytest.mark.exhaustive),
    ],
)
def test_a_script_that_runs_out_of_memory(
    name: str, words: list[str], room_mib: int, left_bytes: int, imported_bytes: int,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """What was held is told, the whole step is planned, and what would help trains inside the same limit."""
    script = SCRIPTS / f"{name}.py"
    limited = limited_python(imported_bytes + room_mib * 2**20, tmp_path)
    monkeypatch.setattr("tightfit.explanation.script.sys.executable", limited)
    code, out, err = explained("--json", str(script), *words, capfd=capfd)
    assert code == 1, err  # the script's own
    found = json.loads(out)
    seen, step, way = found["seen"], found["step"], found["ways"][0]
    assert "more were asked for" in seen["ran_out"]
    assert any("MALLOC_MMAP_THRESHOLD_=131072" in note for note in found["notes"])
    assert sum(sum(part.values()) for part in seen["modules"].values()) == seen["total_bytes"]
    assert 0.1 * room_mib * 2**20 < seen["total_bytes"] < room_mib * 2**20  # imports and kernels take some
    meter = metered("metered_script", script, *words)
    beside = seen["components"]["other"]
    assert step["total_bytes"] + left_bytes + beside == pytest.approx(meter["peak_bytes"], rel=0.01)
    assert sum(sum(part.values()) for part in step["modules"].values()) == step["total_bytes"]
    assert way["peak_bytes"] <= found["target_bytes"] < seen["total_bytes"] < step["total_bytes"]
    Path("pasted.py").write_text(pasted(script.read_text(), way["code"]))
    trained = metered("metered_plan", Path("pasted.py"), *words, python=limited)
    assert 0.98 * way["peak_bytes"] <= trained["proof"]["peak_bytes"] <= way["budget_bytes"]
    assert trained["step_peak_bytes"] < step["total_bytes"]  # and it has run inside the limit
