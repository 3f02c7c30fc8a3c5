"""Losses of choices after prompts that are run once, against each choice by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import families
import tiny
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.benchmarks.choices import ChoiceBenchmark
from mui_callback.benchmarks.run import run_benchmarks
from mui_callback.parallel.shards import Shards
from mui_callback.probe.choice_runs import PromptSharing
from mui_callback.probe.samples import TokenChoice, TokenSample
from plain_moe import build_plain

SHARING = ("afmoe", "aria", "deepseek_v2", "gemma4", "glm4v_moe", "jetmoe", "llama4", "mimo_v2_flash", "qwen3_vl_moe")
"""With keys and values of positions alone: sliding windows, compressed keys, keys of other layers, images."""
NOT_SHARING = ("qwen3_next", "jamba", "lfm2_moe", "minimax", "zaya")
"""With states that are not of a position."""


def probe_set(longest: int = 90, n_samples: int = 16) -> ProbeSet:
    """Enough choices to share prompts, whose lengths differ, and so do those of the choices."""
    rng = np.random.default_rng(1)
    samples = []
    for number, length in enumerate(np.linspace(3, longest, n_samples).astype(int)):
        prompt = rng.integers(3, tiny.VOCAB, length)
        own = [rng.integers(3, tiny.VOCAB, n) for n in rng.integers(1, 6, 3 + number % 3)]
        ids = [np.concatenate([prompt, one]) for one in own]
        choices = tuple(TokenChoice(one, np.arange(len(one)) >= length) for one in ids)
        samples.append(TokenSample(str(number), ids[0], choices[0].scored, choices=choices, answer=0))
    return ProbeSet({"a": samples})


def naive(model: nn.Module, samples: ProbeSet) -> list[float]:
    """Negative log-likelihood of every choice, each run by itself."""
    model.eval()
    losses = []
    with torch.no_grad():
        for choice in (choice for sample in samples.tasks["a"] for choice in sample.choices):
            output = model(input_ids=torch.tensor(choice.input_ids)[None])
            logits = (output if isinstance(output, torch.Tensor) else output.logits)[0].float().log_softmax(-1)
            losses.append(-float(sum(logits[t - 1, choice.input_ids[t]] for t in np.flatnonzero(choice.scored))))
    return losses


@contextmanager
def passes(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The inputs of all forward passes."""
    seen: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda module, args, options: seen.append(options), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def n_after_prompts(seen: list[dict[str, Any]]) -> int:
    return sum(options.get("past_key_values") is not None for options in seen)


def n_positions(seen: list[dict[str, Any]]) -> int:
    return sum(options["input_ids"].numel() for options in seen)


def choice_losses(report: MUIReport) -> Any:
    return report.counts.choice_loss


@pytest.mark.parametrize("batch_tokens", [8192, 700])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, *SHARING])
def test_losses_are_those_of_each_choice_by_itself(family: str, batch_tokens: int) -> None:
    model = tiny.build(family) if family in tiny.FAMILIES else families.build(family)
    samples = probe_set()
    expected = naive(model, samples)
    probe = MUIProbe(model, samples, batch_tokens=batch_tokens)
    with passes(model) as seen:
        report = probe.measure()
    np.testing.assert_allclose(choice_losses(report), expected, rtol=1e-5)
    if batch_tokens == 8192:  # smaller batches save less than a pass costs
        assert n_after_prompts(seen) > 0
    assert not probe._sharing.refused


def test_each_prompt_is_run_once() -> None:
    model, samples = tiny.build("qwen3_moe"), probe_set()
    probe = MUIProbe(model, samples)
    with passes(model) as seen:
        probe.measure()
    n_samples = len(samples.tasks["a"])
    prompts = [options for options in seen if options.get("use_cache") and "past_key_values" not in options]
    assert sum(len(options["input_ids"]) for options in prompts) == n_samples
    rest = [options for options in seen if "past_key_values" in options]
    n_choices = sum(len(sample.choices) for sample in samples.tasks["a"])
    assert sum(len(options["input_ids"]) for options in rest) == n_choices
    in_full = sum(len(choice.input_ids) for sample in samples.tasks["a"] for choice in sample.choices)
    assert n_positions(prompts) + n_positions(rest) < 0.6 * in_full


