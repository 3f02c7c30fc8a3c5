"""Benchmarks on the live model: what they may return, what they measure, and that training does not notice them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import ByT5Tokenizer

from backends import BACKENDS, tell_environment
from distributed_training import TOO_MUCH, dense_model, launch, moe_model, noted
from mui_callback import MUIProbe, ProbeSet
from mui_callback.benchmarks.base import scores_of
from mui_callback.benchmarks.callables import CallableBenchmark
from mui_callback.benchmarks.choices import ChoiceBenchmark
from mui_callback.benchmarks.given import Benchmarks, as_benchmarks, check_benchmarks
from mui_callback.benchmarks.names import benchmark_scalars, clean
from mui_callback.benchmarks.run import run_benchmarks
from mui_callback.benchmarks.tasks import LMEval
from mui_callback.errors import InterruptedPassError, ProbeSetError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.metrics.phases import Score
from mui_callback.metrics.resampling import Estimate
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.shards import Shards
from mui_callback.probe.unwrap import unwrapped
from tiny import VOCAB
from training import Trained, assert_same_to_the_bit, rows

N_STEPS = 3
SHORT = 2.0
"""Seconds that processes wait for others that do not come."""
Function = Callable[[nn.Module, int], Any]


def samples(n: int = 7) -> list[dict[str, Any]]:
    rng = random.Random(0)
    words = ["one", "twelve", "forty two", "a", "ünd", "nothing at all"]
    made = []
    for number in range(n):
        choices = rng.sample(words, 2 + number % 3)
        answer = rng.randrange(len(choices))
        made.append({"prompt": f"{number} is ", "response": choices[answer], "choices": choices, "answer": answer})
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def choices_file(directory: Path) -> Path:
    return write(directory / "numbers.jsonl", samples())


# What a callable may return


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_real_numbers_of_all_kinds_are_scores(value: Any) -> None:
    assert scores_of({"a": value}) == {"a": Score(float(value))}
    assert scores_of({"a": (value, value)}) == {"a": Score(float(value), float(value))}
    assert scores_of({"a": (value, None)}) == {"a": Score(float(value))}


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, TypeError, "expected a dict of names to numbers, or to pairs of .*, got None"),
        (0.5, TypeError, "got float 0.5"),
        ([("a", 1)], TypeError, "got list"),
        ({}, ValueError, "got an empty one"),
        ({1: 2.0}, TypeError, "got the name int 1"),
        ({"a": True}, TypeError, "'a': expected a number, got bool True"),
        ({"a": np.bool_(True)}, TypeError, "'a': expected a number, got bool"),
        ({"a": torch.tensor(True)}, TypeError, "'a': expected a number, got bool True"),
        ({"a": "0.5"}, TypeError, "'a': expected a number, got str '0.5'"),
        ({"a": None}, TypeError, "'a': expected a number, got None"),
        ({"a": torch.ones(1)}, TypeError, "'a': expected a number, got Tensor"),
        ({"a": 1j}, TypeError, "'a': expected a number, got complex"),
        ({"a": {"b": 1}}, TypeError, "'a': expected a number, got dict"),
        ({"a": (1, 2, 3)}, TypeError, "'a': expected a pair of a number and its standard error"),
        ({"b": 1, "a": float("nan")}, ValueError, "'a': expected a finite number, got nan"),
        ({"a": torch.tensor(float("inf"))}, ValueError, "'a': expected a finite number, got inf"),
        ({"a": (1, float("nan"))}, ValueError, r"'a \(standard error\)': expected a finite number"),
        ({"a": (1, -0.1)}, ValueError, "'a': expected a standard error of at least 0, got -0.1"),
        ({"a b": 1, "a_b": 2}, ValueError, "got 'a_b' twice"),
        ({"a": (1, 0.1), "a_stderr": 2}, ValueError, "got a_stderr next to 'a'"),
        ({"/ /": 1}, ValueError, "expected a name with letters or digits, got '/ /'"),
    ],
)
def test_what_is_no_score_is_named(returned: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        scores_of(returned)


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("arc_easy/acc", "arc_easy/acc"),
        ("exact match (strict)", "exact_match_strict"),
        ("exact_match,strict-match", "exact_match_strict-match"),
        ("/a//b c/", "a/b_c"),
        ("leaderboard: |math|v1.1", "leaderboard_math_v1.1"),
        ("größe", "größe"),
    ],
)
def test_names_are_keys_that_trackers_take(name: str, cleaned: str) -> None:
    assert clean(name) == cleaned
    assert clean(cleaned) == cleaned


def test_standard_errors_are_logged_where_they_are_known() -> None:
    assert benchmark_scalars({"a/acc": Score(0.5, 0.1), "b": Score(2.0)}) == {
        "mui/benchmark/a/acc": 0.5,
        "mui/benchmark/a/acc_stderr": 0.1,
        "mui/benchmark/b": 2.0,
    }


# What a user may give


def half(model: nn.Module, step: int) -> dict[str, float]:
    return {"value": 0.5}


class Squared:
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        return {"squared": step**2}


def test_callables_and_files_become_benchmarks(tmp_path: Path) -> None:
    path = choices_file(tmp_path)
    made = as_benchmarks([half, Squared(), str(path), {"other": path, "named!": half}], ByT5Tokenizer())
    assert [(type(one), one.name) for one in made] == [
        (CallableBenchmark, "half"),
        (CallableBenchmark, "Squared"),
        (ChoiceBenchmark, "numbers"),
        (ChoiceBenchmark, "other"),
        (CallableBenchmark, "named"),
    ]
    results, failures = run_benchmarks(made, moe_model(), 3)
    assert failures == []
    assert list(results) == [
        "value",
        "squared",
        "numbers/accuracy",
        "numbers/loss",
        "other/accuracy",
        "other/loss",
        "named/value",
    ]
    assert results["squared"].value == 9


def test_one_needs_no_list(tmp_path: Path) -> None:
    assert [one.name for one in as_benchmarks(half)] == ["half"]
    assert [one.name for one in as_benchmarks(choices_file(tmp_path), ByT5Tokenizer())] == ["numbers"]
    assert as_benchmarks([]) == ()
    (own,) = as_benchmarks(half)
    assert as_benchmarks(own) == (own,)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (3, TypeError, r"benchmarks: expected a callable \(model, step\).*, got int 3"),
        ([half, None], TypeError, "got NoneType None"),
        ({1: half}, TypeError, "got the name 1"),
        (Squared, TypeError, "got type <class"),
        ({"a": CallableBenchmark(half)}, TypeError, "expected a CallableBenchmark in a list: it names its own scores"),
        ({"a b": half, "a/b": half, "a_b": half}, ValueError, "got 'a_b' twice"),
        (["x/a.jsonl", "y/a.jsonl"], ValueError, "got 'a' twice; a mapping gives them names"),
        ({"//": half}, ValueError, "expected a name with letters or digits"),
    ],
)
def test_what_is_no_benchmark_is_named(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_benchmarks(given)
    with pytest.raises(error, match=words):
        as_benchmarks(given)


def test_without_the_harness_its_tasks_are_refused_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for make in (lambda: check_benchmarks("arc_easy"), lambda: LMEval("arc_easy"), lambda: as_benchmarks(["x.yaml"])):
        with pytest.raises(ImportError, match=r"pip install 'mui-callback\[lm-eval\]'"):
            make()


def test_a_sample_without_choices_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [*samples(2), {"response": "free text"}])
    with pytest.raises(ProbeSetError, match=r"mixed.jsonl:3 .*: expected a sample with `choices` and `answer`"):
        as_benchmarks(path, ByT5Tokenizer())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match=r"missing.jsonl: cannot read"):
        as_benchmarks(tmp_path / "missing.jsonl", ByT5Tokenizer())


# Choices


def naive_choices(model: nn.Module, lines: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Every choice by itself, with the standard errors of a mean and of a ratio of means."""
    tokenizer, right, losses, lengths = ByT5Tokenizer(), [], [], []
    for line in lines:
        per_byte = []
        for index, choice in enumerate(line["choices"]):
            ids = tokenizer(line["prompt"] + choice).input_ids
            first = len(line["prompt"].encode())  # one token for each byte
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            loss = -sum(logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids)))
            per_byte.append(loss / len(choice.encode()))
            if index == line["answer"]:
                losses.append(loss)
                lengths.append(len(ids) - first)
        right.append(float(min(range(len(per_byte)), key=per_byte.__getitem__) == line["answer"]))
    n, p = len(lines), sum(right) / len(lines)
    loss = sum(losses) / sum(lengths)
    residuals = [own - loss * length for own, length in zip(losses, lengths, strict=True)]
    spread = (n / (n - 1) * sum(r**2 for r in residuals)) ** 0.5 / sum(lengths)
    return {"numbers/accuracy": (p, (p * (1 - p) / (n - 1)) ** 0.5), "numbers/loss": (loss, spread)}


