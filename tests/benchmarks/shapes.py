"""Shapes of published models, with random weights made on the device, and what a pass over them costs at least.

Each shape also has a tiny version, with which a whole script runs on a CPU in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mui_callback.demo.model import build_model, build_tokenizer


@dataclass(frozen=True)
class BatchShape:
    """Sequences of one length, without padding."""

    rows: int
    length: int
    """Tokens of each."""

    @classmethod
    def parse(cls, text: str) -> BatchShape:
        """From ``16x512``."""
        rows, length = map(int, text.split("x"))
        return cls(rows, length)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


_BATCHES = ("4x512", "16x512", "32x1024")
_TINY_BATCHES = ("2x16", "3x24")


@dataclass(frozen=True)
class Shape:
    """A model to be made."""

    name: str
    config_class: type[PreTrainedConfig]
    full: Mapping[str, Any]
    """What its config is made of."""
    tiny: Mapping[str, Any]
    """What differs in the tiny version."""
    dense: bool = False
    """Whether it is probed with ``dense=True``."""
    attention: str = "sdpa"
    """Implementation of attention in the plain forward and in the probe."""
    batches: tuple[str, ...] = _BATCHES
    top_fraction: float = 0.001

    def config(self, *, tiny: bool = False, layers: int | None = None) -> PreTrainedConfig:
        """The config of the whole model, or of its first `layers` layers."""
        values = {**self.full, **(self.tiny if tiny else {}), "use_cache": False}
        values["num_hidden_layers"] = min(layers or values["num_hidden_layers"], values["num_hidden_layers"])
        return self.config_class(**values)

    def default_batches(self, *, tiny: bool = False) -> tuple[BatchShape, ...]:
        return tuple(map(BatchShape.parse, _TINY_BATCHES if tiny else self.batches))

    def fraction(self, *, tiny: bool = False) -> float:
        """Share of a layer's neurons that are key; more where a layer has only a few."""
        return 0.05 if tiny else self.top_fraction


def build(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, *, attention: str, seed: int = 0
) -> PreTrainedModel:
    """A model in eval mode with random weights, made on the device in their dtype, never in another one."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("grouped_mm")
    return model.eval()


def _demo() -> dict[str, Any]:
    config = build_model(build_tokenizer()).config.to_diff_dict()
    derived = ("architectures", "dtype", "layer_types", "model_type", "transformers_version")
    return {name: value for name, value in config.items() if name not in derived}


_TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "olmoe",
            OlmoeConfig,
            {
                "vocab_size": 50304,
                "hidden_size": 2048,
                "intermediate_size": 1024,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "num_experts": 64,
                "num_experts_per_tok": 8,
            },
            {**_TINY, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
        ),
        Shape(
            "qwen3",
            Qwen3MoeConfig,
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
            },
            {
                **_TINY,
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "head_dim": 16,
                "num_experts": 8,
                "num_experts_per_tok": 2,
            },
        ),
        Shape(
            "deepseek_v2_lite",
            DeepseekV2Config,
            {
                "vocab_size": 102400,
                "hidden_size": 2048,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "num_hidden_layers": 27,
                "first_k_dense_replace": 1,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": None,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
            {
                **_TINY,
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            },
        ),
        Shape(
            "gpt_oss",
            GptOssConfig,
            {
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 24,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
            },
            {
                **_TINY,
                "intermediate_size": 16,
                "head_dim": 16,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "sliding_window": 8,
            },
            attention="eager",  # transformers has no sdpa with attention sinks
        ),
        Shape(
            "dense_1b",
            LlamaConfig,
            {
                "vocab_size": 14075,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            {**_TINY, "intermediate_size": 64},
            dense=True,
        ),
        Shape("demo", Qwen2MoeConfig, _demo(), {}, batches=("89x91", "45x182"), top_fraction=0.01),
    )
}
"""By name."""


# What it costs at least


@dataclass(frozen=True)
class Cost:
    """Of one batch.

    Operations count a multiplication and an addition as two; only matrix products are counted. Bytes are those that
    have to cross the memory of the device if every operand and every result of a product crosses it once.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def floor(shape: Shape, batch: BatchShape, scored: int, *, tiny: bool = False, layers: int | None = None) -> Floor:
    """What one batch costs at least, from the sizes of the weights alone.

    Args:
        shape: the model.
        batch: the batch.
        scored: positions of it that are scored.
        tiny: of the tiny version.
        layers: of the first layers only.
    """
    config = shape.config(tiny=tiny, layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=shape.attention)
    weights = dict(model.named_parameters())
    top_k = getattr(config, "num_experts_per_tok", None) or 1
    rest, head = _attention(config, batch), Cost(0, 0)
    extra, experts = Cost(0, 0), Cost(0, 0)
    for name, weight in weights.items():
        if name.endswith("embed_tokens.weight") or weight.dim() < 2 or "bias" in name:
            continue
        if name == "lm_head.weight":
            head = _product(weight, batch.tokens, 1)
        elif weight.dim() == 3:
            experts += _product(weight, batch.tokens, top_k)
        else:
            rest += _product(weight, batch.tokens, 1)
        if _is_probed(name, dense=shape.dense):
            extra += _product(weight, scored, top_k if weight.dim() == 3 else 1)
    return Floor(experts, rest, head, extra, sum(weight.numel() for weight in weights.values()))


