"""What arXiv 2509.23933, *Beyond Benchmarks: Understanding Mixture-of-Experts Models through Internal Mechanisms*,
reports of models that anybody can measure. All numbers are the paper's; shares are in percent.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 2509.23933"
SOURCE_URL = "https://arxiv.org/abs/2509.23933"


class AtTokens(NamedTuple):
    """A checkpoint of OLMoE-1B-7B-0924."""

    tokens: float
    performance: float
    mui: float


class OfModel(NamedTuple):
    """A model, mean over the paper's benchmarks."""

    performance: float
    mui: float


OLMOE = "OLMoE-1B-7B-0924"
OLMOE_MEAN = (
    AtTokens(0.5e12, 15.4, 36.5),
    AtTokens(1e12, 17.4, 39.2),
    AtTokens(2e12, 22.1, 40.2),
    AtTokens(3e12, 24.5, 40.0),
    AtTokens(4e12, 25.5, 39.8),
    AtTokens(5e12, 26.7, 38.5),
)
"""Accumulating up to 2T tokens, evolving from there."""
OLMOE_MBPP = (
    AtTokens(0.5e12, 10.4, 2.4),
    AtTokens(1e12, 10.8, 2.6),
    AtTokens(2e12, 12.8, 2.9),
    AtTokens(3e12, 16.4, 3.0),
    AtTokens(4e12, 20.8, 3.0),
    AtTokens(5e12, 23.8, 3.2),
)
"""MBPP alone: accumulating throughout."""

MODELS = {
    "DeepSeek-V2-Lite": OfModel(44.8, 29.3),
    "DeepSeek-Coder-V2-Lite": OfModel(61.6, 24.8),
    "DeepSeek-V2": OfModel(67.3, 43.4),
    "DeepSeek-Coder-V2": OfModel(76.8, 40.4),
    "DeepSeek-V2.5": OfModel(75.1, 42.0),
    "Qwen3-30B-A3B": OfModel(86.0, 35.0),
    "Qwen3-Next": OfModel(90.0, 25.7),
    "GPT-OSS-20B": OfModel(80.5, 9.1),
}

KEY_EXPERTS_ON_MATH = {
    "DeepSeek-MoE": 7.80,
    "Qwen1.5-MoE": 8.85,
    "DeepSeek-V2-Lite": 11.36,
    "DeepSeek-Coder-V2-Lite": 11.65,
    "Qwen3-Coder-A3B": 8.12,
    "Qwen3-A3B": 9.80,
    "GPT-OSS-20B": 26.70,
}
"""Key expert proportion on MATH."""

TOP_EXPERTS_ON_MMLU = (
    "In a Qwen model with one shared expert in each layer, the ten most frequently activated experts are all shared: "
    "each owns a key neuron in every sample, and 90 to 99 % of its neurons are key.",
    "In GPT-OSS-20B, which has routed experts only, the ten own a key neuron in 99.5 to 100 % of the samples, but only "
    "2 to 14 % of their neurons are key; L17-E8 is the first, with 6 %.",
)
