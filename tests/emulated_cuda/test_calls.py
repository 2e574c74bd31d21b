"""Launches, waits and calls of libraries are counted, and streams, events and graphs behave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.emulated_cuda import counters
from tests.emulated_cuda.processes import run_script

STATEMENTS = {
    # launches, waits, calls of cuBLAS
    "torch.empty(4, device='cuda')": (0, 0, 0),
    "x.add_(1)": (1, 0, 0),
    "(x + 1) * 2": (2, 0, 0),
    "x.view(2, 2).t()": (0, 0, 0),
    "x.sum().item()": (1, 1, 0),
    "x.cpu()": (0, 1, 0),
    "x.copy_(pinned, non_blocking=True)": (0, 0, 0),
    "a @ a": (0, 0, 1),
    "torch.cuda.synchronize()": (0, 1, 0),
    "torch.cuda.current_stream().synchronize()": (0, 1, 0),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_counters_of_a_statement(statement: str) -> None:
    names = {
        "torch": torch,
        "x": torch.ones(4, device="cuda"),
        "a": torch.ones(8, 8, device="cuda"),
        "pinned": torch.ones(4).pin_memory(),
    }
    exec(statement, names)  # what is done only once: handles, workspaces
    with counters.counted() as calls:
        exec(statement, names)
    assert (calls.launches, calls.syncs, calls.library_calls) == STATEMENTS[statement]


def test_a_training_step_waits_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 4)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 16, device="cuda")
    for _ in range(2):
        with counters.counted() as calls:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert calls.syncs == 0
    assert calls.launches > 5
    assert calls.library_calls >= 5  # two products forward, three backward


def test_streams_and_events() -> None:
    side = torch.cuda.Stream()
    assert side.cuda_stream != torch.cuda.current_stream().cuda_stream
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        torch.ones(4, device="cuda").add_(1)
    end.record()
    assert end.query()
    assert begin.elapsed_time(end) > 0


def test_a_graph_is_captured_and_replayed() -> None:
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        x.add_(1)
    assert not torch.cuda.is_current_stream_capturing()
    with counters.counted() as calls:
        graph.replay()
    assert calls.launches == 1


def test_waiting_inside_a_capture_is_an_error() -> None:
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin()
        with pytest.raises(RuntimeError, match="stream is capturing"):
            side.synchronize()
        graph.capture_end()
    side.synchronize()


def test_convolutions_and_recurrent_layers_run_through_cudnn() -> None:
    x = torch.randn(4, 3, 16, 16, device="cuda")
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3)).cuda()
    with counters.counted() as calls:
        convolutions(x).sum().backward()
    assert calls.library_calls >= 5  # two forward, at least three backward
    sequence = torch.randn(4, 10, 12, device="cuda", requires_grad=True)
    for kind, options in (
        (nn.LSTM, {"dropout": 0.1}),
        (nn.LSTM, {"proj_size": 8}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"bias": False}),
    ):
        layer = kind(12, 16, num_layers=2, batch_first=True, **options).cuda()
        with counters.counted() as calls:
            layer(sequence)[0].sum().backward()
        assert calls.library_calls == 3  # forward, and backward of the data and of the weights
        assert [p.grad.shape for p in layer.parameters()] == [p.shape for p in layer.parameters()]


def test_launches_are_shown_by_name_where_that_is_asked_for() -> None:
    script = """
        import os
        os.dup2(1, 2)
        import torch
        torch.empty(2, device="cuda").add_(1)
    """
    shown = run_script(script, SHOW_LAUNCHES=1).splitlines()
    assert len(shown) == 1
    assert shown[0].startswith("emulated CUDA: launch of ")
    assert "elementwise_kernel" in shown[0]