@dataclass(frozen=True)
class Floor:
    """See `floor`."""

    experts: Cost
    """The grouped products of the plain forward."""
    rest: Cost
    """All other products of it but the head's."""
    head: Cost
    """Logits of every position."""
    extra: Cost
    """The product of the unembedding rows of the scored tokens with the down projections."""
    parameters: int

    @property
    def plain(self) -> Cost:
        """A plain forward."""
        return self.experts + self.rest + self.head

    @property
    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plain": asdict(self.plain), "extra_flops_share": self.extra.flops / self.plain.flops}


def _product(weight: Tensor, tokens: int, top_k: int) -> Cost:
    """Rows times a matrix, or times those of the chosen experts, in 16 bits."""
    n_experts, (n_in, n_out) = (weight.shape[0] if weight.dim() == 3 else 1), weight.shape[-2:]
    rows, n_read = tokens * top_k, min(n_experts, tokens * top_k)
    return Cost(2.0 * rows * n_in * n_out, 2.0 * (n_read * n_in * n_out + tokens * n_in + rows * n_out))


def _attention(config: PreTrainedConfig, batch: BatchShape) -> Cost:
    """Queries times keys and weights times values, of the pairs that the causal mask leaves."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = (width, width)
    if hasattr(config, "kv_lora_rank"):
        widths = (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    flops = sum(2.0 * batch.rows * pairs * config.num_attention_heads * sum(widths) for pairs in _pairs(config, batch))
    moved = 2.0 * batch.tokens * config.num_attention_heads * 2 * sum(widths) * config.num_hidden_layers
    return Cost(flops, moved)


def _pairs(config: PreTrainedConfig, batch: BatchShape) -> Iterator[int]:
    """Pairs of positions that see each other, by layer."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else batch.length
        yield sum(min(position, window) for position in range(1, batch.length + 1))


def _is_probed(name: str, *, dense: bool) -> bool:
    return "down_proj" in name and (dense or "expert" in name)


def floors() -> str:
    """What every shape costs at least, for the README of the benchmarks; all tokens but the first are scored."""
    rows: list[list[object]] = []
    for shape in SHAPES.values():
        for batch in shape.default_batches():
            cost = floor(shape, batch, batch.rows * (batch.length - 1))
            parts = (cost.experts, cost.rest, cost.head, cost.plain, cost.extra)
            flops = [part.flops / 1e12 for part in parts]
            share = f"{cost.extra.flops / cost.plain.flops:.1%}"
            rows.append([shape.name, batch, *flops, share, cost.plain.bytes / 1e9, cost.extra.bytes / 1e9])
    columns = ["shape", "batch", "experts TFLOP", "rest", "head", "plain", "extra", "of plain", "plain GB", "extra GB"]
    return table(columns, rows)


if __name__ == "__main__":
    print(floors())
