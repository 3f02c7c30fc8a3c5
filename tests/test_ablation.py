"""Losses without key neurons and without random ones, against weights that are set to zero by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from backend_training import SETTINGS, many
from backends import BACKENDS
from distributed_training import launch
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import InterruptedPassError, ProbeError
from mui_callback.metrics.ablation import LossChange, loss_changes
from mui_callback.metrics.random_control import random_experts, random_neurons
from mui_callback.metrics.resampling import bootstrap_weights
from mui_callback.metrics.utilization import BoolArray, FloatArray
from mui_callback.probe.ablation import AblationReport, ablate
from mui_callback.probe.losses import Trial
from mui_callback.probe.samples import TokenSample
from mui_callback.report import MUIReport
from tiny import VOCAB, build
from tiny_samples import make_samples

DRAWS = 2
TASKS = ("answer", "noise")
ANSWER = 77
KNOWN_ROUTED, KNOWN_SHARED = 3, 5
"""The neuron of each routed expert, and of the shared MLP, that makes the answer."""
SPREAD = ("ddp", "zero3_list", "fsdp2_nested", "moe_ep2_dp2", "autoep_one_sided", "hf_ep_all_to_all", "hf_ep_shared")


def probe_set(seed: int = 0, n: int = 12) -> ProbeSet:
    """Samples whose every response token is the answer, and samples of random tokens."""
    rng = np.random.default_rng(seed)
    answers = []
    for number in range(n):
        prompt = rng.integers(3, VOCAB, 4 + number % 5)
        ids = np.append(prompt, [ANSWER] * (1 + number % 3))
        answers.append(TokenSample(f"a{number}", ids, np.arange(len(ids)) >= len(prompt)))
    return ProbeSet({"answer": answers, "noise": make_samples(seed + 1, (11, 7, 14, 9, 5, 13))})


def answering_model() -> nn.Module:
    """A random model in whose last layer known neurons write the unembedding row of the answer, for every token.

    Their gate and up projections are the same, so that their activation, silu(z) · z, is never negative.
    """
    model = build("qwen2_moe")
    experts, shared = model.model.layers[1].mlp.experts, model.model.layers[1].mlp.shared_expert
    row = model.lm_head.weight[ANSWER] / model.lm_head.weight[ANSWER].norm()
    with torch.no_grad():
        experts.gate_up_proj[:, experts.down_proj.shape[2] + KNOWN_ROUTED] = experts.gate_up_proj[:, KNOWN_ROUTED]
        shared.up_proj.weight[KNOWN_SHARED] = shared.gate_proj.weight[KNOWN_SHARED]
        experts.down_proj[:, :, KNOWN_ROUTED] = 30 * row
        shared.down_proj.weight[:, KNOWN_SHARED] = 30 * row
    return model


def probe_of(model: nn.Module, samples: ProbeSet | None = None, **settings: Any) -> MUIProbe:
    return MUIProbe(model, samples or probe_set(), **{"rules": "top_fraction=0.05", "batch_tokens": 60, **settings})


def by_hand(model: nn.Module, is_masked: BoolArray) -> nn.Module:
    """A copy of the model, a tiny Qwen2-MoE, with columns of W_d set to zero."""
    other: Any = copy.deepcopy(model)
    rest = torch.from_numpy(is_masked)
    for layer in other.model.layers:
        for down in (*layer.mlp.experts.down_proj.detach(), layer.mlp.shared_expert.down_proj.weight.detach()):
            own, rest = rest.tensor_split([down.shape[1]])
            down[:, own] = 0
    assert not len(rest)
    return other


def losses_by_hand(model: nn.Module, samples: list[TokenSample]) -> FloatArray:
    """One sample at a time."""
    found = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids)
        with torch.no_grad():
            output: Any = model(ids[None])
        at = torch.from_numpy(np.flatnonzero(sample.scored))
        found.append(F.cross_entropy(output.logits[0, at - 1].double(), ids[at], reduction="sum").item())
    return np.array(found)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return answering_model()


@pytest.fixture(scope="module")
def report(model: nn.Module) -> MUIReport:
    return probe_of(model).measure()


@pytest.fixture(scope="module")
def ablated(model: nn.Module, report: MUIReport) -> AblationReport:
    return ablate(probe_of(model), report, draws=DRAWS)


# Losses


def test_losses_are_those_of_weights_that_are_zero(model: nn.Module) -> None:
    probe, rng = probe_of(model), np.random.default_rng(0)
    samples = [sample for task in probe_set().tasks.values() for sample in task]
    trials = [
        Trial(np.array(numbers), rng.random(probe.layout.n_neurons) < share)
        for numbers, share in (([4, 0, 13], 0.3), (range(len(samples)), 0.0), ([7], 1.0))
    ]
    for trial, found in zip(trials, probe.losses(trials), strict=True):
        expected = losses_by_hand(by_hand(model, trial.is_masked), [samples[number] for number in trial.sample])
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_losses_with_nothing_masked_are_those_of_the_report_to_the_bit(precision: str) -> None:
    # neurons that the grouped kernel does not take
    model = build("olmoe", intermediate_size=13) if precision == "autocast" else answering_model()
    if precision == "bfloat16":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        probe = probe_of(model)
        everything = np.arange(len(probe.sample_table.id))
        (found,) = probe.losses([Trial(everything, np.zeros(probe.layout.n_neurons, dtype=np.bool_))])
        assert np.array_equal(found, probe.measure().counts.loss)
    assert probe.losses([]) == []


# The check


@pytest.mark.parametrize("what", ["neurons", "experts"])
def test_changes_are_those_by_hand(model: nn.Module, report: MUIReport, what: Any) -> None:
    found = ablate(probe_of(model), report, what=what, draws=DRAWS, seed=3)
    assert (found.what, found.draws, found.level, found.seed) == (what, DRAWS, 0.95, 3)
    assert tuple(found.tasks) == TASKS
    for index, task in enumerate(TASKS):
        samples = probe_set().tasks[task]
        n_tokens = sum(int(sample.scored.sum()) for sample in samples)
        rng = np.random.default_rng((3, index))
        if what == "neurons":
            is_key = report.is_key_neuron(task)
            controls = [random_neurons(report.layout, is_key, rng) for _ in range(DRAWS)]
            masks = [is_key, *(control.is_drawn for control in controls)]
        else:
            is_key = report.tasks[task].key_experts
            controls = [random_experts(report.layout, is_key, rng) for _ in range(DRAWS)]
            sets = [is_key, *(control.is_drawn for control in controls)]
            # 2 layers of 6 routed experts and 2 shared ones, of 8 neurons each
            masks = [np.array([is_in for is_in in members for _ in range(8)]) for members in sets]
        before = losses_by_hand(model, samples).sum() / n_tokens
        key, *random = (losses_by_hand(by_hand(model, mask), samples).sum() / n_tokens - before for mask in masks)
        one = found.tasks[task]
        assert (one.n_samples, one.n_tokens) == (len(samples), n_tokens)
        assert (one.n_key, one.n_masked) == (is_key.sum(), masks[0].sum())
        assert one.n_overlap == tuple((control.is_drawn & is_key).sum() for control in controls)
        changes = one.changes
        assert changes is not None
        values = (changes.loss, changes.key.value, changes.random.value, changes.difference.value)
        assert values == pytest.approx((before, key, np.mean(random), key - np.mean(random)), abs=1e-5)
        assert changes.random_draws == pytest.approx(random, abs=1e-5)


def test_neurons_that_are_known_to_make_the_answer_are_found_to_matter(
    report: MUIReport, ablated: AblationReport
) -> None:
    known = {(1, f"E{expert}", KNOWN_ROUTED) for expert in range(6)} | {(1, "S1", KNOWN_SHARED)}
    assert (1, "S1", KNOWN_SHARED) in {tuple(neuron) for neuron in report.key_neurons("answer")}
    assert len(known & {tuple(neuron) for neuron in report.key_neurons("answer")}) > 3
    changes = ablated.tasks["answer"].changes
    assert changes is not None
    assert changes.key.value > 1
    assert abs(changes.random.value) < 0.2 * changes.key.value
    assert changes.difference.interval is not None
    assert changes.difference.interval.low > 0.5 * changes.key.value


def test_intervals_hold_their_values(ablated: AblationReport) -> None:
    other = ablate(probe_of(build("olmoe")), probe_of(build("olmoe")).measure(), draws=1, level=0.8)
    for one in (*ablated.tasks.values(), *other.tasks.values()):
        assert one.changes is not None
        for change in (one.changes.key, one.changes.random, one.changes.difference):
            assert change.interval is not None
            assert change.interval.low < change.value < change.interval.high
    assert {change.interval.level for one in other.tasks.values() if one.changes for change in [one.changes.key]} == {
        0.8
    }


def test_the_same_seed_gives_the_same(model: nn.Module, report: MUIReport, ablated: AblationReport) -> None:
    assert ablate(probe_of(model), report, draws=DRAWS) == ablated
    other = ablate(probe_of(model), report, draws=DRAWS, seed=1).tasks["noise"].changes
    before = ablated.tasks["noise"].changes
    assert other is not None
    assert before is not None
    assert other.key.value == before.key.value
    assert other.random.value != before.random.value


def test_a_task_by_itself_and_with_more_draws_is_the_same(
    model: nn.Module, report: MUIReport, ablated: AblationReport
) -> None:
    alone = ablate(probe_of(model), report, tasks=["noise"], draws=DRAWS + 1)
    assert tuple(alone.tasks) == ("noise",)
    changes, before = alone.tasks["noise"].changes, ablated.tasks["noise"].changes
    assert changes is not None
    assert before is not None
    assert changes.key == before.key
    assert changes.random_draws[:DRAWS] == before.random_draws


def test_only_samples_of_the_task_are_run(model: nn.Module, report: MUIReport) -> None:
    rows: list[int] = []
    probe = probe_of(model)
    with model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    ):
        ablate(probe, report, tasks=["noise"], draws=4)
    assert sum(rows) == (2 + 4) * 6


def test_key_neurons_may_be_of_other_samples(model: nn.Module, report: MUIReport) -> None:
    held_out = ablate(probe_of(model, probe_set(seed=5, n=7)), report, tasks=["answer"]).tasks["answer"]
    assert held_out.n_samples == 7
    assert held_out.changes is not None
    assert held_out.changes.difference.value > 1


def test_nothing_is_measured_where_nothing_is_key_or_nothing_is_scored(model: nn.Module) -> None:
    silent = [TokenSample(str(number), np.arange(3, 9), np.zeros(6, dtype=np.bool_)) for number in range(2)]
    samples = ProbeSet({"silent": silent, "noise": make_samples()})
    probe = probe_of(model, samples, rules="top_fraction=0.001", key_expert_frequency=1.0)
    found = ablate(probe, probe.measure(), draws=1)
    assert found.tasks["silent"].changes is None
    assert (found.tasks["silent"].n_samples, found.tasks["silent"].n_key, found.tasks["silent"].n_masked) == (0, 0, 0)
    assert found.tasks["noise"].changes is not None
    assert ablate(probe, probe.measure(), what="experts", draws=1, tasks=["silent"]).tasks["silent"].changes is None


def test_one_sample_has_no_interval(model: nn.Module, report: MUIReport) -> None:
    one = ablate(probe_of(model, probe_set(n=1)), report, tasks=["answer"]).tasks["answer"].changes
    assert one is not None
    assert one.key.value > 0
    assert one.key.interval is one.random.interval is one.difference.interval is None


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "layers"}, "what: expected one of neurons, experts, got 'layers'"),
        ({"draws": 0}, "draws: expected a positive number of random controls, got 0"),
        ({"level": 1.0}, r"level: expected a number in \(0, 1\), got 1.0"),
        ({"tasks": ["answer", "maths"]}, "expected tasks of the probe set, answer, noise, got maths"),
    ],
)
def test_arguments_have_a_range(model: nn.Module, report: MUIReport, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(probe_of(model), report, **arguments)


def test_a_report_of_something_else_is_refused(model: nn.Module, report: MUIReport) -> None:
    with pytest.raises(ValueError, match="a report of a model with the layers of this one"):
        ablate(probe_of(build("olmoe")), report)
    with pytest.raises(ValueError, match="expected tasks of the report, answer, noise, got other"):
        ablate(probe_of(model, ProbeSet({"other": make_samples()})), report)


def test_losses_that_are_not_finite_are_an_error(report: MUIReport) -> None:
    model: Any = answering_model()
    with torch.no_grad():
        model.lm_head.weight[ANSWER] = float("nan")
    message = (
        r"task 'answer', key neurons: expected finite losses, got NaN or infinity in 12 of 12 samples with nothing"
    )
    with pytest.raises(ProbeError, match=message):
        ablate(probe_of(model), report)


def test_losses_that_are_not_finite_without_key_neurons_are_an_error(report: MUIReport) -> None:
    model: Any = answering_model()
    shared = model.model.layers[1].mlp.shared_expert
    # as a model that divides by what a key neuron does
    shared.down_proj.register_forward_hook(lambda module, args, out: out / (args[0][..., KNOWN_SHARED] != 0).any())
    with pytest.raises(ProbeError, match=r"'answer', key neurons: .* with the key ones masked, first in a0"):
        ablate(probe_of(model), report)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_afterwards(report: MUIReport, fails: bool) -> None:
    model = answering_model().train()
    probe, n_calls = probe_of(model), 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if fails and n_calls == 9:
            raise RuntimeError("injected")

    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    weights = copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    config, random = dict(vars(model.config)), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="injected"):
            ablate(probe, report)
        assert n_calls == 9
    else:
        ablate(probe, report)
    handle.remove()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert vars(model.config) == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules() if "Experts" in type(module).__name__)


# Intervals


def test_intervals_resample_samples_under_all_masks_alike() -> None:
    rng, n = np.random.default_rng(0), 9
    tokens = rng.integers(1, 6, n)
    loss, key, random = rng.gamma(2, 5, n), rng.gamma(2, 8, n), rng.gamma(2, 6, (1, n))
    found = loss_changes(loss, key, random, tokens, level=0.9, seed=4)
    assert found is not None
    replicates = {"key": [], "random": [], "difference": []}
    for weights in bootstrap_weights(n, seed=4):
        for weight in weights:
            whole = sum(w * t for w, t in zip(weight, tokens, strict=True))
            of_key = sum(w * (k - b) for w, k, b in zip(weight, key, loss, strict=True)) / whole
            of_random = sum(w * (r - b) for w, r, b in zip(weight, random[0], loss, strict=True)) / whole
            for name, value in (("key", of_key), ("random", of_random), ("difference", of_key - of_random)):
                replicates[name].append(value)
    for name, values in replicates.items():
        change: LossChange = getattr(found, name)
        assert change.interval is not None
        share_below = np.mean(np.array(values) < change.interval.low)
        share_above = np.mean(np.array(values) > change.interval.high)
        assert 0.015 < share_below < 0.05  # the tails of 5 % are made longer for so few samples
        assert 0.015 < share_above < 0.05
    assert found.loss == pytest.approx(loss.sum() / tokens.sum())


def test_what_the_draws_differ_by_is_in_the_intervals() -> None:
    rng, n = np.random.default_rng(0), 9
    tokens, loss, key = rng.integers(1, 6, n), rng.gamma(2, 5, n), rng.gamma(2, 8, n)
    random = loss + tokens * np.array([[1.0], [1.2], [1.7]]) + rng.normal(size=n)
    found = loss_changes(loss, key, random, tokens, level=0.9, seed=4)
    of_mean = loss_changes(loss, key, random.mean(axis=0, keepdims=True), tokens, level=0.9, seed=4)
    assert found is not None
    assert of_mean is not None
    assert found.key == of_mean.key
    draws = [sum(draw - loss) / sum(tokens) for draw in random]
    low, high = scipy.stats.t.interval(0.9, 2, np.mean(draws), scipy.stats.sem(draws))
    for name in ("random", "difference"):
        change, over_samples = getattr(found, name), getattr(of_mean, name)
        assert change.value == pytest.approx(over_samples.value)
        below = np.hypot(change.value - over_samples.interval.low, (high - low) / 2)
        above = np.hypot(change.value - over_samples.interval.high, (high - low) / 2)
        assert (change.interval.low, change.interval.high) == pytest.approx(
            (change.value - below, change.value + above)
        )


@pytest.mark.parametrize("draws", [3, 8])
def test_the_interval_holds_what_all_random_ones_do_to_all_samples(draws: int) -> None:
    """Samples differ, draws differ, and each sample takes each draw in its own way; the mean of all is 0.5."""
    rng, n, tokens = np.random.default_rng(1), 20, np.full(20, 4)
    held = []
    for _ in range(200):
        change = 0.5 + 0.1 * rng.normal(size=n) + 0.05 * rng.normal(size=(draws, 1)) + 0.1 * rng.normal(size=(draws, n))
        loss = rng.gamma(2, 5, n)
        found = loss_changes(loss, loss, loss + 4 * change, tokens, level=0.95, seed=0)
        assert found is not None
        assert found.random.interval is not None
        held.append(found.random.interval.low < 0.5 < found.random.interval.high)
    assert np.mean(held) > 0.93


def test_samples_of_very_different_loss_that_change_alike_have_a_short_interval() -> None:
    tokens, loss = np.array([1, 2, 3, 4]), np.array([1.0, 90.0, 3.0, 400.0])
    key = loss + tokens * np.array([1.0, 1.1, 0.9, 1.0])
    found = loss_changes(loss, key, loss[None], tokens, level=0.95, seed=0)
    assert found is not None
    assert found.key.interval is not None
    assert 0.8 < found.key.interval.low < found.key.value < found.key.interval.high < 1.2
    assert found.random == LossChange(0.0, None)


def test_there_is_no_change_without_tokens() -> None:
    nothing = np.zeros(2)
    assert loss_changes(nothing, nothing, nothing[None], np.zeros(2, dtype=np.int64), level=0.95, seed=0) is None


# Several processes


def spread_losses(rank: int, directory: Path, *, name: str) -> list[FloatArray]:
    return losses_of(BACKENDS[name].build().model)


def losses_of(model: nn.Module) -> list[FloatArray]:
    """With some neurons masked, and with all of them."""
    probe = MUIProbe(model, many(), **SETTINGS)
    draw = np.random.default_rng(1).random(probe.layout.n_neurons)
    return probe.losses(
        [Trial(np.array(numbers), draw < share) for numbers, share in (([8, 1, 2, 5], 0.5), ([3], 1.0))]
    )


@pytest.mark.parametrize("name", SPREAD)
def test_several_processes_find_what_one_finds(name: str, tmp_path: Path) -> None:
    expected = losses_of(BACKENDS[name].reference())
    for found in launch(tmp_path, spread_losses, size=BACKENDS[name].size, name=name):
        for losses, whole in zip(found, expected, strict=True):
            assert losses == pytest.approx(whole, abs=1e-5)


def spread_failures(rank: int, directory: Path, *, name: str, failing: int) -> str:
    model = BACKENDS[name].build().model
    probe = MUIProbe(model, many(), **SETTINGS)
    if rank == failing:
        list(model.modules())[-1].register_forward_pre_hook(fail_in_a_forward)
    try:
        probe.losses([Trial(np.arange(9), np.zeros(probe.layout.n_neurons, dtype=np.bool_))])
    except (RuntimeError, InterruptedPassError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_in_a_forward(*args: Any) -> None:
    raise RuntimeError("injected")


def test_all_processes_fail_together(tmp_path: Path) -> None:
    told = launch(tmp_path, spread_failures, name="ddp", failing=1)
    assert told == ["ProbeError: process 1: RuntimeError: injected", "RuntimeError: injected"]


def test_processes_that_wait_for_one_that_failed_end(tmp_path: Path) -> None:
    told = launch(tmp_path, spread_failures, name="moe_k2", failing=1)
    assert [text.partition(":")[0] for text in told] == ["InterruptedPassError"] * 2
    assert "(RuntimeError: injected)" in told[1]