@pytest.mark.parametrize("make", [moe_model, dense_model])
@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_choices_are_scored_as_in_a_naive_loop(make: Any, batch_tokens: int, tmp_path: Path) -> None:
    model = make().eval()
    made = as_benchmarks(choices_file(tmp_path), ByT5Tokenizer(), batch_tokens=batch_tokens)
    results, failures = run_benchmarks(made, model.train(), 0)
    assert failures == []
    expected = naive_choices(model.eval(), samples())
    assert results.keys() == expected.keys()
    for name, (value, error) in expected.items():
        assert isinstance(results[name], Estimate)
        assert results[name].value == pytest.approx(value, rel=1e-5)
        assert results[name].standard_error == pytest.approx(error, rel=1e-4)
    assert 0 < results["numbers/accuracy"].value < 1


def test_the_accuracy_is_that_of_a_probe(tmp_path: Path) -> None:
    path, model = choices_file(tmp_path), moe_model()
    results, _ = run_benchmarks(as_benchmarks(path, ByT5Tokenizer()), model, 0)
    report = MUIProbe(model, ProbeSet.from_jsonl(path), tokenizer=ByT5Tokenizer()).measure()
    assert results["numbers/accuracy"].value == report.scalars()["mui/choice_accuracy"]


def test_a_single_sample_has_no_standard_error(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", samples(1))
    results, _ = run_benchmarks(as_benchmarks(path, ByT5Tokenizer()), moe_model(), 0)
    assert [point.standard_error for point in results.values()] == [None, None]
    assert list(benchmark_scalars(results)) == ["mui/benchmark/one/accuracy", "mui/benchmark/one/loss"]


def test_a_model_that_is_nan_has_no_accuracy(tmp_path: Path) -> None:
    model = moe_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    results, failures = run_benchmarks(as_benchmarks(choices_file(tmp_path), ByT5Tokenizer()), model, 0)
    assert results == {}
    assert str(failures[0]).startswith("benchmark 'numbers': ProbeError: the loss of 20 of 20 choices is NaN")


def test_out_of_memory_halves_the_batches_once_and_for_all(tmp_path: Path) -> None:
    model, sizes = moe_model(), []
    made = as_benchmarks(choices_file(tmp_path), ByT5Tokenizer())
    expected, _ = run_benchmarks(made, model, 0)

    def exhaust(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].numel())
        if sizes[-1] > 100:
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    model.register_forward_pre_hook(exhaust, with_kwargs=True)
    with pytest.warns(UserWarning, match=r"MUI: out of memory in benchmark 'numbers'; going on with batches of \d+"):
        results, failures = run_benchmarks(made, model, 1)
    assert failures == []
    for name, point in results.items():
        assert point.value == pytest.approx(expected[name].value, rel=1e-5)
    too_large = sum(size > 100 for size in sizes)
    run_benchmarks(made, model, 2)
    assert sum(size > 100 for size in sizes) == too_large > 0