@pytest.mark.parametrize("family", NOT_SHARING)
def test_other_caches_are_not_used(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, samples = families.build(family), probe_set()
    expected = naive(model, samples)
    probe = MUIProbe(model, samples)
    with passes(model) as seen, caplog.at_level(logging.INFO):
        np.testing.assert_allclose(choice_losses(probe.measure()), expected, rtol=1e-5)
    assert n_after_prompts(seen) == 0
    assert "expected a cache of keys and values alone, got" in caplog.text
    with passes(model) as seen:
        probe.measure()
    assert not any(options.get("use_cache") for options in seen)  # it is not tried again


@pytest.mark.parametrize("make", [lambda: build_plain("qwen2"), lambda: families.build("switch_transformers")])
def test_where_it_is_not_tried(make: Callable[[], nn.Module]) -> None:
    model = make()
    probe = MUIProbe(model, probe_set(60))
    assert not probe._sharing.is_possible
    if not hasattr(model, "config"):
        np.testing.assert_allclose(choice_losses(probe.measure()), naive(model, probe_set(60)), rtol=1e-5)


def test_keys_that_depend_on_the_length_are_not_kept() -> None:
    """The factors of the rotary embedding are others from 64 positions on, which some choices cross."""
    torch.manual_seed(0)
    model = families.build("phimoe")
    width = model.config.hidden_size // model.config.num_attention_heads
    factors = {"short_factor": [1.0] * (width // 2), "long_factor": [8.0] * (width // 2), "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_mscale": 1.0, "long_mscale": 1.3, **factors}
    longer = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    rope["original_max_position_embeddings"] = 64
    config = type(model.config)(**{**model.config.to_dict(), **longer, "rope_parameters": rope})
    model, samples = type(model)(config).eval(), probe_set(100)
    probe = MUIProbe(model, samples, batch_tokens=700)
    assert not probe._sharing.is_possible
    # in a batch, the model itself takes the factors of the longest row for all
    np.testing.assert_allclose(choice_losses(probe.measure()), naive(model, samples), rtol=1e-3)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic"}, {"sliding": {"rope_type": "yarn"}, "full": {"type": "longrope"}}]
)
def test_what_depends_on_the_length_is_told_by_the_config(name: str, rope: dict[str, Any]) -> None:
    model = tiny.build("qwen3_moe")
    assert PromptSharing.of(model, Shards()).is_possible
    setattr(model.config, name, rope)
    assert not PromptSharing.of(model, Shards()).is_possible


def test_processes_in_step_all_run_choices_in_full() -> None:
    model = tiny.build("qwen3_moe")
    assert PromptSharing.of(model, Shards()).is_possible
    assert PromptSharing.of(model, Shards((0, 1))).is_possible
    assert not PromptSharing.of(model, Shards((0, 1), in_step=True)).is_possible


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_differs_by_rounding_only(dtype: torch.dtype) -> None:
    model, samples = tiny.build("qwen3_moe").to(dtype), probe_set()
    expected = naive(model, samples)
    probe = MUIProbe(model, samples)
    with passes(model) as seen:
        np.testing.assert_allclose(choice_losses(probe.measure()), expected, rtol=0.03, atol=0.1)
    assert n_after_prompts(seen) > 0
    assert not probe._sharing.refused


def forget(options: dict[str, Any]) -> None:
    for layer in options["past_key_values"].layers:
        layer.keys, layer.values = layer.keys.flip(-2), layer.values.flip(-2)


def misplace(options: dict[str, Any]) -> None:
    options["position_ids"] = options["position_ids"] - 1


def mislead(options: dict[str, Any]) -> None:
    """Prompts that are padded are read with their padding."""
    options["attention_mask"] = torch.ones_like(options["attention_mask"])


def fail(options: dict[str, Any]) -> None:
    raise ValueError("of no use")


def run_out_of_memory(options: dict[str, Any]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("harm", [forget, misplace, mislead, fail, run_out_of_memory])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_goes_on_wrongly_is_noticed(
    harm: Callable[[dict[str, Any]], None], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model, samples = tiny.build("qwen3_moe").to(dtype), probe_set()

    def meddle(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        if options.get("past_key_values") is not None:
            harm(options)
        return args, options

    expected = choice_losses(MUIProbe(model, samples, batch_tokens=1).measure())
    model.register_forward_pre_hook(meddle, with_kwargs=True)
    probe = MUIProbe(model, samples)
    with caplog.at_level(logging.INFO):
        report = probe.measure()
    rtol, atol = (1e-5, 0.0) if dtype == torch.float32 else (0.03, 0.1)
    np.testing.assert_allclose(choice_losses(report), expected, rtol=rtol, atol=atol)
    assert caplog.text.count("each choice is run with its prompt, since the model does not go on after one") == 1
    assert probe.settings.batch_tokens == report.settings.batch_tokens == 8192


def test_a_model_that_goes_wrong_later_is_noticed() -> None:
    """Every pass checks anew; and what fails in the middle of one is run in full."""
    model, samples = tiny.build("qwen3_moe"), probe_set()
    expected = naive(model, samples)
    probe = MUIProbe(model, samples, batch_tokens=1500)
    probe.measure()
    later: list[int] = []

    def meddle(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        if options.get("past_key_values") is not None:
            later.append(1)
            if len(later) == 2:
                raise RuntimeError("out of memory")
        return args, options

    model.register_forward_pre_hook(meddle, with_kwargs=True)
    np.testing.assert_allclose(choice_losses(probe.measure()), expected, rtol=1e-5)
    assert len(later) == 2
    assert probe._sharing.refused == "RuntimeError: out of memory"
    np.testing.assert_allclose(choice_losses(probe.measure()), expected, rtol=1e-5)


def test_batches_are_halved_where_memory_runs_out_in_full() -> None:
    model, samples = tiny.build("qwen3_moe"), probe_set()
    probe = MUIProbe(model, samples)
    sizes = []
    while probe.halve_batches():
        sizes.append(probe.settings.batch_tokens)
        if sizes[-1] in (sizes[0], 100):
            np.testing.assert_allclose(choice_losses(probe.measure()), naive(model, samples), rtol=1e-5)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(len(batch.sample) == 1 for batch in probe._choices.in_full())


def test_nothing_is_left_of_a_prompt() -> None:
    model = families.build("qwen3_vl_moe").train()
    before = torch.get_rng_state()
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    probe = MUIProbe(model, probe_set())
    with passes(model) as seen:
        probe.measure()
    assert n_after_prompts(seen) > 0
    assert torch.equal(torch.get_rng_state(), before)
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(vars(module)[name] is value for name, value in attributes[path].items()), path


def test_choices_of_a_benchmark_share_prompts_too() -> None:
    model, samples = tiny.build("gpt_oss"), probe_set()
    benchmark = ChoiceBenchmark("b", samples)
    losses = np.array(naive(model, samples))
    n_choices = np.array([len(sample.choices) for sample in samples.tasks["a"]])
    answers = losses[np.cumsum(n_choices) - n_choices]  # the first of each
    n_tokens = sum(int(sample.choices[0].scored.sum()) for sample in samples.tasks["a"])
    for _ in range(2):
        with passes(model) as seen:
            results, failures = run_benchmarks([benchmark], model, 0)
        assert not failures
        assert results["b/loss"].value == pytest.approx(answers.sum() / n_tokens, rel=1e-5)
        assert n_after_prompts(seen) > 0


def probe_together(rank: int, directory: Path) -> dict[str, Any]:
    """Process 1 has a model that cannot go on after a prompt."""
    model = DistributedDataParallel(tiny.build("qwen3_moe"))

    def meddle(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        if options.get("past_key_values") is not None and rank == 1:
            raise RuntimeError("injected")

    model.module.register_forward_pre_hook(meddle, with_kwargs=True)
    probe = MUIProbe(model, probe_set(n_samples=40))
    with passes(model.module) as seen:
        report = probe.measure()
    return {"loss": choice_losses(report), "after": n_after_prompts(seen), "refused": probe._sharing.refused}


def test_processes_share_prompts_each_by_itself(tmp_path: Path) -> None:
    first, second = launch(tmp_path, probe_together)
    expected = naive(tiny.build("qwen3_moe"), probe_set(n_samples=40))
    for one in (first, second):
        np.testing.assert_allclose(one["loss"], expected, rtol=1e-5)
    assert (first["after"] > 0, first["refused"]) == (True, "")
    assert second["refused"] == "RuntimeError: injected"
