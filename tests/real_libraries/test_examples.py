"""The examples of `docs/trainers.md` with libraries that are not there for all tests."""

from __future__ import annotations

import pytest

from tests.support.examples import run_example

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]


@pytest.mark.parametrize(
    ("command", "host"),
    [
        pytest.param("trl_trainers.py sft", "trl", marks=pytest.mark.slow),
        ("trl_trainers.py dpo", "trl"),
        pytest.param("trl_trainers.py grpo", "trl", marks=pytest.mark.slow),
        pytest.param("sentence_transformers_trainer.py", "sentence_transformers", marks=pytest.mark.slow),
        pytest.param("peft_lora.py", "peft", marks=pytest.mark.slow),
        pytest.param("lightning_gan.py", "lightning", marks=pytest.mark.slow),
        ("timm_loop.py", "timm"),
        pytest.param("diffusers_unet.py", "diffusers", marks=pytest.mark.slow),
        ("geometric_graphs.py gcn", "torch_geometric"),
        ("geometric_graphs.py gat", "torch_geometric"),
    ],
)
def test_it_keeps_its_budget_and_its_bits(
    command: str, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(host)
    run_example(command, monkeypatch, capsys)
