from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tightfit.errors import UnsupportedInput
from tightfit.train.config import TrainConfig
from tightfit.train.data import DataFacts
from tightfit.train.models import MODELS, building, find_model
from tightfit.train.workload import build, resolve

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", [name for name, _ in MODELS])
def test_every_built_in_model_trains_on_its_usual_data(name: str) -> None:
    work = build(*resolve(TrainConfig(model=name, batch_size=2)))
    loss = work.task.loss(work.model, work.microbatch(0).batch)
    loss.backward()
    assert loss.isfinite()
    missing = [name for name, parameter in work.model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_gpt_is_causal_and_its_weights_are_tied() -> None:
    model = find_model("gpt-tiny", None).build(DataFacts(kind="text", vocabulary_size=256), 16, {}).module.eval()
    tokens = torch.arange(16).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 10] = 99
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 0).all()
    assert model.get_parameter("token_embedding.weight") is model.head.weight


def test_the_lstm_reads_text_too() -> None:
    work = build(*resolve(TrainConfig(model="lstm-tiny", dataset="python-source", batch_size=2, sequence_length=16)))
    assert work.task.loss(work.model, work.microbatch(0).batch).item() == pytest.approx(5.5, abs=0.5)  # about log(256)


def test_model_arguments_change_the_model() -> None:
    work = build(*resolve(TrainConfig(model="gpt-tiny", batch_size=2, model_args={"layers": 3, "dropout": 0})))
    assert len(work.model.get_submodule("blocks")._modules) == 3
    assert work.model.get_submodule("dropout").p == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 3}, r"no setting 'layer'. Did you mean 'layers'\?"),
        ({"layers": "many"}, "layers must be a non-negative int"),
        ({"layers": 2.5}, "layers must be a non-negative int"),
        ({"heads": 3}, "multiple of the heads"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedInput, match=message):
        build(*resolve(TrainConfig(model="gpt-tiny", model_args=arguments)))


@pytest.mark.parametrize("steps_at_a_time", [1, 13, 26, 100])
def test_an_lstm_in_pieces_is_the_lstm(steps_at_a_time: int) -> None:
    models = [
        build(*resolve(TrainConfig(model="lstm", sequence_length=26, batch_size=2, model_args=arguments))).model.eval()
        for arguments in ({}, {"steps_at_a_time": steps_at_a_time})
    ]
    series = torch.randn(2, 26, 1)
    torch.testing.assert_close(models[0](series), models[1](series))


def test_a_model_and_data_of_other_kinds_do_not_fit() -> None:
    with pytest.raises(UnsupportedInput, match=r"'resnet' is trained on images .* 'co2' gives series"):
        build(*resolve(TrainConfig(model="resnet", dataset="co2")))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_models_come_from_config_files(name: str) -> None:
    work = build(*resolve(TrainConfig(model=f"transformers:{CONFIGS / name}.json", batch_size=2, sequence_length=16)))
    loss = work.task.loss(work.model, work.microbatch(0).batch)
    loss.backward()
    assert all(parameter.dtype == torch.float32 for parameter in work.model.parameters())
    assert loss.item() == pytest.approx(5.5, abs=0.5)


def test_a_config_without_architectures_needs_a_task(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "llama.json").read_text())
    del config["architectures"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedInput, match="--task, one of: causal-lm"):
        find_model(f"transformers:{path}", None)
    source = find_model(f"transformers:{tmp_path}", "causal-lm")
    model = source.build(DataFacts(kind="text", vocabulary_size=256), 16, {}).module
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("architectures", [10**30, {"a": 1}, [3], "LlamaForCausalLM", []])
def test_architectures_that_are_none(architectures: object, tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "llama.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(UnsupportedInput):
        find_model(f"transformers:{tmp_path}", None)


@pytest.mark.parametrize(
    ("arguments", "sequence_length", "message"),
    [
        ({"vocab_size": 100}, 16, "--model-args vocab_size=256"),
        ({"hidden_sise": 100}, 16, "no attribute 'hidden_sise'"),
        ({}, 4096, "--sequence-length 128"),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_refused(
    arguments: dict[str, object], sequence_length: int, message: str
) -> None:
    source = find_model(f"transformers:{CONFIGS / 'llama.json'}", None)
    with pytest.raises(UnsupportedInput, match=message):
        source.build(DataFacts(kind="text", vocabulary_size=256), sequence_length, arguments)


@pytest.mark.parametrize("factory", ["own_loss_model", "model_and_loss"])
def test_a_factory_gives_a_model_with_its_loss(factory: str) -> None:
    config = TrainConfig(
        model=f"tests.train.user_code:{factory}", dataset="tests.train.user_code:numbers", model_args={"width": 5}
    )
    work = build(*resolve(config))
    assert work.task.loss(work.model, work.microbatch(0).batch).isfinite()
    assert next(work.model.parameters()).shape == (5, 4)


def test_equal_seeds_give_equal_models() -> None:
    def weights(seed: int) -> torch.Tensor:
        work = build(*resolve(TrainConfig(model="lstm-tiny", seed=seed)))
        return torch.cat([parameter.detach().flatten() for parameter in work.model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("model", ["gpt-tiny", "transformers"])
def test_a_number_of_layers_that_would_never_end_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """2**63 blocks were being built after nine minutes, in 5.5 GB."""
    monkeypatch.setattr(building, "MOST_PARTS", 5000)
    monkeypatch.setattr(building, "_SAY_EVERY_S", 0.0)
    arguments = {"layers": 2**62}
    if model == "transformers":
        gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 2, "n_embd": 8, "vocab_size": 256}
        (tmp_path / "config.json").write_text(json.dumps(gpt2))
        model, arguments = f"transformers:{tmp_path / 'config.json'}", {"n_layer": 2**63}
    with pytest.raises(UnsupportedInput, match="more than 5,000 modules and parameters"):
        build(*resolve(TrainConfig(model=model, batch_size=2, sequence_length=16, model_args=arguments)))
    assert "so far" in caplog.text
