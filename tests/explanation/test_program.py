"""A step that was seen can be called again: by the calls that led to its loss, or by the script's own lines."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tightfit.explanation.program import Program, ProgramRecorder, SeenLoss
from tightfit.explanation.site import LossSource, Site, loss_source


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)


def noted(recorder: ProgramRecorder, module: nn.Module, *args: Any) -> Any:
    """Call a module as a watch does."""
    recorder.is_open = False
    result = module(*args)
    recorder.is_open = True
    recorder.note(module, args, {}, result)
    return result


def called_again(recorder: ProgramRecorder, loss: torch.Tensor, model: nn.Module) -> tuple[SeenLoss, Program]:
    program = recorder.leading_to(loss)
    assert program is not None
    paths = {id(module): path for path, module in model.named_modules()}
    return SeenLoss(program, model, lambda module: paths[id(module)]), program


def test_the_calls_that_led_to_a_loss_give_it_again_with_its_gradients() -> None:
    model = Two()
    x, target = torch.randn(5, 3), torch.randn(5, 2)
    recorder = ProgramRecorder()
    recorder.activate()
    try:
        hidden = noted(recorder, model.first, x).sin()
        hidden += model.second.weight.sum()  # in place, and with a parameter of the model
        out = noted(recorder, model.second, hidden)
        print(out.mean().item())  # leads nowhere
        loss = nn.functional.mse_loss(out, target) / 2
    finally:
        recorder.deactivate()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    seen, program = called_again(recorder, loss, model)
    assert program.is_complete
    assert "mean" not in {getattr(call.target, "__name__", "") for call in program.calls}
    assert {tuple(t.shape) for t in seen.batch} == {(5, 3), (5, 2)}
    again = seen(model, seen.batch)
    assert torch.equal(again, loss)
    again.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)


def test_autocast_and_no_grad_are_as_they_were() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    recorder = ProgramRecorder()
    recorder.activate()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = noted(recorder, model, x)
        with torch.no_grad():
            scale = out.float().abs().max()
        loss = out.float().sum() / scale
    finally:
        recorder.deactivate()
    seen, program = called_again(recorder, loss, model)
    assert program.autocast == torch.bfloat16
    assert torch.equal(seen(model, seen.batch), loss)


def test_a_batch_that_is_gone_is_made_of_zeros_of_its_kind() -> None:
    model = nn.Linear(3, 2)
    recorder = ProgramRecorder()
    recorder.activate()
    try:
        loss = noted(recorder, model, torch.ones(4, 3)).sum()
    finally:
        recorder.deactivate()
    program = recorder.leading_to(loss)
    assert program is not None
    del loss  # with its graph, which has the batch
    (batch,) = SeenLoss(program, model, lambda _: "").batch
    assert torch.equal(batch, torch.zeros(4, 3))


def test_a_tensor_with_an_unknown_graph_leaves_the_program_incomplete() -> None:
    model = nn.Linear(3, 2)
    recorder = ProgramRecorder()
    foreign = (torch.ones(2, requires_grad=True) * 2).sum()
    recorder.activate()
    try:
        loss = noted(recorder, model, torch.ones(4, 3)).sum() * foreign
    finally:
        recorder.deactivate()
    _, program = called_again(recorder, loss, model)
    assert not program.is_complete


LOOP = """
def train(model, loader, optimizer, scaler):
    for images, labels in loader:
        with autocast():
            output = model(images)
            loss = criterion(output, labels)
        optimizer.zero_grad()
        scaler.scale(loss / 2).backward()
        print(output.mean())

def training_step(self, batch):
    x, y = batch
    return F.cross_entropy(self(x), y)
"""


def source_at(path: Path, line: int, backward: int | None = None) -> LossSource | None:
    def site(at: int) -> Site:
        return Site(file=str(path), line=at, function=0, names={}, tensors={}, host="")

    return loss_source(site(line), None if backward is None else site(backward))


@pytest.mark.parametrize("backward", [8, None])
def test_the_lines_of_a_loss_are_those_that_it_comes_from(tmp_path: Path, backward: int | None) -> None:
    path = tmp_path / "train.py"
    path.write_text(LOOP)
    source = source_at(path, 5, backward)
    assert source is not None
    assert source.lines == ("with autocast():", "    output = model(images)", "    loss = criterion(output, labels)")
    assert ast.unparse(source.result) == "loss"
    assert source.used_elsewhere == ("output",)


def test_the_names_that_the_lines_read_are_the_batchs_and_the_models(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(LOOP)
    source = source_at(path, 5, 8)
    assert source is not None
    assert source.names_read() == ["autocast", "model", "images", "criterion", "labels"]


def test_a_function_that_returns_the_loss_has_an_expression(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(LOOP)
    source = source_at(path, 13)
    assert source is not None
    assert source.lines == ()
    assert ast.unparse(source.result) == "F.cross_entropy(self(x), y)"
