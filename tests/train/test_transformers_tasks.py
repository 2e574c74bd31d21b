"""Models of the transformers library through the command line: every task, and a fine-tune of local weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.train.test_formats import LABELS, WORDS, pictures, tokenizer, write_csv, write_jsonl
from tightfit.cli.main import main


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
BERT = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


def save_config(config: Any, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained("model")
    return "transformers:model"


def train(*words: str) -> None:
    assert main(["train", "--steps", "2", "--batch-size", "4", "--log-every", "1", "--memory", "64MiB", *words]) == 0


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["measured_peak_bytes"] <= found["budget_bytes"]
    return found


@pytest.mark.exhaustive
def test_masked_language_modelling(capsys: pytest.CaptureFixture[str]) -> None:
    model = save_config(hf.BertConfig(**BERT), "BertForMaskedLM")
    train("--model", model, "--dataset", "python-source", "--sequence-length", "16", "--eval-every", "2", "--json",
          "--eval-dataset", str(write_csv(Path("a.csv"))), "--text-column", "text")  # fmt: skip
    judged = document(capsys)["eval"]
    assert judged["loss"] == pytest.approx(5.7, abs=0.5)  # log(300): it knows nothing yet
    assert 0 <= judged["token_accuracy"] <= 1


def test_sequence_classification_gets_the_classes_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    model = save_config(hf.BertConfig(**BERT, num_labels=7), "BertForSequenceClassification")
    train("--model", model, "--dataset", str(write_csv(Path("a.csv"))), "--json", "--grad-checkpoint", "full")
    assert 0 <= document(capsys)["eval"]["accuracy"] <= 1
    assert load_file("runs/a/transformers-model/model.safetensors")["classifier.bias"].shape == (2,)


def test_sequence_to_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    config = hf.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                         decoder_start_token_id=0, use_cache=False)  # fmt: skip
    model = save_config(config, "T5ForConditionalGeneration")
    path = write_jsonl(Path("a.jsonl"), source=WORDS, target=[word.upper() for word in WORDS])
    train("--model", model, "--dataset", str(path), "--json", "--microbatch-size", "2")
    assert document(capsys)["eval"]["token_accuracy"] >= 0


def test_images_from_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    config = hf.ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=32, num_labels=2)  # fmt: skip
    model = save_config(config, "ViTForImageClassification")
    train("--model", model, "--dataset", str(pictures(Path("pets"), 20)), "--image-size", "16", "--json")
    assert 0 <= document(capsys)["eval"]["accuracy"] <= 1


def test_a_fine_tune_begins_with_the_local_weights_and_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPT-2-shaped model from a folder as save_pretrained writes it, with the tokenizer that lies beside it."""
    folder = tokenizer(Path("base"))
    torch.manual_seed(7)
    base = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, **GPT2))
    base.save_pretrained(folder)
    capsys.readouterr()  # a library that is there, and not needed, may have said so
    Path("words.txt").write_text(" ".join(WORDS * 20))
    words = ["--model", "transformers:base", "--dataset", "words.txt", "--sequence-length", "8", "--mark", "tuned"]
    train(*words, "--lr", "1e-9", "--steps", "1", "--json")
    found = document(capsys)
    assert found["eval"]["bits_per_byte"] > 0
    tuned = load_file("runs/words/tuned/model.safetensors")
    begun = base.state_dict()
    assert all(torch.allclose(tuned[name], begun[name], atol=1e-6) for name in begun)
    assert main(["train", *words[:-1], "longer", "--batch-size", "4", "--steps", "60", "--lr", "0.01", "--json"]) == 0
    assert document(capsys)["eval"]["loss"] < 0.5 * found["eval"]["loss"]


def test_weights_that_do_not_fit_their_config_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=256, **GPT2)).save_pretrained("base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "n_embd": 32}))
    assert main(["train", "--model", "transformers:base", "--sequence-length", "8"]) == 2
    assert "do not fit its config" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "a.jsonl"], "Name one with --label-column"),
        (["--dataset", "python-source"], "is trained on labelled-text"),
        ([], "no dataset is given"),
    ],
)
def test_data_without_classes_is_refused_by_a_classifier(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(Path("a.jsonl"), text=WORDS, points=LABELS)
    model = save_config(hf.BertConfig(**BERT), "BertForSequenceClassification")
    assert main(["train", "--model", model, *words]) == 2
    assert message in capsys.readouterr().err
