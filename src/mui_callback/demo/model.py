"""The model that the demo trains: a few layers of small experts, two of which every token passes through."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ByT5Tokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

N_ROUTED = 16
EXPERT_WIDTH = 64
N_SHARED = 2


def build_tokenizer() -> Any:
    """A token is a byte; a text ends with the end-of-sequence token. Needs no file."""
    return ByT5Tokenizer()


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """A random Qwen2-MoE of 2.1 million parameters: 4 layers, 2 of 16 routed experts a token, 2 shared experts."""
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        num_experts=N_ROUTED,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=EXPERT_WIDTH,
        shared_expert_intermediate_size=N_SHARED * EXPERT_WIDTH,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model
