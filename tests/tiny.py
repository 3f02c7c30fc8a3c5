"""Tiny random models of six families whose layouts differ, with weights large enough that neurons matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

_Model = TypeVar("_Model", bound=nn.Module)

VOCAB = 384  # ByT5's bytes and special tokens
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def olmoe(**changes: Any) -> OlmoeConfig:
    return OlmoeConfig(**{**_COMMON, "intermediate_size": 12, "num_experts": 6, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    return MixtralConfig(**{**_COMMON, "intermediate_size": 12, "num_local_experts": 4, **changes})


def qwen2_moe(**changes: Any) -> Qwen2MoeConfig:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16, "num_experts": 6}
    return Qwen2MoeConfig(**{**_COMMON, "intermediate_size": 32, **sizes, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    sizes = {"moe_intermediate_size": 8, "num_experts": 8, "head_dim": 12, "norm_topk_prob": True}
    return Qwen3MoeConfig(**{**_COMMON, "intermediate_size": 32, **sizes, **changes})


def deepseek_v3(**changes: Any) -> DeepseekV3Config:
    sizes = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
        "intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    return DeepseekV3Config(**{**_COMMON, **sizes, **changes})


def gpt_oss(**changes: Any) -> GptOssConfig:
    sizes = {"intermediate_size": 12, "num_local_experts": 6, "head_dim": 12, "sliding_window": 16}
    return GptOssConfig(**{**_COMMON, **sizes, **changes})


FAMILIES: dict[str, Callable[..., Any]] = {
    "olmoe": olmoe,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def build(family: str | Any, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of the family (or of a config); every parameter, biases too, is drawn, so that none is idle."""
    torch.manual_seed(seed)
    config = FAMILIES[family](**changes) if isinstance(family, str) else family
    model = AutoModelForCausalLM.from_config(config)
    return drawn(model, seed)


def drawn(model: _Model, seed: int) -> _Model:
    """In eval mode, with every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model.eval()
