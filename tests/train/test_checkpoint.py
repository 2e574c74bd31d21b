from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import (
    FORMAT_VERSION,
    TENSORS,
    Retention,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_training_state,
    restore_replaced,
    save_checkpoint,
    set_aside,
)
from tightfit.train.manifest import write_manifest
from tightfit.train.random_state import random_state, restore_random_state
from tightfit.train.shard_files import Piece, in_order, save_file


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    scale = random.random() + np.random.rand()
    (model(torch.randn(5, 3)) * scale).sum().backward()
    optimizer.step()


def save(
    folder: Path, number: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_best: bool = False
) -> Path:
    return save_checkpoint(
        folder,
        step=number,
        identity={"model": "m"},
        progress={"loss_before": 1.5},
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        random_states=[random_state()],
        extra={"average": {"w": torch.ones(2)}},
        is_best=is_best,
    )


def test_best_stays_where_it_was_when_later_ones_are_no_better(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer, is_best=True)
    save(tmp_path, 2, model, optimizer)
    assert (tmp_path / "best").resolve().name == "step-00000001"
    assert (tmp_path / "latest").resolve().name == "step-00000002"


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make()
    step(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    step(model, optimizer)
    expected = [value.clone() for value in model.state_dict().values()]

    other, other_optimizer = make()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.identity) == (1, {"model": "m"})
    assert checkpoint.progress == {"loss_before": 1.5}
    extra, generators = load_checkpoint(checkpoint, model=other, optimizer=other_optimizer)
    assert generators is not None
    restore_random_state(generators)
    assert torch.equal(extra["average"]["w"], torch.ones(2))
    step(other, other_optimizer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(expected, other.state_dict().values(), strict=True))


