"""The controlled study of the examples: what differs between its models, and that its numbers can be believed."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from scipy import stats

from mui_callback.demo.model import build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.controlled_study.__main__ import study
from examples.controlled_study.comparison import Mean, in_words, mean, paired
from examples.controlled_study.results import MEAN, Results
from examples.controlled_study.summary import causal_lines, contrasts
from examples.controlled_study.training import METRICS, POOLED, QUICK, run_path
from examples.controlled_study.variants import (
    EXPERT_WIDTH,
    N_ACTIVE,
    N_LAYERS,
    VARIANTS,
    WIDTH,
    Variant,
    active_parameters,
    build_model,
)

SEEDS = 2
TASKS = ("english", "code", "arithmetic")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def make(output: Path) -> tuple[Results, str]:
    said = StringIO()
    return study(output, QUICK, seeds=SEEDS, jobs=1, console=Console(file=said, width=200)), said.getvalue()


@pytest.fixture(scope="module")
def made(output: Path) -> tuple[Results, str]:
    return make(output)


def stored(output: Path, variant: Variant, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_path(output, variant, seed).read_text())
    return found


# The models


def weights(variant: Variant, tokenizer: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(build_model(variant, tokenizer, seed).named_parameters())


@pytest.mark.parametrize("n_experts", [8, 16])
def test_two_variants_differ_only_in_that_the_last_expert_is_shared(n_experts: int, tokenizer: Any) -> None:
    routed, shared = (weights(Variant(n_experts, has), tokenizer) for has in (False, True))
    assert not routed.keys() - shared.keys()
    assert all(".shared_mlp." in name for name in shared.keys() - routed.keys())
    for name, weight in routed.items():
        own = shared[name]
        if "block_sparse_moe" in name:  # the router and the experts
            assert len(own) == len(weight) - 1 == n_experts - 1
            torch.testing.assert_close(own, weight[:-1], rtol=0, atol=0)
        else:
            torch.testing.assert_close(own, weight, rtol=0, atol=0)
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}"
        for own, last in (
            (f"{block}.shared_mlp.input_linear.weight", f"{block}.block_sparse_moe.experts.gate_up_proj"),
            (f"{block}.shared_mlp.output_linear.weight", f"{block}.block_sparse_moe.experts.down_proj"),
        ):
            torch.testing.assert_close(shared[own], routed[last][-1], rtol=0, atol=0)


def test_more_experts_are_added_to_the_same_ones(tokenizer: Any) -> None:
    few, many = (weights(Variant(n, False), tokenizer) for n in (8, 16))
    assert few.keys() == many.keys()
    for name, weight in few.items():
        torch.testing.assert_close(weight, many[name][: len(weight)], rtol=0, atol=0)


def test_another_seed_has_other_weights(tokenizer: Any) -> None:
    one, other = (weights(VARIANTS[0], tokenizer, seed) for seed in (0, 1))
    assert all(not torch.equal(one[name], other[name]) for name in one if "norm" not in name)
    values = torch.cat([one[name].detach().flatten() for name in one if "norm" not in name])
    assert abs(float(values.mean())) < 1e-4
    assert float(values.std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.slug)
def test_a_token_passes_three_experts_of_each_layer(variant: Variant, tokenizer: Any) -> None:
    model = build_model(variant, tokenizer, seed=0)
    of_experts = sum(
        weight.numel() for name, weight in model.named_parameters() if ".experts." in name or ".shared_mlp." in name
    )
    an_expert = 3 * WIDTH * EXPERT_WIDTH
    assert of_experts == N_LAYERS * variant.n_experts * an_expert
    routers = N_LAYERS * variant.n_routed * WIDTH
    others = model.num_parameters() - of_experts - routers
    assert active_parameters(model, variant) == others + routers + N_LAYERS * N_ACTIVE * an_expert

    ran: list[int] = []
    for layer in model.model.layers:
        layer.block_sparse_moe.experts.register_forward_pre_hook(lambda _, inputs: ran.append(inputs[1].shape[-1]))
        if variant.has_shared:
            layer.shared_mlp.register_forward_hook(lambda *_: ran.append(1))
    model(input_ids=torch.arange(5)[None])
    assert sum(ran) == N_LAYERS * N_ACTIVE


# The runs


def test_every_run_probe_and_task_has_a_row(made: tuple[Results, str], output: Path) -> None:
    table = parquet.read_table(output / "results.parquet").to_pylist()
    found = [(row["n_experts"], row["has_shared"], row["seed"], row["step"], row["task"]) for row in table]
    wanted = product((8, 16), (False, True), range(SEEDS), QUICK.probe_steps, (*TASKS, POOLED))
    assert sorted(found) == sorted(wanted)
    for row in table:
        for metric in (*METRICS, "shared_on_top"):
            is_there = {
                "choice_accuracy": row["task"] in ("arithmetic", POOLED),
                "loss": True,
            }.get(metric, not metric.startswith("shared_") or row["has_shared"])
            if metric not in ("key_expert_mui", "routing_rank_correlation"):  # which may have no answer
                assert (row[metric] is not None) == is_there, (metric, row)
    ends = [row["loss"] for row in table if row["task"] == POOLED and row["step"] == QUICK.steps]
    starts = [row["loss"] for row in table if row["task"] == POOLED and row["step"] == 0]
    assert max(ends) < min(starts)


def test_every_mask_has_a_row(made: tuple[Results, str], output: Path) -> None:
    table = parquet.read_table(output / "causal.parquet").to_pylist()
    masks = [("neurons", "key"), ("neurons", "random")]
    masks += [("one expert a layer", masked) for masked in ("most activated", "most routed to", "random", "shared")]
    for variant, seed, task, (what, masked) in product(VARIANTS, range(SEEDS), TASKS, masks):
        found = [
            row
            for row in table
            if (row["variant"], row["seed"], row["task"]) == (variant.name, seed, task)
            and (row["what"], row["masked"]) == (what, masked)
        ]
        assert len(found) == (variant.has_shared or masked != "shared")
        for row in found:
            assert math.isfinite(row["change"])
            if what != "neurons":
                assert row["n_masked"] == N_LAYERS * EXPERT_WIDTH
    by_task = {(row["variant"], row["seed"], row["task"], row["loss"]) for row in table}
    assert len(by_task) == len(VARIANTS) * SEEDS * len(TASKS)  # nothing masked: the same loss in all checks


def test_variants_see_the_same_data_in_the_same_order(made: tuple[Results, str], output: Path) -> None:
    digests = [{stored(output, variant, seed)["data"] for variant in VARIANTS} for seed in range(SEEDS)]
    assert all(len(one) == 1 for one in digests)
    assert digests[0] != digests[1]


def test_what_is_missing_is_run_again_with_the_same_outcome(made: tuple[Results, str], output: Path) -> None:
    before, said = made
    lost = [(VARIANTS[0], 1), (VARIANTS[3], 0)]
    for variant, seed in lost:
        assert f"{variant.name}, seed {seed}: loss" in said
        run_path(output, variant, seed).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (output / "runs").iterdir()}
    again, said = make(output)
    assert again.rows == before.rows
    assert again.causal == before.causal
    assert len(re.findall(r", seed \d: loss", said)) == len(lost)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(list((output / "runs").iterdir())) == len(VARIANTS) * SEEDS


def test_runs_with_other_settings_are_not_mixed(made: tuple[Results, str], output: Path) -> None:
    with pytest.raises(ValueError, match="choose another output directory"):
        study(output, replace(QUICK, steps=13), seeds=SEEDS, jobs=1, console=Console(quiet=True))


def test_the_pictures_are_drawn(made: tuple[Results, str], output: Path) -> None:
    for name in ("trajectories", "causal", "phases"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# The comparison


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_paired_interval_is_that_of_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    first, second = rng.normal(3, 1, n), rng.normal(0, 2, n)
    seeds = rng.permutation(n).tolist()
    found = paired(
        {seed: first[seed] for seed in seeds}, {**{seed: second[seed] for seed in range(n)}, 99: 1e6}, level=0.9
    )
    wanted = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.n == n


def test_a_mean_is_that_of_a_naive_loop() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    center = sum(values) / 4
    variance = sum((value - center) ** 2 for value in values) / 3
    reach = stats.t.ppf(0.975, 3) * math.sqrt(variance / 4)
    found = mean(values)
    assert (found.value, found.low, found.high) == pytest.approx((center, center - reach, center + reach))
    assert math.isnan(mean([1.0]).reach)
    with pytest.raises(ValueError, match="a seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_a_difference_is_told_only_where_there_is_one() -> None:
    assert in_words(Mean(2.0, 0.5, 5), "points") == "is higher by 1.50 to 2.50 points, 5 seeds"
    assert in_words(Mean(-2.0, 0.5, 5), "points") == "is lower by 1.50 to 2.50 points, 5 seeds"
    assert in_words(Mean(0.25, 0.5, 3)) == "cannot be told apart (-0.25 to +0.75), 3 seeds"
    assert in_words(Mean(0.25, math.nan, 1), "nats") == "differs by +0.25 nats; one seed does not tell"


def test_variants_are_compared_seed_by_seed() -> None:
    """The seeds differ by far more than the variants, which differ by 0.01 and a little."""
    rows, causal = [], []
    for variant, seed, task in product(VARIANTS, (2, 0, 1), TASKS):
        value = seed + 0.01 * variant.has_shared + 1e-4 * seed * variant.n_experts / 8
        own = {"variant": variant.name, "seed": seed, "task": task}
        rows.append({**own, "step": 7, **dict.fromkeys(METRICS, None), "shared_on_top": None, "mui": value})
        for masked in ("key", "random"):
            change = value + (0.5 + 0.001 * seed if masked == "key" else 0.0)
            causal.append({**own, "what": "neurons", "masked": masked, "change": change})
    results = Results(rows, causal, seconds=0.0)
    assert results.of("mui", VARIANTS[0], 7, MEAN) == pytest.approx({0: 0.0, 1: 1.0001, 2: 2.0002})
    lines = list(contrasts(results))
    assert "a shared expert, of 8: MUI is higher by 1.00 to 1.00 points, 3 seeds" in lines
    assert len(lines) == 4
    assert all("is higher by 0.499 to 0.503 nats, 3 seeds" in line for line in causal_lines(results))