def test_out_of_memory_with_single_samples_gives_up(tmp_path: Path) -> None:
    model = moe_model()
    made = as_benchmarks(choices_file(tmp_path), ByT5Tokenizer())
    handle = model.register_forward_pre_hook(lambda *_: torch.empty(TOO_MUCH, dtype=torch.uint8) and None)
    with pytest.warns(UserWarning, match="out of memory"):
        results, failures = run_benchmarks(made, model, 0)
    assert results == {}
    assert "can't allocate memory" in str(failures[0])
    handle.remove()
    assert run_benchmarks(made, model, 1)[1] == []


# Without a trace


def train(benchmarks: Benchmarks, directory: Path) -> tuple[Trained, list[str]]:
    """A loop with dropout, and what it is told of failures at each step."""
    model = moe_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    made = as_benchmarks(benchmarks, ByT5Tokenizer())
    batches = torch.stack([row["input_ids"] for row in rows(4 * N_STEPS)]).split(4)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    losses, told = [], []
    for step, batch in enumerate(batches, start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        told += [str(failure) for failure in run_benchmarks(made, model, step)[1]]
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item(), random.random(), np.random.rand()]  # noqa: NPY002
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = optimizer.state_dict()["state"].values()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained(weights, [v for entry in state for v in entry.values()], losses, torch.get_rng_state()), told


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train([], tmp_path_factory.mktemp("without"))[0]


