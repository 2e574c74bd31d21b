from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from tightfit.train.random_state import random_state, restore_random_state


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
    before = (first / "training.pt").read_bytes()
    step(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    assert (first / "training.pt").read_bytes() != before
    assert read_checkpoint(tmp_path / "latest").step == 1


def test_a_flipped_byte_is_noticed_and_the_one_before_is_taken(tmp_path: Path) -> None:
    model, optimizer = make()
    save(tmp_path, 1, model, optimizer)
    damaged = save(tmp_path, 2, model, optimizer) / "training.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UnsupportedInput, match="not a complete checkpoint"):
        read_checkpoint(tmp_path / "step-00000002")
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1


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


def test_tensors_load_without_running_code(tmp_path: Path) -> None:
    model, optimizer = make()
    step(model, optimizer)
    folder = save(tmp_path, 1, model, optimizer)
    saved = torch.load(folder / "training.pt", weights_only=True)
    assert set(saved["model"]) == set(model.state_dict())


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
    model, optimizer = make()
    folder = save(tmp_path, 1, model, optimizer)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format_version": version}))
    with pytest.raises(UnsupportedInput) as caught:
        newest_checkpoint(tmp_path)
    assert f"written by recollect 0.1, as tightfit was called before, in checkpoint format {version}" in str(
        caught.value
    )
    assert "cannot resume from there. Begin another run with --mark NAME" in str(caught.value)
    assert "not a complete checkpoint" not in str(caught.value)
