"""Models of text and speech."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.suite.case import Case, Size
from tightfit.train.models.gpt import Gpt, GptConfig

_VOCABULARY = 96


def _tokens(size: Size, tiny: tuple[int, int], bench: tuple[int, int]) -> Tensor:
    return torch.randint(3, _VOCABULARY, tiny if size == "tiny" else bench)


def _next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def gpt(size: Size) -> Case:
    """tightfit's own, with dropout and tied embeddings."""
    tokens = _tokens(size, (4, 33), (8, 257))
    sizes: dict[str, int] = (
        {"width": 32, "layers": 2, "heads": 2} if size == "tiny" else {"width": 128, "layers": 4, "heads": 4}
    )
    config = GptConfig(vocabulary_size=_VOCABULARY, sequence_length=tokens.shape[1] - 1, dropout=0.1, **sizes)
    return Case(model=Gpt(config), batch=tokens, loss=_next_token_loss)


def _llama_sizes(size: Size) -> dict[str, Any]:
    common = {"vocab_size": _VOCABULARY, "max_position_embeddings": 256}
    if size == "tiny":
        return common | {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }  # fmt: skip
    return common | {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip


def llama(size: Size) -> Case:
    """Grouped-query attention, rotary positions, RMS norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = _tokens(size, (2, 24), (8, 256))
    model = LlamaForCausalLM(LlamaConfig(**_llama_sizes(size), use_cache=False))
    return Case(model=model, batch={"input_ids": tokens, "labels": tokens})


def bert(size: Size) -> Case:
    """Masked language model with dropout and a padding mask."""
    from transformers import BertConfig, BertForMaskedLM

    tokens = _tokens(size, (4, 24), (16, 128))
    width, layers = (32, 3) if size == "tiny" else (128, 4)
    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=256,
    )
    mask = torch.ones_like(tokens)
    mask[0, tokens.shape[1] // 2 :] = 0
    return Case(
        model=BertForMaskedLM(config), batch={"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}
    )


def t5(size: Size) -> Case:
    """Encoder-decoder with relative positions, dropout and tied embeddings."""
    from transformers import T5Config, T5ForConditionalGeneration

    source, target = _tokens(size, (2, 20), (8, 160)), _tokens(size, (2, 12), (8, 96))
    width, layers = (32, 1) if size == "tiny" else (128, 3)
    config = T5Config(
        vocab_size=_VOCABULARY,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return Case(model=T5ForConditionalGeneration(config), batch={"input_ids": source, "labels": target})


def whisper(size: Size) -> Case:
    """Speech encoder with convolutions, text decoder with cross attention."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    width, layers, positions = (32, 1, 24) if size == "tiny" else (96, 3, 200)
    target = _tokens(size, (2, 10), (8, 64))
    config = WhisperConfig(
        vocab_size=_VOCABULARY,
        num_mel_bins=16,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=positions,
        max_target_positions=128,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = torch.randn(target.shape[0], 16, 2 * positions)
    return Case(model=WhisperForConditionalGeneration(config), batch={"input_features": features, "labels": target})


def mixtral(size: Size) -> Case:
    """Mixture of experts with top-2 routing: shapes depend on the data."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokens = _tokens(size, (2, 16), (8, 160))
    config = MixtralConfig(**_llama_sizes(size), num_local_experts=4, num_experts_per_tok=2, use_cache=False)
    return Case(model=MixtralForCausalLM(config), batch={"input_ids": tokens, "labels": tokens})


def mamba(size: Size) -> Case:
    """Selective state space, by the slow path: a Python loop over positions."""
    from transformers import MambaConfig, MambaForCausalLM

    tokens = _tokens(size, (2, 12), (4, 64))
    width, layers = (16, 2) if size == "tiny" else (128, 2)
    config = MambaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        state_size=8,
        num_hidden_layers=layers,
        use_cache=False,
    )
    return Case(model=MambaForCausalLM(config), batch={"input_ids": tokens, "labels": tokens})


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.dropout(x)))


def lora(size: Size) -> Case:
    """A frozen Llama with low-rank adapters on the query and value projections."""
    case = llama(size)
    case.model.requires_grad_(False)
    for layer in case.model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, 4)
        layer.self_attn.v_proj = LowRank(layer.self_attn.v_proj, 4)
    return case
