"""Documents of their own (`--packing off`): no text is lost, padding has no part in loss, gradients or metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.train.test_formats import tokenizer, write_jsonl
from tests.train.test_transformers_tasks import BERT, save_config
from tightfit.cli.main import main
from tightfit.train.config import TrainConfig
from tightfit.train.data import DataOptions, TrainingData, load_data
from tightfit.train.data.dataset_info import IGNORED, DataFacts
from tightfit.train.tasks.causal_lm import causal_lm, next_token_loss
from tightfit.train.tasks.masked_lm import Masking
from tightfit.train.workload import build, resolve

TEXTS = [("word " * (1 + number % 7)).strip() for number in range(60)]
LONG = "".join(chr(97 + number % 26) for number in range(150))


pytestmark = pytest.mark.usefixtures("own_folder")


def table(*texts: str) -> str:
    return str(write_jsonl(Path("a.jsonl"), text=list(texts)))


def alone(length: int, *texts: str, **settings: Any) -> TrainingData:
    options = DataOptions(sequence_length=length, packed=False, accepts=("text",), **settings)
    return load_data(table(*texts), options)


def rows(data: TrainingData) -> list[torch.Tensor]:
    return [data.samples[place] for place in range(len(data.samples))]


def test_a_document_is_a_sample_and_a_long_one_several_that_follow_each_other() -> None:
    data = alone(64, "short", LONG, "x")  # too few rows to hold one out; "x" has no token to predict
    assert data.held_out is None
    texts = [bytes(row.tolist()).decode() for row in rows(data)]
    assert texts == ["short", LONG[:65], LONG[64:129], LONG[128:]]
    assert data.sizes_vary
    assert data.facts.is_padded


def test_with_a_tokenizer_every_document_has_its_end() -> None:
    from tightfit.train.data.tokens import load_tokens

    tokens = load_tokens(str(tokenizer(Path("tok"))), None)
    data = alone(16, *["good film", "dull"], tokens=tokens)
    assert [len(row) for row in rows(data)] == [3, 2]
    assert all(row[-1] == tokens.end for row in rows(data))


def test_a_packed_and_an_unpacked_dataset_are_not_taken_for_each_other() -> None:
    packed = load_data(table(*TEXTS), DataOptions(sequence_length=16, accepts=("text",)))
    assert packed.fingerprint != alone(16, *TEXTS).fingerprint
    assert not packed.sizes_vary


def test_no_document_with_two_tokens_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "gpt-tiny", "--dataset", table("a", "b"), "--packing", "off"]) == 2
    assert "no document has two" in capsys.readouterr().err


def test_loss_and_gradients_are_those_of_the_documents_one_by_one() -> None:
    config = TrainConfig(model="gpt-tiny", dataset=table(*TEXTS), packing="off", batch_size=8, sequence_length=40)
    work = build(*resolve(config))
    work.model.eval()
    batch = work.microbatch(0).batch
    assert (batch == IGNORED).any()
    documents = [row[row != IGNORED][None] for row in batch]
    counts = [row.numel() - 1 for row in documents]
    assert work.task.weight(batch) == sum(counts)
    loss = work.task.loss(work.model, batch)
    gradients = torch.autograd.grad(loss, list(work.model.parameters()))
    one_by_one = sum(
        next_token_loss(work.model, row) * count / sum(counts) for row, count in zip(documents, counts, strict=True)
    )
    assert isinstance(one_by_one, torch.Tensor)
    expected = torch.autograd.grad(one_by_one, list(work.model.parameters()))
    torch.testing.assert_close(loss, one_by_one)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    measured, count = work.task.measure(work.model, batch)["loss"]
    assert measured / count == pytest.approx(loss.item())


def test_without_padding_the_loss_is_the_packed_one() -> None:
    facts = {"kind": "text", "vocabulary_size": 256}
    work = build(*resolve(TrainConfig(model="gpt-tiny", batch_size=4)))
    work.model.eval()
    batch = work.microbatch(0).batch
    losses = [causal_lm(DataFacts(**facts, is_padded=flag)).loss(work.model, batch) for flag in (False, True)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("microbatch", [pytest.param([], marks=pytest.mark.exhaustive), ["--microbatch-size", "3"]])
def test_a_run_on_documents_keeps_its_budget(microbatch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt-tiny", "--dataset", table(*TEXTS, LONG), "--packing", "off", "--sequence-length", "64"]
    more = ["--batch-size", "8", "--steps", "6", "--log-every", "1", "--memory", "6MiB", "--json", *microbatch]
    assert main(["train", *words, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured_peak_bytes"] <= found["budget_bytes"]
    assert 0 < found["eval"]["bits_per_byte"] < 12
    lines = [json.loads(line) for line in Path("runs/a/gpt-tiny/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert "packing: 'off'" in Path("runs/a/gpt-tiny/config.yaml").read_text()
    assert main(["train", *words, *more, "--steps", "7", "--resume", "auto"]) == 0


def test_the_microbatches_of_padded_documents_add_up_to_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", "gpt-tiny", "--model-args", "dropout=0.0", "--dataset", table(*TEXTS), "--packing",
             "off", "--batch-size", "8", "--steps", "3", "--log-every", "1", "--eval-samples", "4"]  # fmt: skip
    losses = []
    for mark, more in (("whole", []), ("split", ["--accumulation-steps", "3"])):
        assert main([*words, "--mark", mark, *more]) == 0
        losses.append(
            [json.loads(line)["loss"] for line in Path(f"runs/a/{mark}/metrics.jsonl").read_text().splitlines()]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_masking_never_chooses_padding() -> None:
    facts = DataFacts(kind="text", vocabulary_size=256, padding=7, is_padded=True)
    torch.manual_seed(0)
    samples = [torch.full((length,), 65) for length in (2, 30, 11)]
    for _ in range(20):
        batch = Masking(facts)(samples)
        assert batch["attention_mask"].sum(dim=1).tolist() == [2, 30, 11]
        padding = batch["attention_mask"] == 0
        assert (batch["labels"][padding] == IGNORED).all()
        assert (batch["input_ids"][padding] == 7).all()
        assert (batch["labels"] != IGNORED).any(dim=1).all()


@pytest.mark.exhaustive
def test_masked_language_modelling_of_documents(capsys: pytest.CaptureFixture[str]) -> None:
    model = save_config(hf.BertConfig(**BERT), "BertForMaskedLM")
    assert main(["train", "--model", model, "--dataset", table(*TEXTS), "--packing", "off", "--sequence-length", "40",
                 "--steps", "2", "--batch-size", "4", "--memory", "64MiB", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["eval"]["loss"] > 0