def run_it(model: nn.Module, step: int) -> dict[str, float]:
    """As a user would."""
    ids = torch.arange(3, 23).view(2, 10)
    return {"loss": model(input_ids=ids, labels=ids).loss}


def raise_it(model: nn.Module, step: int) -> dict[str, float]:
    torch.rand(1)
    raise RuntimeError("injected")


def print_it(model: nn.Module, step: int) -> dict[str, float]:
    print(f"at step {step}")
    return {"a": step}


def stay_in_train_mode(model: nn.Module, step: int) -> dict[str, float]:
    assert not any(module.training for module in model.modules())
    model.train()
    model.model.layers[0].eval()
    return run_it(model, step)


def move_random_states(model: nn.Module, step: int) -> dict[str, float]:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    return {"a": torch.rand(()), "b": random.random()}


def make_gradients(model: nn.Module, step: int) -> dict[str, float]:
    assert not torch.is_grad_enabled()
    ids = torch.arange(3, 23).view(2, 10)
    with torch.enable_grad():
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None
    return {"norm": model.lm_head.weight.grad.norm()}


def clear_gradients(model: nn.Module, step: int) -> dict[str, float]:
    model.zero_grad()
    model.requires_grad_(False)
    return run_it(model, step)


def change_the_config(model: nn.Module, step: int) -> dict[str, float]:
    model.config.use_cache = not model.config.use_cache
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.register_forward_hook(lambda module, args, output: None)
    return run_it(model, step)


@pytest.mark.parametrize(
    "function",
    [
        run_it,
        print_it,
        stay_in_train_mode,
        move_random_states,
        make_gradients,
        clear_gradients,
        change_the_config,
    ],
)
def test_what_a_callable_does_leaves_no_trace(function: Function, without: Trained, tmp_path: Path) -> None:
    trained, told = train(function, tmp_path)
    assert told == []
    assert_same_to_the_bit(without, trained)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (raise_it, "RuntimeError: injected"),
        (lambda model, step: {"a": float("nan")}, "ValueError: 'a': expected a finite number, got nan"),
        (lambda model, step: None, "TypeError: expected a dict of names to numbers"),
        (lambda model: {"a": 1}, "TypeError: "),
    ],
)
def test_a_callable_that_fails_leaves_no_trace(
    function: Function, error: str, without: Trained, tmp_path: Path
) -> None:
    trained, told = train({"mine": function}, tmp_path)
    assert len(told) == N_STEPS
    assert all(message.startswith(f"benchmark 'mine': {error}") for message in told)
    assert_same_to_the_bit(without, trained)


