"""Four models that differ in the number of their experts, and in whether one of them is shared; and their data.

A layer has 8 or 16 experts of equal width, and a token passes three of them. With a shared expert, the last of these
experts is taken from the router and put beside it: every token passes it, with weight 1, and two of the others, whose
weights add up to 1. Without, the weights of all three add up to 1. So both have as many neurons and, of the experts, as
many parameters in all and for each token; the router has one row less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

from mui_callback.demo.corpus import Corpus
from mui_callback.demo.packing import Row, pack

WIDTH, EXPERT_WIDTH, N_LAYERS, N_ACTIVE = 96, 64, 3, 3
MOST_EXPERTS = 16

_DEVIATION = 0.02
_BALANCE = 0.02
"""Of the load-balancing loss, which is as large as the number of experts that a router chooses."""
_SHARES = {"english": 0.3, "code": 0.3, "arithmetic": 0.4}
_ROW_LENGTH = 256
_EXPERT_OF_SHARED = {
    "shared_mlp.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "shared_mlp.output_linear.weight": "block_sparse_moe.experts.down_proj",
}


@dataclass(frozen=True)
class Variant:
    """One of the models."""

    n_experts: int
    """Of a layer, the shared one included."""
    has_shared: bool

    @property
    def n_routed(self) -> int:
        """Experts that the router of a layer chooses from."""
        return self.n_experts - self.has_shared

    @property
    def n_chosen(self) -> int:
        """Experts that it chooses for a token."""
        return N_ACTIVE - self.has_shared

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.n_experts} experts" + (", 1 shared" if self.has_shared else "")

    @property
    def slug(self) -> str:
        """For names of files."""
        return f"{self.n_experts}-{'shared' if self.has_shared else 'routed'}"


VARIANTS = tuple(Variant(n_experts, has_shared) for n_experts in (8, MOST_EXPERTS) for has_shared in (False, True))


def build_model(variant: Variant, tokenizer: Any, seed: int) -> Any:
    """The model with random weights; those that two variants have in common are the same for the same seed."""
    config = GraniteMoeSharedConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        shared_intermediate_size=EXPERT_WIDTH if variant.has_shared else 0,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_multiplier=(WIDTH / 4) ** -0.5,
        max_position_embeddings=_ROW_LENGTH,
        num_local_experts=variant.n_routed,
        num_experts_per_tok=variant.n_chosen,
        output_router_logits=True,
        router_aux_loss_coef=_BALANCE / variant.n_chosen,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = GraniteMoeSharedForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(_drawn(name, weight, variant, seed))
    return model


def active_parameters(model: Any, variant: Variant) -> int:
    """Parameters that take part in one token, embeddings and head included."""
    n_active = 0
    for name, weight in model.named_parameters():
        is_routed = ".experts." in name
        n_active += weight.numel() * variant.n_chosen // variant.n_routed if is_routed else weight.numel()
    return n_active


def training_rows(corpus: Corpus, tokenizer: Any, n_rows: int, seed: int) -> list[Row]:
    """What all variants are trained on, in this order."""
    return pack(corpus.training, _SHARES, tokenizer, n_rows=n_rows, row_length=_ROW_LENGTH, seed=seed)


def digest(rows: Sequence[Row]) -> str:
    """Equal for the same data in the same order."""
    found = sha256()
    for row in rows:
        for name, values in row.items():
            found.update(name.encode())
            found.update(values.numpy().tobytes())
    return found.hexdigest()


def _drawn(name: str, weight: Tensor, variant: Variant, seed: int) -> Tensor:
    """By the name alone, and of as many experts as there ever are, so that a weight is the same in all variants."""
    for shared, expert in _EXPERT_OF_SHARED.items():
        if name.endswith(shared):
            own = name.replace(shared, expert)
            return _normal(own, (MOST_EXPERTS, *weight.shape), seed)[variant.n_experts - 1]
    if "block_sparse_moe" in name:
        return _normal(name, (MOST_EXPERTS, *weight.shape[1:]), seed)[: variant.n_routed]
    return _normal(name, tuple(weight.shape), seed)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    return _DEVIATION * torch.randn(shape, generator=generator)
