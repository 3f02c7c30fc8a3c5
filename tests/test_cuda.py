"""On a GPU: the grouped kernel in bfloat16, and training that is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedModel

import families
from distributed_training import launch
from distributed_training import train as train_with_ddp
from integrations import Lightning, Watch, make_model, probe_set
from mui_callback import MUICallback, MUIMonitor, MUIProbe, ProbeSet
from mui_callback.experts import grouped
from mui_callback.sinks.memory import MemorySink
from naive import naive_key_neurons, naive_scores
from plain_moe import ZOO, build_plain
from plain_naive import plain_scores
from reading import layer_scores
from test_benchmarks import choices_file
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


@pytest.fixture(autouse=True)
def whole_float32() -> None:
    """A Trainer turns on products that round float32 to ten bits, for all that follows."""
    torch.set_float32_matmul_precision("highest")


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
    report = MUIProbe(
        on_gpu(family, torch.float32), ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}"
    ).measure()
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
    report = MUIProbe(model, ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}").measure()
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
    reference = MUIProbe(model, ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}").measure()
    report = MUIProbe(
        model, ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}", batch_tokens=batch_tokens
    ).measure()
    assert report.key_neurons() == reference.key_neurons()


@pytest.mark.skipif(
    torch.cuda.device_count() > 1,
    reason="with several GPUs transformers takes DataParallel, which hangs in full determinism: CUDA_VISIBLE_DEVICES=0",
)
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"torch_compile": True}], ids=["float32", "bf16", "compiled"])
def test_training_is_the_same_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "use_cpu": False, "full_determinism": True}
    without = train(tmp_path / "without", [], **options)
    memory = MemorySink()
    callback = MUICallback(ProbeSet({"a": samples()}), every=2, sinks=[memory], on_error="raise")
    assert_same_to_the_bit(without, train(tmp_path / "with", [callback], **options))
    assert [point.step for point in memory.points] == list(range(0, STEPS + 1, 2))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_in_lightning_is_the_same_to_the_bit(precision: str, tmp_path: Path) -> None:
    way = Lightning("lightning.pytorch", accelerator="gpu", devices=1, precision=precision, deterministic=True)
    watch = Watch()
    without = way.fit(tmp_path / "without", None)
    assert_same_to_the_bit(without, way.fit(tmp_path / "with", watch))
    assert watch.steps == [0, 3, 6, STEPS]
    print(f"{precision}: loss {watch.memory.points[-1].scalars['mui/loss']:.4f}")


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path) -> None:
    model, watch = make_model().to("cuda"), Watch({"on_error": "warn"})
    reference = MUIProbe(model, probe_set()).measure()
    largest = max(batch.n_positions for (batch,) in MUIProbe(model, probe_set())._rounds)

    def exhaust(module: torch.nn.Module, args: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].numel() > largest // 3:
            torch.empty(2**45, device="cuda")

    model.register_forward_pre_hook(exhaust, with_kwargs=True)
    with pytest.warns(UserWarning, match="MUI: out of memory in a probe; going on with batches of"):
        watch.monitor(model, tmp_path).close()
    (point,) = watch.memory.points
    assert point.report.settings.batch_tokens < largest // 3
    assert point.report.key_neurons() == reference.key_neurons()


@pytest.mark.parametrize("what", ["neurons", "experts"])
def test_benchmarks_and_the_causal_check_of_a_model_in_bfloat16(family: str, what: Any, tmp_path: Path) -> None:
    model, memory = on_gpu(family, torch.bfloat16), MemorySink()
    ids = torch.tensor(samples()[0].input_ids, device="cuda")[None]

    def loss(model: torch.nn.Module, step: int) -> dict[str, float]:
        return {"loss": model(input_ids=ids, labels=ids).loss.item()}

    with MUIMonitor(
        model,
        ProbeSet({"a": samples()}),
        tokenizer=ByT5Tokenizer(),
        every=1,
        rules=f"top_fraction={FRACTION}",
        sinks=[memory],
        output_dir=tmp_path,
        tracker=None,
        on_error="raise",
        benchmarks=[loss, str(choices_file(tmp_path))],
        ablate=what,
    ) as monitor:
        monitor.step(1)
    points = {point.step: point.scalars for point in memory.points if "mui/mui" in point.scalars}
    assert list(points) == [0, 1]
    assert points[0]["mui/mui"] == points[1]["mui/mui"]  # nothing was trained between them
    assert points[0]["mui/benchmark/loss"] == points[1]["mui/benchmark/loss"] == loss(model, 1)["loss"]
    assert 0 <= points[1]["mui/benchmark/numbers/accuracy"] <= 1
    (ablation,) = (point.ablation for point in memory.points if point.ablation is not None)
    change = ablation.tasks["a"].changes.key.value
    print(f"{family}: the loss without key {what} is higher by {change:+.4f} nats")
    assert change != 0


def fails_at_4(step: int, n_tokens: int) -> None:
    if step == 4:
        raise RuntimeError("injected")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_a_gpu_each_skip_together_and_train_the_same_to_the_bit(tmp_path: Path) -> None:
    without = launch(tmp_path / "without", train_with_ddp, device="cuda", is_monitored=False)
    options = {"every": 2, "sabotage": {1: fails_at_4}}
    seen = launch(tmp_path / "with", train_with_ddp, device="cuda", **options)
    for rank in (0, 1):
        assert seen[rank].error is None
        assert_same_to_the_bit(without[rank].trained, seen[rank].trained)
        assert len(seen[rank].warnings) == 1
    assert [point.step for point in seen[0].points] == [0, 2, 4, 6, STEPS]
    assert [point.error for point in seen[0].points if point.error] == ["ProbeError: process 1: RuntimeError: injected"]
    assert not seen[1].points


@pytest.mark.parametrize("name", list(ZOO))
def test_lists_of_modules_equal_the_loops(name: str) -> None:
    tokens = [(sample.input_ids.tolist(), sample.scored.tolist()) for sample in samples()]
    exact = set().union(*naive_key_neurons(plain_scores(build_plain(name), name, tokens)[0], FRACTION))
    model = build_plain(name).to("cuda")
    assert (
        MUIProbe(model, ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}").measure().key_neurons() == exact
    )
    rounded = MUIProbe(model.to(torch.bfloat16), ProbeSet({"a": samples()}), rules=f"top_fraction={FRACTION}")
    assert not rounded.verify(rounding=0.03).complaints
    rounded.measure()


@pytest.mark.parametrize("name", [name for name in families.family_names() if name in families.EXPECTED])
def test_every_family_conserves_its_output(name: str) -> None:
    model = families.build(name).to("cuda")
    exact = MUIProbe(model, ProbeSet({"a": samples()})).verify(rounding=1e-5)
    assert not exact.complaints
    assert [check.layer.layer for check in exact.layers] == list(families.EXPECTED[name].layers)
    if name == "inkling2":  # keeps its routers in float32, which a cast of everything does not
        return
    model = model.to(torch.bfloat16)
    rounded = MUIProbe(model, ProbeSet({"a": samples()})).verify(rounding=0.03)
    print(f"{name}: identity within {max(check.error for check in rounded.layers):.1e} in bfloat16")
    assert not rounded.complaints
