"""Phases in a training: what they are called from, what is logged, and that a run that goes on calls the same."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer

from asked import Loop, merged, phases, steps_done
from integrations import make_model
from mui_callback import MUIReport, ProbeSet
from mui_callback.metrics.catalogue import CATALOGUE, Scope
from mui_callback.metrics.phases import PhaseRule, Score, call_phase
from mui_callback.monitoring.performance_axis import score_of
from tiny_samples import make_samples

RULE: dict[str, Any] = {"phase_window": 3, "phase_level": 0.01}


def quiz(n: int = 5) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    words = ["one", "twelve", "forty two", "nothing at all"]
    return [
        {"prompt": f"{i} is ", "response": words[i % 4], "choices": words, "answer": i % 4, "id": str(rng.integers(9))}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    directory = tmp_path_factory.mktemp("phases")
    trained = Loop(directory, **RULE).train(range(1, 9))
    trained.monitor.close()
    trained.record = [json.loads(line) for line in (directory / "mui.jsonl").read_text().splitlines()][1:]
    return trained


def test_each_point_is_called_from_the_last_ones(loop: Loop) -> None:
    """Without what is kept for it: from the reports themselves."""
    assert loop.steps == [0, 2, 4, 6, 8]
    for number, point in enumerate(loop.memory.points):
        assert list(point.phases) == [None, "a", "b"]
        last = loop.memory.points[max(0, number - 2) : number + 1]
        for task, found in point.phases.items():
            losses = [one.report.estimate("loss", task) for one in last]
            expected = call_phase(
                [one.step for one in last],
                [loss.over(-1.0) for loss in losses],
                [one.report.estimate("mui", task) for one in last],
                PhaseRule(3, 0.01),
            )
            assert (found.call.phase, found.call.reason) == (expected.phase, expected.reason)
            assert (found.call.first_step, found.call.last_step) == (expected.first_step, expected.last_step)
            assert found.point.axis == "-loss"
            for axis in ("performance", "mui"):
                mine, theirs = getattr(found.call, axis), getattr(expected, axis)
                assert (mine is None) == (theirs is None) == (number < 2)
                if mine is not None:
                    assert vars(mine) == pytest.approx(vars(theirs), rel=1e-5)
    assert {point.phases[None].call.phase.value for point in loop.memory.points[2:]} != {"undecided"}


def test_the_code_is_logged_and_the_record_says_why(loop: Loop) -> None:
    for point, line in zip(loop.memory.points, loop.record, strict=True):
        for task, found in point.phases.items():
            of_task = line["pooled"] if task is None else line["tasks"][task]
            key = "mui/phase" if task is None else f"mui/{task}/phase"
            assert line["scalars"][key] == point.scalars[key] == found.call.phase.code
            stored = of_task["phase"]
            assert stored["phase"] == found.call.phase.value
            assert (stored["reason"], stored["first_step"]) == (found.call.reason, found.call.first_step)
            if point.step >= 4:
                assert stored["mui"]["low"] <= stored["mui"]["slope"] <= stored["mui"]["high"]
                assert stored["performance"]["standard_error"] >= 0
            else:
                assert (stored["phase"], stored["mui"]) == ("undecided", None)


def test_a_default_run_with_three_tasks_has_at_most_sixty_keys() -> None:
    per_task = sum(metric.scope.is_per_task for metric in CATALOGUE if metric.scope is not Scope.END)
    scopes = (Scope.TASK, Scope.PHASE, Scope.POOLED, Scope.PROBE)
    assert sum(metric.scope in scopes for metric in CATALOGUE) + 3 * per_task + 1 <= 60  # one more: the overhead


def test_what_changes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mui_callback"):
        loop = Loop(tmp_path, **RULE, benchmarks=steps_done).train(range(1, 9))
    said = [message for message in caplog.messages if " from " in message and " at step " in message]
    expected = []
    for task in (None, "a", "b"):
        before = "undecided"
        for (step, of_task), phase in phases(loop.memory).items():
            if of_task == task and phase["phase"] != before:
                who = "all tasks" if task is None else f"task {task!r}"
                expected.append((step, f"MUI: {who} from {before} to {phase['phase']} at step {step}"))
                before = phase["phase"]
    assert expected
    assert sorted(message.partition(" (")[0] for message in said) == sorted(words for _, words in expected)


# What performance is


def test_a_score_with_the_name_of_the_task_is_its_performance(tmp_path: Path) -> None:
    loop = Loop(tmp_path, **RULE, benchmarks=steps_done).train(range(1, 5))
    last = loop.memory.points[-1]
    assert {task: one.point.axis for task, one in last.phases.items()} == {
        None: "-loss",
        "a": "benchmark/a",
        "b": "-loss",
    }
    assert last.phases["a"].point.performance == Score(4.0)
    assert last.phases["a"].call.performance.slope == pytest.approx(1)
    assert last.phases["a"].call.performance.direction == 1


def test_a_score_that_is_given_is_the_performance(tmp_path: Path) -> None:
    def losses(model: nn.Module, step: int) -> dict[str, float]:
        return {"own": 3.0 * step, "error": 2.0 * step}

    given = {None: "own", "b": "-error", "a": "nothing"}
    with pytest.warns(UserWarning, match="no score 'nothing' of a benchmark.*performance of 'a'; there are own, error"):
        loop = Loop(tmp_path, **RULE, benchmarks=losses, performance=given).train(range(1, 5))
    last = loop.memory.points[-1]
    assert [one.point.axis for one in last.phases.values()] == ["benchmark/own", "-loss", "-benchmark/error"]
    assert last.phases[None].call.performance.slope == pytest.approx(3)
    assert last.phases["b"].call.performance.slope == pytest.approx(-2)


def test_where_all_samples_have_choices_their_accuracy_is_the_performance(tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz())))
    samples = ProbeSet.from_jsonl(tmp_path / "quiz.jsonl") | ProbeSet({"text": make_samples(3)})
    loop = Loop(tmp_path, probe_set=samples, tokenizer=ByT5Tokenizer(), **RULE)
    (point,) = loop.memory.points
    assert {task: one.point.axis for task, one in point.phases.items()} == {
        None: "-loss",  # not all of all
        "quiz": "choice_accuracy",
        "text": "-loss",
    }
    assert point.phases["quiz"].point.performance.value == point.scalars["mui/quiz/choice_accuracy"]
    assert point.phases["text"].point.performance.value == -point.scalars["mui/text/loss"]


@pytest.mark.parametrize(
    ("task", "results", "expected"),
    [
        ("arc", ["arc/acc", "arc/acc_norm", "arc/loss"], "arc/acc_norm"),
        ("arc", ["arc/acc", "arc/accuracy", "arc"], "arc"),
        ("arc", ["arc/accuracy", "arc/acc"], "arc/accuracy"),
        ("arc", ["arc/loss", "arc/perplexity", "arc_easy/acc"], None),
        ("gsm8k", ["gsm8k/exact_match_strict-match", "gsm8k/exact_match_flexible"], "gsm8k/exact_match_strict-match"),
        ("a b!", ["a_b/acc"], "a_b/acc"),
        (None, ["acc", "arc"], None),
    ],
)
def test_which_score_belongs_to_a_task(task: str | None, results: list[str], expected: str | None) -> None:
    assert score_of(task, {}, dict.fromkeys(results, Score(1.0))) == expected


def test_a_score_that_is_given_counts_only_where_it_is_there() -> None:
    results = {"x": Score(1.0), "arc": Score(2.0)}
    assert score_of("arc", {"arc": "-x"}, results) == "-x"
    assert score_of("arc", {"arc": "y"}, results) is None
    assert score_of(None, {None: "x"}, results) == "x"


def test_between_two_runs_of_a_benchmark_its_task_has_no_phase(tmp_path: Path) -> None:
    loop = Loop(tmp_path, **RULE, every=1, benchmarks=steps_done, benchmarks_every=3).train(range(1, 8))
    assert loop.steps == list(range(8))
    assert [point.step for point in loop.memory.points if "a" in point.phases] == [0, 3, 6]
    assert [point.step for point in loop.memory.points if "b" in point.phases] == list(range(8))
    last = loop.memory.points[6].phases["a"].call
    assert (last.first_step, last.last_step, last.performance.slope) == (0, 6, pytest.approx(1))


def test_where_the_score_fails_for_good_the_window_begins_anew_with_the_loss(tmp_path: Path) -> None:
    def fails_later(model: nn.Module, step: int) -> dict[str, float]:
        if step > 2:
            raise RuntimeError("injected")
        return {"a": step}

    with pytest.warns(UserWarning, match="injected"):
        loop = Loop(tmp_path, **RULE, every=1, benchmarks=fails_later).train(range(1, 9))
    of_a = {point.step: point.phases["a"] for point in loop.memory.points if "a" in point.phases}
    assert {step: one.point.axis for step, one in of_a.items()} == {
        **dict.fromkeys([0, 1, 2], "benchmark/a"),
        **dict.fromkeys([5, 6, 7, 8], "-loss"),
    }
    assert [of_a[step].call.first_step for step in (5, 6, 7, 8)] == [5, 5, 5, 6]


def test_a_task_whose_score_alone_is_gone_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    def partly(model: nn.Module, step: int) -> dict[str, float]:
        return {"other": 1.0} if step > 1 else {"a": step, "other": 1.0}

    loop = Loop(tmp_path, **RULE, every=1, benchmarks=partly).train(range(1, 6))
    assert [point.step for point in loop.memory.points if "a" in point.phases] == [0, 1, 4, 5]


def test_a_run_that_goes_on_without_its_benchmark_does_not_wait_for_it(tmp_path: Path) -> None:
    state = Loop(tmp_path / "first", **RULE, benchmarks=steps_done).train(range(1, 5)).monitor.state_dict()
    second = Loop(tmp_path / "second", **RULE, state=state).train(range(5, 9))
    assert [point.phases["a"].point.axis for point in second.memory.points] == ["-loss", "-loss"]
    assert [point.phases["a"].call.first_step for point in second.memory.points] == [6, 6]
    assert [point.phases["b"].call.first_step for point in second.memory.points] == [2, 4]


# What goes wrong


def test_phases_that_fail_harm_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: MUIReport, metric: str, task: str | None = None) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(MUIReport, "estimate", broken)
    with pytest.warns(UserWarning, match="MUI at step 0: there are no phases; .* ArithmeticError: a bug"):
        loop = Loop(tmp_path)
    (point,) = loop.memory.points
    assert point.report is not None
    assert point.phases == {}
    assert point.failures == {"phases": "ArithmeticError: a bug"}
    assert json.loads((tmp_path / "mui.jsonl").read_text().splitlines()[1])["failures"] == point.failures
    with pytest.raises(ArithmeticError, match="a bug"):
        Loop(tmp_path, on_error="raise")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phase_window": 2}, "window: expected a number of points of at least 3, got 2"),
        ({"phase_level": 1.0}, r"level: expected a number in \(0, 1\), got 1.0"),
        ({"performance": "acc"}, "performance: expected a mapping of task names .*, got 'acc'"),
        ({"performance": {"a": 1}}, "performance: expected a mapping"),
        ({"ablate": "layers"}, "ablate: expected 'neurons', 'experts', True or False, got 'layers'"),
        ({"benchmarks": 3}, "benchmarks: expected a callable"),
        ({"benchmarks_every": "auto"}, "benchmarks_every: expected a positive number of optimizer steps or 'probe'"),
        ({"benchmarks_every": 0}, "benchmarks_every: .*, got 0"),
        ({"benchmarks_every": None}, "benchmarks_every: .*, got None"),
    ],
)
def test_what_is_no_setting_is_said_at_once(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        Loop(tmp_path, **options)


# Training that goes on


def half(directory: Path, until: int, **options: Any) -> tuple[Loop, dict[str, Any], dict[str, torch.Tensor]]:
    """A training up to a step, its state after step 5, and the weights then."""
    loop = Loop(directory, **RULE, **options).train(range(1, 6))
    state = json.loads(json.dumps(loop.monitor.state_dict()))
    weights = {
        "model": {name: value.clone() for name, value in loop.model.state_dict().items()},
        "optimizer": deepcopy(loop.optimizer.state_dict()),
    }
    return loop.train(range(6, until)), state, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop(tmp_path_factory.mktemp("whole"), **RULE, benchmarks=steps_done).train(range(1, 13))


@pytest.mark.parametrize(("source", "until"), [("state", 6), ("state", 11), ("state and record", 11), ("record", 11)])
def test_a_run_that_goes_on_makes_the_same_calls(source: str, until: int, whole: Loop, tmp_path: Path) -> None:
    """Whether what was logged after the checkpoint is known from the record or made again."""
    benchmarks = steps_done
    first, state, weights = half(tmp_path / "parts", until, benchmarks=benchmarks)
    model = make_model()
    model.load_state_dict(weights["model"])
    directory = tmp_path / ("parts" if "record" in source else "elsewhere")
    started = {"start_step": 5} if source == "record" else {"state": state}
    second = Loop(directory, model=model, **RULE, benchmarks=benchmarks, **started)
    second.optimizer.load_state_dict(weights["optimizer"])
    second.train(range(6, 13))
    made = until - 1 if "record" in source else 5
    assert second.steps == [step for step in whole.steps if step > made]
    expected, found = phases(whole.memory), phases(second.memory)
    assert found == {at: phase for at, phase in expected.items() if at[0] in second.steps}
    assert len({phase["phase"] for phase in expected.values()}) > 1
    assert merged(second.memory) == {step: merged(whole.memory)[step] for step in second.steps}
    assert first.steps == [step for step in whole.steps if step < until]
