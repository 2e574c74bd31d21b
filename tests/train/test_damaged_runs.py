"""Damage in a run's folder is named, costs no more than what was damaged, and nothing of it is deleted."""

from __future__ import annotations

import json
import shutil
from functools import reduce
from pathlib import Path

import pytest

from tests.train.runs import metrics
from tightfit.cli.main import main
from tightfit.train.checkpoint import FORMAT_VERSION
from tightfit.train.manifest import write_manifest

WORDS = ["train", "--model", "lstm-tiny", "--batch-size", "8", "--log-every", "1", "--mark", "m", "--resume", "auto"]
RUN = Path("runs/co2/m")

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint after each, made once."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--steps", "4", "--save-every", "1"]) == 0
    return folder / RUN


@pytest.fixture
def four_steps(trained: Path, own_folder: None) -> None:
    """That run, to be damaged."""
    shutil.copytree(trained, RUN, symlinks=True)


@pytest.mark.usefixtures("four_steps")
def test_a_damaged_checkpoint_is_named_and_set_aside(capsys: pytest.CaptureFixture[str]) -> None:
    whole = [line["loss"] for line in metrics("co2/m")]
    damaged = RUN / "checkpoints/step-00000004/training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main([*WORDS, "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint step-00000004 is damaged: it is set aside as step-00000004.damaged, and not used" in said
    assert "resumed from step-00000003" in said
    assert (RUN / "checkpoints/step-00000004.damaged/training.safetensors").exists()
    assert [line["loss"] for line in metrics("co2/m")] == whole


@pytest.mark.usefixtures("four_steps")
@pytest.mark.parametrize("damage", [b"\x00" * 40, b"{}", b"[1, 2]", b'{"step": "x"}', b"[" * 50_000, b"\xff\xfe"])
def test_a_damaged_row_of_metrics_is_left_out(damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """NUL bytes are what a power loss leaves."""
    file = RUN / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert main([*WORDS, "--steps", "5"]) == 0
    assert "1 lines of metrics.jsonl are damaged and left out" in capsys.readouterr().out
    assert [line["step"] for line in metrics("co2/m")] == [1, 3, 4, 5]
    assert damage in (RUN / "metrics.jsonl.damaged").read_bytes()
    assert main(["report", str(RUN)]) == 0


@pytest.mark.usefixtures("four_steps")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("training", "dict", "random", 0, "dict", "python"), [3, [1, 2], None]),
        (("training", "dict", "random", 0, "dict", "numpy", "dict", "pos"), "x"),
        (("training", "dict", "random", 0, "dict", "torch"), None),
        (("training", "dict", "random"), 3),
        (("training", "dict", "optimizer", "dict", "param_groups", 0, "dict", "betas"), {"tuple": ["a", None]}),
        (("training", "dict", "optimizer", "dict", "state"), {"dict": {"x": {"dict": {}}}}),
        (("training", "dict", "extra"), []),
        (("progress", "evaluations_since_best"), "many"),
        (("progress", "loss_before"), None),
        (("progress",), {}),
        (("identity",), []),
    ],
    ids=str,
)
def test_a_state_that_somebody_made_up_is_refused(
    path: tuple[str | int, ...], value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """With digests that are right. It ended in tracebacks, some of them after the run had begun."""
    folder = RUN / "checkpoints/step-00000004"
    state = json.loads((folder / "state.json").read_text())
    *above, last = path
    reduce(lambda holder, key: holder[key], above, state)[last] = value
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder, FORMAT_VERSION)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert main([*WORDS, "--steps", "5", "--resume", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "step-00000004" in said
    assert "Traceback" not in said
    assert before == {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("four_steps")
def test_a_copy_of_a_run_without_links_goes_on_and_gets_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    """`scp -r` makes folders of them. A lost model of a run that had ended was not written then, and no checkpoint."""
    for name in ("latest", "best"):
        link = RUN / "checkpoints" / name
        if link.is_symlink():
            target = link.resolve()
            link.unlink()
            shutil.copytree(target, link)
    model = (RUN / "model.safetensors").read_bytes()
    (RUN / "model.safetensors").unlink()
    assert main([*WORDS, "--steps", "4"]) == 0
    assert (RUN / "model.safetensors").read_bytes() == model
    assert main([*WORDS, "--steps", "5", "--save-every", "1"]) == 0
    assert (RUN / "checkpoints/latest").readlink() == Path("step-00000005")


@pytest.mark.usefixtures("four_steps")
def test_damage_is_named_also_where_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    (RUN / "checkpoints/step-00000004/state.json").write_text("{}")
    assert main([*WORDS, "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "the checkpoint step-00000004 is damaged: it is set aside" in said
    assert "nothing to do" in said
