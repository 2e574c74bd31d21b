"""Models of transformers, from configurations that are shrunk by rules, as no two libraries' sizes have one name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.subject import Subject, mean_square

VOCABULARY, TOKENS, ROWS, CLASSES = 320, 32, 4, 10
IMAGE, PATCH, SECONDS = 64, 8, 0.25
_RATE = 16_000

#: What a setting's name means, and its small value; the first that matches counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(num_)?(hidden_layers|layers?|encoder_layers|decoder_layers)|n_layers?|num_(encoder|decoder)_layers", 3),
    (r"(encoder|decoder)_(attention_heads)|num_(attention_)?heads|n_heads?|num_attention_heads", 4),
    (r"num_key_value_heads|n_kv_heads", 2),
    (r"head_dim|attention_head_dim|kv_channels|d_kv", 16),
    (r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|encoder_hidden_size|hidden_dim)", 64),
    (r"(\w*intermediate_size|d_ff|ffn_dim|(encoder|decoder)_ffn_dim|hidden_dim_mlp|n_inner)", 128),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_k|moe_top_k|top_k)", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts", 1),
    (r"image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions", 512),
    (r"q_lora_rank|kv_lora_rank", 32),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 16),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
)
_NEVER_ABOVE_VOCABULARY = re.compile(r"\w*_token_id|(pad|bos|eos)_\w*id")


def build(family: str, name: str) -> Subject:
    makers: dict[str, Callable[[str], Subject]] = {
        "transformers-masked": _of_text("ForMaskedLM"),
        "transformers-seq2seq": _sequences,
        "transformers-vision": _images,
        "transformers-audio": _sounds,
    }
    return makers.get(family, _of_text("ForCausalLM"))(name)


def _of_text(head: str) -> Callable[[str], Subject]:
    def make(name: str) -> Subject:
        import transformers

        auto = {"ForCausalLM": transformers.AutoModelForCausalLM, "ForMaskedLM": transformers.AutoModelForMaskedLM}
        model = auto[head].from_config(small_config(name), attn_implementation=_attention(name))
        tokens = torch.randint(10, VOCABULARY, (ROWS, TOKENS))
        return _subject(model, {"input_ids": tokens, "labels": tokens})

    return make


def _sequences(name: str) -> Subject:
    import transformers

    config = small_config(name)
    config.pad_token_id = config.decoder_start_token_id = 0
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    tokens = torch.randint(10, VOCABULARY, (ROWS, TOKENS))
    return _subject(model, {"input_ids": tokens, "labels": tokens[:, : TOKENS // 2].contiguous()})


def _images(name: str) -> Subject:
    import transformers

    config = small_config(name)
    if hasattr(config, "image_size") and not isinstance(config.image_size, int):
        config.image_size = [IMAGE, IMAGE]
    config.num_labels = CLASSES
    model = transformers.AutoModelForImageClassification.from_config(config)
    channels = getattr(config, "num_channels", 3)
    return _subject(model, {"pixel_values": torch.randn(ROWS, channels, IMAGE, IMAGE), "labels": torch.arange(ROWS)})


def _sounds(name: str) -> Subject:
    import transformers

    config = small_config(name)
    if name == "whisper":
        config.max_source_positions = 50
        model = transformers.WhisperForConditionalGeneration(config)
        tokens = torch.randint(10, VOCABULARY, (ROWS, 16))
        return _subject(model, {"input_features": torch.randn(ROWS, config.num_mel_bins, 100), "labels": tokens})
    if name == "speech_to_text":
        model = transformers.Speech2TextForConditionalGeneration(config)
        tokens = torch.randint(10, VOCABULARY, (ROWS, 16))
        batch = {"input_features": torch.randn(ROWS, 64, config.input_feat_per_channel), "labels": tokens}
        return _subject(model, batch)
    config.num_labels = CLASSES
    if name == "audio-spectrogram-transformer":
        config.max_length, config.num_mel_bins, config.patch_size = 64, 32, 16
        model = transformers.AutoModelForAudioClassification.from_config(config)
        return _subject(model, {"input_values": torch.randn(ROWS, 64, 32), "labels": torch.arange(ROWS)})
    if name == "wav2vec2-bert":
        model = transformers.AutoModelForAudioClassification.from_config(config)
        sounds = torch.randn(ROWS, 64, config.feature_projection_input_dim)
        return _subject(model, {"input_features": sounds, "labels": torch.arange(ROWS)})
    if name == "moonshine":
        model = transformers.AutoModelForSpeechSeq2Seq.from_config(config)
        tokens = torch.randint(10, VOCABULARY, (ROWS, 16))
        return _subject(model, {"input_values": torch.randn(ROWS, _RATE), "labels": tokens})
    model = transformers.AutoModelForAudioClassification.from_config(config)
    sounds = torch.randn(ROWS, int(_RATE * SECONDS))
    return _subject(model, {"input_values": sounds, "labels": torch.arange(ROWS)})


def _subject(model: nn.Module, batch: dict[str, Tensor]) -> Subject:
    model.train()
    return Subject.single(model, batch, _own_loss)


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch)
    loss: Tensor | None = getattr(result, "loss", None)
    return mean_square(model, batch) if loss is None else loss


def _attention(name: str) -> str | None:
    return None


def small_config(name: str) -> Any:
    """Return a model type's configuration, with everything that has a size made small."""
    import transformers

    kind = transformers.CONFIG_MAPPING[name]
    config = kind()
    shrink(config)
    config.use_cache = False
    given = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}
    # Made again, so that what follows from sizes does: lists with an entry for each layer among them.
    layers = next((given[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in given), None)
    for key, value in list(given.items()):
        if (
            isinstance(layers, int)
            and isinstance(value, list)
            and key in ("layer_types", "mlp_layer_types", "layers_block_type")
        ):
            given[key] = _with_both_ends(value, layers)
    return kind(**given)


def _with_both_ends(values: list[Any], count: int) -> list[Any]:
    """Return `count` of the values, with every kind that there is, as far as they go."""
    kinds = list(dict.fromkeys(values))
    return [kinds[place % len(kinds)] for place in range(count)]


def shrink(config: Any) -> None:
    """Make every size in a configuration small, and in those inside it."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif _NEVER_ABOVE_VOCABULARY.fullmatch(key):
            if value >= VOCABULARY:
                setattr(config, key, 1)
        elif key == "embed_dim" and isinstance(getattr(config, "num_heads", None), list):
            continue  # of the first stage, which its heads divide
        else:
            for pattern, small in _SIZES:
                if re.fullmatch(pattern, key):
                    setattr(config, key, min(value, small))
                    break