def test_latest_moves_and_nothing_half_written_stays(tmp_path: Path) -> None:
    model, optimizer = make()
    (tmp_path / ".step-00000001.123.tmp").mkdir()  # what a killed process leaves
    save(tmp_path, 1, model, optimizer)
    save(tmp_path, 2, model, optimizer)
    assert (tmp_path / "latest").readlink() == Path("step-00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = make()
    first = save(tmp_path, 1, model, optimizer)
    before = (first / TENSORS).read_bytes()
    step(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    assert (first / TENSORS).read_bytes() != before
    assert read_checkpoint(tmp_path / "latest").step == 1


def test_a_flipped_byte_is_noticed_and_the_one_before_is_taken(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer)
    damaged = save(tmp_path, 2, model, optimizer) / TENSORS
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UnsupportedInput, match="not a complete checkpoint"):
        read_checkpoint(tmp_path / "step-00000002")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert newest.damaged == (tmp_path / "step-00000002",)


def test_a_lost_link_is_no_loss(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer)
    (tmp_path / "latest").unlink()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    model, optimizer = make()
    shutil.rmtree(save(tmp_path, 1, model, optimizer))
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(UnsupportedInput, match="not a complete checkpoint"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def test_another_model_cannot_go_on(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    other = nn.Linear(2, 2)
    with pytest.raises(UnsupportedInput, match="does not fit this model"):
        load_checkpoint(checkpoint, model=other, optimizer=torch.optim.AdamW(other.parameters()))


@pytest.mark.parametrize("version", [2, 3])
def test_a_checkpoint_of_recollect_is_recognised(version: int, tmp_path: Path) -> None:
    """Tightfit was called so before; its checkpoints had other keys."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": 1, "format_version": version}))
    with pytest.raises(UnsupportedInput) as caught:
        newest_checkpoint(tmp_path)
    assert f"written by recollect 0.1, as tightfit was called before, in checkpoint format {version}" in str(
        caught.value
    )
    assert "cannot resume from there. Begin another run with --mark NAME" in str(caught.value)
    assert "not a complete checkpoint" not in str(caught.value)


def test_a_checkpoint_of_the_format_before_is_recognised(tmp_path: Path) -> None:
    (folder := tmp_path / "step-00000001").mkdir()
    (folder / "state.json").write_text(json.dumps({"step": 1, "format_version": 4}))
    with pytest.raises(UnsupportedInput, match="its format is 4, this version reads 5"):
        newest_checkpoint(tmp_path)


def _small(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return save_checkpoint(
        folder,
        step=3,
        identity={"model": "m"},
        progress={"loss_before": 1.5},
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        random_states=[],
        extra={},
        is_best=False,
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_no_flipped_bit_and_no_cut_is_accepted(sharded: bool, tmp_path: Path) -> None:
    """Of `state.json`, 108 of 7,144 flipped bits changed numbers in silence: "step 12" became 13, or 52."""
    folder = (_sharded if sharded else _small)(tmp_path)
    tried = 0
    files = sorted(folder.iterdir())
    # Of the sharded one not every byte: `python -m tests.train.attacks.flips` has more.
    stride = 3 if sharded else 1
    for file in files:
        content = file.read_bytes()
        for place in range(0, len(content), stride):
            before, byte, after = content[:place], content[place], content[place + 1 :]
            flipped = (before + bytes([byte ^ 1 << bit % 8]) + after for bit in (place, place + 5))
            for damaged in (*flipped, before):
                file.write_bytes(damaged)
                with pytest.raises(UnsupportedInput):
                    read_checkpoint(folder)
                tried += 1
        file.write_bytes(content)
    assert tried > (1000 if sharded else 2000)
    assert read_checkpoint(folder).step == 3


def _sharded(folder: Path) -> Path:
    """A checkpoint as two processes write it, of a sharded model."""
    folder = _small(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}  # the file is written anew
    weight = tensors.pop("model.weight")
    shards = [[Piece("model.weight@0,0", weight[:, :1])], [Piece("model.weight@0,1", weight[:, 1:])]]
    shards[0] += [Piece(name, tensor) for name, tensor in tensors.items()]
    for name, pieces in zip((TENSORS, "training-00001.safetensors"), shards, strict=True):
        save_file(folder / name, in_order(pieces))
    state = json.loads((folder / "state.json").read_text())
    state["training"]["dict"]["model"]["dict"]["weight"]["shape"] = [1, 2]
    (folder / "state.json").write_text(json.dumps(state))
    _manifest_anew(folder)
    return folder


def _manifest_anew(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder, FORMAT_VERSION)


def test_shards_of_several_processes_are_one_checkpoint(tmp_path: Path) -> None:
    whole, sharded = _small(tmp_path / "a"), _sharded(tmp_path / "b")
    assert torch.equal(read_training_state(whole)["model"]["weight"], read_training_state(sharded)["model"]["weight"])
    model = nn.Linear(2, 1)
    load_checkpoint(read_checkpoint(sharded), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, read_training_state(whole)["model"]["weight"])
    (sharded / "training-00001.safetensors").unlink()
    with pytest.raises(UnsupportedInput, match="not a complete checkpoint"):
        read_checkpoint(sharded)
    _manifest_anew(sharded)  # as if it had been written so
    with pytest.raises(UnsupportedInput, match=r"a shard of model\.weight is missing"):
        load_checkpoint(read_checkpoint(sharded), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "name", ["training.safetensors", "training-00001.safetensors", "state.json", "manifest.json", "more.safetensors"]
)
def test_a_pickle_in_any_file_is_never_executed(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (trace,))

    folder = _sharded(tmp_path / "checkpoints")
    (folder / name).write_bytes(pickle.dumps(Harmful()))
    if name != "manifest.json":  # whoever writes the pickle writes the manifest over it, too
        _manifest_anew(folder)
    model = nn.Linear(2, 1)
    with pytest.raises(UnsupportedInput):  # noqa: PT012  # either of them says so
        checkpoint = read_checkpoint(folder)
        load_checkpoint(checkpoint, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert not trace.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "training-00001.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name]["size_bytes"] = 0
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(UnsupportedInput, match=f"{name} is no file"):
        read_checkpoint(folder)


def test_shards_that_overlap_are_refused(tmp_path: Path) -> None:
    """As many elements as there should be, but some twice, and some not at all: memory that nothing has written."""
    folder = _sharded(tmp_path)
    shards = [Piece("model.weight@0,1", torch.ones(1, 1)), Piece("model.weight@0,1", torch.ones(1, 1))]
    save_file(folder / "training-00001.safetensors", shards[:1])
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    tensors["model.weight@0,2"] = torch.ones(1, 2)
    tensors["model.weight@0,3"] = torch.ones(1, 1)
    del tensors["model.weight@0,0"]
    save_file(folder / TENSORS, in_order(Piece(name, tensor) for name, tensor in tensors.items()))
    _manifest_anew(folder)
    with pytest.raises(UnsupportedInput, match=r"shards of model\.weight overlap"):
        read_training_state(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '"text"', "{}", '{"step": true}'])
def test_a_state_that_somebody_made_up_is_refused(content: str, tmp_path: Path) -> None:
    folder = _small(tmp_path)
    (folder / "state.json").write_text(content)
    (folder / "manifest.json").unlink()
    write_manifest(folder, FORMAT_VERSION)
    with pytest.raises(UnsupportedInput, match="not a complete checkpoint"):
        read_checkpoint(folder)


def test_a_renamed_checkpoint_is_not_of_another_step(tmp_path: Path) -> None:
    folder = _small(tmp_path).rename(tmp_path / "step-00000052")
    with pytest.raises(UnsupportedInput, match="it is of step 3, which is not what its name says"):
        read_checkpoint(folder)


def test_the_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    elsewhere = _small(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/latest").symlink_to(elsewhere)
    assert newest_checkpoint(tmp_path / "here") is None


def test_what_is_set_aside_is_kept_and_not_looked_at(tmp_path: Path) -> None:
    for _ in range(2):
        model, optimizer = make()
        folder = save(tmp_path, 1, model, optimizer)
        (folder / TENSORS).unlink()
        set_aside(folder)
    assert newest_checkpoint(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == [
        "step-00000001.damaged",
        "step-00000001.damaged-2",
    ]


@pytest.mark.parametrize("name", ["latest", "best"])
def test_links_that_a_copy_of_the_run_has_as_folders_are_links_again(name: str, tmp_path: Path) -> None:
    """As `scp -r` makes them: every later save ended with "Is a directory"."""
    model, optimizer = make()
    first = save(tmp_path, 1, model, optimizer, is_best=True)
    (tmp_path / name).unlink()
    shutil.copytree(first, tmp_path / name)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.folder == first
    second = save(tmp_path, 2, model, optimizer, is_best=True)
    assert (tmp_path / name).readlink() == Path(second.name)
    assert (tmp_path / f"{name}.copied" / TENSORS).read_bytes() == (first / TENSORS).read_bytes()


def test_a_checkpoint_may_take_the_place_of_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").symlink_to("gone")
    model, optimizer = make()
    assert read_checkpoint(save(tmp_path, 1, model, optimizer)).step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_what_was_being_replaced_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from an earlier checkpoint writes the later ones again."""
    model, optimizer = make()
    folder = save(tmp_path, 1, model, optimizer)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == folder and ".replaced." not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="Input/output"):
            save(tmp_path, 1, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", folder.name]
    folder.rename(tmp_path / f".{folder.name}.replaced.7.tmp")  # as if killed there
    restore_replaced(tmp_path)
    assert read_checkpoint(folder).step == 1
    shutil.copytree(folder, tmp_path / f".{folder.name}.replaced.7.tmp")
    restore_replaced(tmp_path)  # killed after the new one had the name
    assert (tmp_path / f".{folder.name}.replaced.7.tmp").exists()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(last=2), [2, 5, 6]),
        (Retention(every=3), [2, 3, 6]),
        (Retention(last=2, every=4), [2, 4, 5, 6]),
    ],
    ids=str,
)
def test_the_newest_the_best_and_the_multiples_stay(retention: Retention, kept: list[int], tmp_path: Path) -> None:
    _keep(tmp_path, retention, *range(1, 7), best=2)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == [f"step-{n:08d}" for n in kept]


def _keep(folder: Path, retention: Retention, *steps: int, best: int = 0) -> None:
    model, optimizer = make()
    for number in steps:
        save_checkpoint(
            folder,
            step=number,
            identity={},
            progress={},
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            random_states=[],
            extra={},
            is_best=number == best,
            retention=retention,
        )


def test_one_that_was_moved_to_another_disk_is_let_go_of_by_its_link(tmp_path: Path) -> None:
    here, other = tmp_path / "checkpoints", tmp_path / "other"
    _keep(here, Retention(last=1), 1)
    (here / "step-00000001").rename(other)
    (here / "step-00000001").symlink_to(other)
    (here / "latest").unlink()
    _keep(here, Retention(last=1), 2)
    assert sorted(path.name for path in here.iterdir()) == ["latest", "step-00000002"]
    assert (other / TENSORS).exists()


def test_one_that_cannot_be_removed_is_no_reason_not_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's disk a folder stays as long as another process reads a file in it."""

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        _keep(tmp_path, Retention(last=1), 1, 2, 3)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert len(list(tmp_path.glob(".step-*.pruned.*.tmp"))) == 2
    _keep(tmp_path, Retention(last=1), 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004"]