def test_choices_leave_no_trace(without: Trained, tmp_path: Path) -> None:
    trained, told = train(choices_file(tmp_path), tmp_path)
    assert told == []
    assert_same_to_the_bit(without, trained)


def test_the_comparison_can_fail(without: Trained, tmp_path: Path) -> None:
    def careless(model: nn.Module, step: int) -> dict[str, float]:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3
        return {"a": 1}

    trained, told = train(careless, tmp_path)
    assert all("wrote to parameters, which cannot be undone: lm_head.weight" in message for message in told)
    assert len(told) == N_STEPS
    with pytest.raises(AssertionError):
        assert_same_to_the_bit(without, trained)


@pytest.mark.parametrize("act", ["flip", "swap", "rows", "raise", "half"])
def test_writing_past_the_counter_of_versions_is_noticed(act: str) -> None:
    def write_data(model: nn.Module, step: int) -> dict[str, float]:
        weight = model.lm_head.weight
        if act == "flip":
            weight.data[0, 0] *= -1
        if act == "swap":  # the same bits, elsewhere
            weight.data[0, :2] = weight.data[0, :2].flip(0)
        if act == "rows":
            weight.data[[0, 3]] = weight.data[[3, 0]]
        if act == "raise":
            weight.data[0, 0] += 1
            raise RuntimeError("the harness broke")
        if act == "half":
            weight.data = weight.data.half()
        return {"a": 1}

    results, failures = run_benchmarks(as_benchmarks(write_data), moe_model(), 0)
    assert results == {}
    assert "wrote to parameters, which cannot be undone: lm_head.weight" in str(failures[0])
    assert ("RuntimeError: the harness broke" in str(failures[0])) == (act == "raise")


