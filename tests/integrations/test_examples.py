"""The examples of `docs/trainers.md` whose hosts are there for all tests; for others see tests/real_libraries."""

from __future__ import annotations

import pytest

from tests.support.examples import run_example

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]


@pytest.mark.parametrize(
    ("command", "host"),
    [
        pytest.param("transformers_trainer.py", "accelerate", marks=pytest.mark.exhaustive),
        pytest.param("accelerate_loop.py", "accelerate", marks=pytest.mark.exhaustive),
        pytest.param("lightning_module.py", "lightning", marks=pytest.mark.exhaustive),
        pytest.param("nanogpt_loop.py", "torch", marks=pytest.mark.exhaustive),
    ],
)
def test_it_keeps_its_budget_and_its_bits(
    command: str, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(host)
    run_example(command, monkeypatch, capsys)
