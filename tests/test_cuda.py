"""On a GPU: the grouped kernel in bfloat16, and training that is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mui_callback import MUICallback, MUIProbe, ProbeSet
from mui_callback.experts import grouped
from mui_callback.sinks.memory import MemorySink
from naive import naive_key_neurons, naive_scores
from reading import layer_scores
from tiny import build, deepseek_v3, gpt_oss, olmoe, qwen2_moe
from tiny_samples import make_samples
from training import STEPS, assert_same_to_the_bit, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FRACTION = 0.05
# Strides of 16 bytes in bfloat16, so that the grouped kernel runs.
ALIGNED: dict[str, Any] = {
    "olmoe": lambda: olmoe(hidden_size=64, intermediate_size=32, num_experts=8),
    "qwen2_moe": lambda: qwen2_moe(hidden_size=64, moe_intermediate_size=16, shared_expert_intermediate_size=32),
    "deepseek_v3": lambda: deepseek_v3(hidden_size=64, moe_intermediate_size=16),
    "gpt_oss": lambda: gpt_oss(hidden_size=64, intermediate_size=32, head_dim=32),
}


@pytest.fixture(scope="module", params=list(ALIGNED))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def samples() -> list[Any]:
    return make_samples(2, (17, 30, 24, 12))


def on_gpu(family: str, dtype: torch.dtype) -> PreTrainedModel:
    return build(ALIGNED[family]()).to("cuda", dtype)


def test_float32_equals_the_loops(family: str) -> None:
    cpu = build(ALIGNED[family]())
    layers, _ = naive_scores(cpu, family, [(s.input_ids.tolist(), s.scored.tolist()) for s in samples()])
    report = MUIProbe(on_gpu(family, torch.float32), ProbeSet({"a": samples()}), top_fraction=FRACTION).measure()
    assert report.key_neurons() == set().union(*naive_key_neurons(layers, FRACTION))


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    kernel = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped.torch.nn.functional, "grouped_mm", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    return calls


def test_bfloat16_equals_the_loops_within_its_rounding(family: str, kernel_calls: list[int]) -> None:
    model = on_gpu(family, torch.bfloat16)
    rounded = build(ALIGNED[family]()).to(torch.bfloat16).float()
    layers, _ = naive_scores(rounded, family, [(s.input_ids.tolist(), s.scored.tolist()) for s in samples()])
    report = MUIProbe(model, ProbeSet({"a": samples()}), top_fraction=FRACTION).measure()
    assert kernel_calls
    ours, exact = report.key_neurons(), set().union(*naive_key_neurons(layers, FRACTION))
    print(f"{family}: Jaccard {len(ours & exact) / len(ours | exact):.3f} of {len(exact)} key neurons in bfloat16")
    assert len(ours & exact) / len(ours | exact) > 0.8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_conservation_identity(family: str, dtype: torch.dtype, bound: float) -> None:
    totals, outputs = layer_scores(on_gpu(family, dtype), samples(), conservation=True)
    for total, output in zip(totals, outputs, strict=True):
        error = (torch.linalg.norm(total - output) / torch.linalg.norm(output)).item()
        print(f"{family} {dtype}: identity within {error:.1e}")
        assert error < bound


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_batch_size_does_not_matter(family: str, batch_tokens: int) -> None:
    model = on_gpu(family, torch.float32)
    reference = MUIProbe(model, ProbeSet({"a": samples()}), top_fraction=FRACTION).measure()
    report = MUIProbe(model, ProbeSet({"a": samples()}), top_fraction=FRACTION, batch_tokens=batch_tokens).measure()
    assert report.key_neurons() == reference.key_neurons()


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"torch_compile": True}], ids=["float32", "bf16", "compiled"])
def test_training_is_the_same_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "use_cpu": False, "full_determinism": True}
    without = train(tmp_path / "without", [], **options)
    memory = MemorySink()
    callback = MUICallback(ProbeSet({"a": samples()}), every=2, sinks=[memory], on_error="raise")
    assert_same_to_the_bit(without, train(tmp_path / "with", [callback], **options))
    assert [point.step for point in memory.points] == list(range(0, STEPS + 1, 2))