def test_what_a_callable_prints_is_its_own_affair(capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmarks(as_benchmarks(print_it), moe_model(), 4)
    assert capsys.readouterr().out == "at step 4\n"


def test_a_failure_harms_no_other_benchmark(tmp_path: Path) -> None:
    made = as_benchmarks(
        [raise_it, half, {"again": half}, lambda model, step: {"value": 1}, choices_file(tmp_path)], ByT5Tokenizer()
    )
    results, failures = run_benchmarks(made, moe_model(), 0)
    assert list(results) == ["value", "again/value", "numbers/accuracy", "numbers/loss"]
    assert results["value"].value == 0.5
    assert [str(failure) for failure in failures] == [
        "benchmark 'raise_it': RuntimeError: injected",
        f"benchmark '{made[3].name}': ValueError: expected names that differ, but another benchmark has 'value' too",
    ]
    assert isinstance(failures[0].error, RuntimeError)
    assert failures[0].error.__traceback__ is not None


class Engine(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [Engine, torch.compile, lambda model: model])
def test_a_callable_gets_the_model_itself(wrap: Any) -> None:
    model, got = moe_model().train(), []

    def note(given: nn.Module, step: int) -> dict[str, float]:
        got.append((given, step, given.training, torch.is_grad_enabled()))
        return {"a": 1}

    run_benchmarks(as_benchmarks(note), wrap(model), 7)
    assert got == [(model, 7, False, False)]


def test_an_interrupt_is_passed_on() -> None:
    def interrupt(model: nn.Module, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    model = moe_model().train()
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks(as_benchmarks(interrupt), model, 0)
    assert model.training


# In two processes


def fail_in_one(model: nn.Module, step: int) -> dict[str, float]:
    if torch.distributed.get_rank() == 1 and step == 2:
        raise RuntimeError("injected")
    return run_it(model, step)


def only_in_the_main_one(model: nn.Module, step: int) -> Any:
    return {"rank": 7 * step} if torch.distributed.get_rank() == 0 else None


def train_together(rank: int, directory: Path, *, is_measured: bool = True, path: Path | None = None) -> dict[str, Any]:
    """With DDP, each process with its own data and dropout."""
    model = DistributedDataParallel(moe_model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = [path, {"fails": fail_in_one, "main": only_in_the_main_one}] if is_measured else []
    made = as_benchmarks(given, ByT5Tokenizer())
    processes, passes, seen = Processes(), [], []
    shards = Shards.of(model.module, exchanges_tokens=False)
    model.module.register_forward_pre_hook(lambda module, args: None if module.training else passes.append(1))
    torch.manual_seed(rank)
    losses = []
    for step, batch in enumerate(torch.stack([row["input_ids"] for row in rows(4 * N_STEPS, seed=rank)]).split(4), 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        results, failures = run_benchmarks(made, model, step, processes=processes, shards=shards)
        seen.append((benchmark_scalars(results), [str(failure) for failure in failures]))
        weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        if step == 1:
            first = weights
    state = optimizer.state_dict()["state"].values()
    trained = Trained(weights, [v for entry in state for v in entry.values()], losses, torch.get_rng_state())
    return {"trained": trained, "seen": seen, "passes": len(passes), "first": first}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("together")
    return launch(directory, train_together, path=choices_file(directory))


def test_training_of_two_is_the_same_to_the_bit(together: list[dict[str, Any]], tmp_path: Path) -> None:
    for seen, without in zip(together, launch(tmp_path, train_together, is_measured=False), strict=True):
        assert_same_to_the_bit(without["trained"], seen["trained"])


def test_both_have_the_same_results_and_those_of_one(together: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = (one["seen"] for one in together)
    assert [scalars for scalars, _ in first] == [scalars for scalars, _ in second]
    assert [scalars["mui/benchmark/main/rank"] for scalars, _ in first] == [7, 14, 21]
    model = moe_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(together[0]["first"][name])
    alone, _ = run_benchmarks(as_benchmarks(choices_file(tmp_path), ByT5Tokenizer()), model, 1)
    for key, value in benchmark_scalars(alone).items():
        assert first[0][0][key] == pytest.approx(value, rel=1e-5)


def test_one_that_fails_in_one_fails_in_both(together: list[dict[str, Any]]) -> None:
    told = [[failures for _, failures in one["seen"]] for one in together]
    assert told[0] == [[], ["benchmark 'fails': ProbeError: process 1: RuntimeError: injected"], []]
    assert told[1] == [[], ["benchmark 'fails': RuntimeError: injected"], []]
    for one in together:
        for step, (scalars, _) in enumerate(one["seen"], start=1):
            assert ("mui/benchmark/fails/loss" in scalars) == (step != 2)
            assert "mui/benchmark/numbers/accuracy" in scalars
            assert "mui/benchmark/main/rank" in scalars


def choose_with_other_samples(rank: int, directory: Path, *, fails: str) -> list[str]:
    """What goes wrong in the choices of process 1 only."""
    lines = samples(7 - rank) if fails == "samples" else samples()
    made = as_benchmarks([write(directory / f"numbers-{rank}.jsonl", lines), half], ByT5Tokenizer())
    made[0].name = "numbers"
    model = moe_model()
    if fails == "encoding" and rank == 1:
        made[0].tokenizer = lambda text: [VOCABULARY_END]
    if fails == "forward" and rank == 1:
        model.register_forward_pre_hook(lambda *_: torch.empty(TOO_MUCH, dtype=torch.uint8) and None)
    shards = Shards.of(model, exchanges_tokens=False)
    results, failures = run_benchmarks(made, model, 0, processes=Processes(), shards=shards)
    assert list(results) == ["value"]
    return [str(failure) for failure in failures]


VOCABULARY_END = 10**6


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("samples", "expected one set of samples of a benchmark in all processes, got another one in process 1"),
        ("encoding", "expected token ids below the model's vocabulary size"),
        ("forward", "can't allocate memory"),
    ],
)
def test_choices_that_fail_in_one_fail_in_both(fails: str, words: str, tmp_path: Path) -> None:
    for rank, told in enumerate(launch(tmp_path, choose_with_other_samples, fails=fails)):
        (message,) = told
        assert words in message
        assert ("ProbeError: process 1: " in message) == (rank == 0)


def measure_spread(rank: int, directory: Path, *, path: Path, fails: str = "") -> dict[str, Any]:
    """With weights that FSDP2 has spread over the processes."""
    tell_environment()
    model = BACKENDS["fsdp2"].build().model

    def before_a_forward(given: nn.Module, step: int) -> dict[str, float]:
        if rank == 1 or fails == "both":
            raise RuntimeError("injected")
        return run_it(given, step)

    made = as_benchmarks([path, before_a_forward if fails else run_it], ByT5Tokenizer())
    shards = Shards.of(model, exchanges_tokens=False)
    seen: Any = type("Seen", (), {"error": None, "warnings": []})()
    found: Any = ({}, [])
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    with noted(seen):
        processes = Processes(timedelta(seconds=SHORT)) if fails == "one" else Processes()
        found = run_benchmarks(made, model, 1, processes=processes, shards=shards)
    is_as_before = all(
        torch.equal(own, parameter.to_local()) for own, parameter in zip(before, model.parameters(), strict=True)
    )
    told = [str(failure) for failure in found[1]]
    return {"scalars": benchmark_scalars(found[0]), "told": told, "error": seen.error, "is as before": is_as_before}


def test_a_spread_model_is_measured_in_step(tmp_path: Path) -> None:
    path = choices_file(tmp_path)
    first, second = launch(tmp_path / "launch", measure_spread, path=path)
    assert first == second
    assert first["error"] is None
    assert first["told"] == []
    assert first["is as before"]
    alone, _ = run_benchmarks(as_benchmarks([path, run_it], ByT5Tokenizer()), BACKENDS["fsdp2"].reference(), 1)
    assert first["scalars"] == pytest.approx(benchmark_scalars(alone), rel=1e-4)


def train_spread(rank: int, directory: Path, *, name: str, path: Path | None = None) -> list[float]:
    """Losses, with benchmarks between the steps or without."""
    tell_environment()
    trainee = BACKENDS[name].build()
    made = as_benchmarks([] if path is None else [path, run_it], ByT5Tokenizer())
    model = unwrapped(trainee.model)
    exchanges_tokens = any(not layer.peers.is_alone for layer in find_expert_layers(model))
    shards, processes = Shards.of(model, exchanges_tokens=exchanges_tokens), Processes()
    losses = []
    for step in range(N_STEPS):
        _, failures = run_benchmarks(made, trainee.model, step, processes=processes, shards=shards)
        assert failures == []
        tokens = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(10 * rank + step))
        losses.append(trainee.train_step(tokens))
    return losses


@pytest.mark.parametrize("name", ["fsdp2", "zero3", "autoep"])
def test_training_of_a_spread_model_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    without = launch(tmp_path / "without", train_spread, name=name)
    assert launch(tmp_path / "with", train_spread, name=name, path=choices_file(tmp_path)) == without
    assert without[0][0] != without[0][-1]


def test_one_that_fails_alike_in_all_harms_nobody(tmp_path: Path) -> None:
    path = choices_file(tmp_path)
    for seen in launch(tmp_path / "launch", measure_spread, path=path, fails="both"):
        assert seen["error"] is None
        assert "RuntimeError: injected" in seen["told"][0]
        assert "mui/benchmark/numbers/loss" in seen["scalars"]


def test_one_that_leaves_the_others_in_a_forward_pass_ends_all(tmp_path: Path) -> None:
    seen = launch(tmp_path / "launch", measure_spread, path=choices_file(tmp_path), fails="one")
    assert [one["error"].partition(":")[0] for one in seen] == [InterruptedPassError.__name__] * 2
    assert "failed in a benchmark (RuntimeError: injected), and the others did not come" in seen[1]["error"]
