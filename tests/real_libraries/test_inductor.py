"""What `torch.compile` makes by its own compiler: kernels that no dispatcher sees, with and without gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_libraries.models import Block, mean_square, stack
from tests.real_libraries.trainings import Peaks, five_steps

# Dynamo's own, when it looks at an argument; inductor's, where there is no GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
if shutil.which("g++") is None:
    pytest.skip("needs g++, by which torch.compile makes its kernels", allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def saves_as_checkpointing(peaks: Peaks) -> bool:
    return peaks.replayed_ops > 0 and peaks.plain - peaks.smallest >= 0.9 * (peaks.plain - peaks.checkpointed)


def compiled_activation() -> type[Block]:
    fused: Callable[[Tensor], Tensor] = torch.compile(lambda x: F.gelu(x) * torch.sigmoid(x))

    class Fused(Block):
        def activate(self, x: Tensor) -> Tensor:
            return fused(x)

    return Fused


def flex_attention() -> type[Block]:
    """Frozen attention: on CPUs, flex_attention has no backward."""
    from torch.nn.attention import flex_attention

    fused = torch.compile(flex_attention.flex_attention)
    mask = flex_attention.create_block_mask(
        lambda _, __, row, column: row >= column, None, None, 32, 32, device="cpu", BLOCK_SIZE=32
    )

    class Flexible(Block):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fixed: Tensor = fused(q.detach(), k.detach(), v.detach(), block_mask=mask)
            return super().attend(q, k, v) * fixed

    return Flexible


@pytest.mark.parametrize("make", [compiled_activation, flex_attention])
def test_compiled_functions(make: Callable[[], type[Block]]) -> None:
    kind = make()
    assert saves_as_checkpointing(five_steps(lambda: stack(kind), mean_square, lambda model: model))


@pytest.mark.slow
def test_compiled_blocks() -> None:
    def compiled() -> tuple[nn.Module, Tensor]:
        model, batch = stack(Block)
        for block in model:
            block.compile()
        return model, batch

    assert saves_as_checkpointing(five_steps(compiled, mean_square, lambda model: model))
