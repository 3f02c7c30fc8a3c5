"""Two processes that train one model together: they probe, fail and stop as one, and only the main one writes."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_training import (
    HastyClock,
    Seen,
    agree_alone,
    dense_model,
    fail_at,
    launch,
    make_monitor,
    output_dir,
    probe,
    read_eval_data,
    record,
    result,
    run_out_of_memory_above,
    train,
    unfit_probe_set,
)
from mui_callback import MUIReport, ProbeSet
from mui_callback.counts import ProbeCounts
from tiny_samples import make_samples
from training import STEPS, assert_same_to_the_bit

SHORT = 2.0
"""Seconds that processes wait for others that do not come."""
REGULAR = [0, 2, 4, 6, STEPS]
"""The steps that are probed."""
BOTH = (0, 1)
MEMORY = 40
"""Tokens of a batch for which there is memory, where it runs out."""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """Training without a monitor."""
    return launch(tmp_path_factory.mktemp("without"), train, is_monitored=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitored")


@pytest.fixture(scope="module")
def monitored(directory: Path) -> list[Seen]:
    """Training in which all goes well."""
    return launch(directory, train)


@pytest.fixture(scope="module")
def failing_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.fixture(scope="module")
def failing(failing_directory: Path) -> list[Seen]:
    """Training in which one probe fails, in process 1 only."""
    return launch(failing_directory, train, sabotage={1: fail_at(4)})


def steps(seen: Seen) -> list[int]:
    return [point.step for point in seen.points]


def errors(seen: Seen) -> list[str | None]:
    return [point.error for point in seen.points]


def assert_trained_as(without: list[Seen], seen: list[Seen]) -> None:
    """To the bit, in every process."""
    assert [one.error for one in seen] == [None, None]
    for rank in BOTH:
        assert without[rank].trained is not None
        assert seen[rank].trained is not None
        assert_same_to_the_bit(without[rank].trained, seen[rank].trained)


def assert_same_counts(first: MUIReport | None, second: MUIReport) -> None:
    assert first is not None
    for one, other in zip(first.counts.key_sets, second.counts.key_sets, strict=True):
        assert np.array_equal(one.neuron, other.neuron)
        assert np.array_equal(one.end, other.end)
    for field in fields(ProbeCounts):
        found, expected = (getattr(report.counts, field.name) for report in (first, second))
        if field.name == "key_sets":
            continue
        if found.dtype.kind == "f":  # other batches, and added up in another order
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), field.name
        else:
            assert np.array_equal(found, expected), field.name


# Where all goes well


def test_training_is_the_same_to_the_bit_in_both(without: list[Seen], monitored: list[Seen]) -> None:
    assert_trained_as(without, monitored)
    assert without[0].trained is not None
    assert without[1].trained is not None
    assert without[0].trained.losses != without[1].trained.losses  # each has its own data and its own dropout
    assert monitored[0].warnings == monitored[1].warnings == []


def test_only_the_main_process_writes(monitored: list[Seen], directory: Path) -> None:
    assert steps(monitored[0]) == REGULAR
    assert errors(monitored[0]) == [None] * len(REGULAR)
    assert [line.get("step", "run") for line in record(directory)] == ["run", *REGULAR]
    assert steps(monitored[1]) == []
    assert not output_dir(directory, 1).exists()


def test_both_measure_the_same(monitored: list[Seen]) -> None:
    assert list(monitored[0].measured) == REGULAR
    assert monitored[0].measured == monitored[1].measured
    assert monitored[0].passes == monitored[1].passes
    for point in monitored[0].points:
        assert monitored[0].measured[point.step].items() <= point.scalars.items()
    losses = [scalars["mui/loss"] for scalars in monitored[0].measured.values()]
    assert len(set(losses)) == len(losses)  # it is the model that trains


@pytest.mark.parametrize("rank", BOTH)
def test_points_are_those_of_one_process_alone(
    rank: int, monitored: list[Seen], directory: Path, tmp_path: Path
) -> None:
    (reports,) = launch(tmp_path, probe, size=1, trained=result(directory, rank))
    assert_same_counts(monitored[0].points[0].report, reports[0])
    assert_same_counts(monitored[0].points[-1].report, reports[1])


# Where a probe fails in one of them


def test_a_probe_that_fails_in_one_is_skipped_by_both(failing: list[Seen], failing_directory: Path) -> None:
    for seen in failing:
        assert list(seen.measured) == [0, 2, 6, STEPS]
        assert [step for step, _ in seen.passes] == REGULAR
    told = "ProbeError: process 1: RuntimeError: injected"
    assert steps(failing[0]) == REGULAR
    assert errors(failing[0]) == [None, None, told, None, None]
    assert [line.get("error") for line in record(failing_directory)[1:]] == errors(failing[0])


def test_both_warn_once_of_a_probe_that_fails_in_one(failing: list[Seen]) -> None:
    beginning = "MUI probe at step 4 failed; training goes on. "
    assert failing[0].warnings == [f"{beginning}ProbeError: process 1: RuntimeError: injected"]
    assert failing[1].warnings == [f"{beginning}RuntimeError: injected"]


def test_training_with_a_probe_that_fails_in_one_is_the_same_to_the_bit(
    without: list[Seen], failing: list[Seen]
) -> None:
    assert_trained_as(without, failing)


@pytest.mark.parametrize("step", [0, 4])
def test_both_raise_what_fails_in_one(step: int, tmp_path: Path) -> None:
    seen = launch(tmp_path, train, sabotage={1: fail_at(step)}, on_error="raise")
    assert [one.error for one in seen] == [
        "ProbeError: process 1: RuntimeError: injected",
        "RuntimeError: injected",
    ]
    assert steps(seen[0]) == list(range(0, step + 1, 2))
    assert errors(seen[0])[-1] == "ProbeError: process 1: RuntimeError: injected"


def test_three_failures_in_a_row_in_one_stop_probing_in_both(without: list[Seen], tmp_path: Path) -> None:
    seen = launch(tmp_path, train, sabotage={1: fail_at(2, 4, 6, STEPS)})
    assert steps(seen[0]) == [0, 2, 4, 6]
    for one in seen:
        assert [step for step, _ in one.passes] == [0, 2, 4, 6]
        assert len(one.warnings) == 3
        assert one.warnings[2].startswith("MUI probe at step 6 failed, 3 in a row; no more are made")
    assert_trained_as(without, seen)


def test_both_halve_their_batches_if_memory_runs_out_in_one(
    without: list[Seen], monitored: list[Seen], tmp_path: Path
) -> None:
    seen = launch(tmp_path, train, sabotage={1: run_out_of_memory_above(MEMORY)})
    assert errors(seen[0]) == [None] * len(REGULAR)
    assert seen[0].passes == seen[1].passes
    sizes = [n_tokens for step, n_tokens in seen[0].passes if step == 0]
    assert sizes[0] > MEMORY >= max(sizes[1:])
    assert max(n_tokens for step, n_tokens in seen[0].passes if step > 0) <= MEMORY  # once and for all
    halved = sizes[0] // 2
    for point in seen[0].points:
        assert point.report is not None
        assert point.report.settings.batch_tokens == halved
    for one in seen:
        (warning,) = one.warnings
        assert warning.startswith(
            f"MUI: out of memory in a probe; going on with batches of {halved} tokens (process 1: RuntimeError: "
        )
    for step, scalars in seen[0].measured.items():
        assert scalars == pytest.approx(monitored[0].measured[step], rel=1e-4, abs=1e-5)
    assert_trained_as(without, seen)


def test_no_smaller_batches_where_one_fails_for_another_reason(tmp_path: Path) -> None:
    seen = launch(tmp_path, train, sabotage={0: fail_at(0), 1: run_out_of_memory_above(MEMORY)}, n_steps=2)
    assert [step for step, _ in seen[0].passes].count(0) == [step for step, _ in seen[1].passes].count(0) == 1
    assert errors(seen[0])[0] == "RuntimeError: injected"
    assert "can't allocate memory" in seen[1].warnings[0]
    assert list(seen[0].measured) == list(seen[1].measured) == [2]


# Where one cannot begin


@pytest.mark.parametrize(
    ("unfit", "name", "message"),
    [
        ({"models": {1: dense_model}}, "NoExpertsError", "LlamaForCausalLM has no MoE layer"),
        ({"probe_sets": {1: unfit_probe_set}}, "ProbeSetError", "expected token ids below the model's vocabulary size"),
    ],
    ids=["a dense model", "an unfit probe set"],
)
def test_both_raise_at_once_what_one_cannot_probe(
    unfit: dict[str, Any], name: str, message: str, tmp_path: Path
) -> None:
    first, second = (str(seen.error) for seen in launch(tmp_path, make_monitor, **unfit))
    assert second.startswith(f"{name}: ")
    assert message in second
    assert first == f"ProbeError: process 1: {second}"


def test_both_raise_if_the_record_cannot_be_written(tmp_path: Path) -> None:
    (output_dir(tmp_path, 0) / "mui.jsonl").mkdir(parents=True)
    first, second = (str(seen.error) for seen in launch(tmp_path, make_monitor, on_error="raise"))
    assert first.startswith("IsADirectoryError: ")
    assert second == f"ProbeError: process 0: {first}"


def test_the_main_process_alone_warns_of_a_record_that_cannot_be_written(without: list[Seen], tmp_path: Path) -> None:
    (output_dir(tmp_path, 0) / "mui.jsonl").mkdir(parents=True)
    seen = launch(tmp_path, train)
    assert steps(seen[0]) == REGULAR
    assert list(seen[1].measured) == REGULAR
    (warning,) = seen[0].warnings
    assert warning.startswith("JsonlSink failed: IsADirectoryError: ")
    assert seen[1].warnings == []
    assert_trained_as(without, seen)


def test_where_training_goes_on_the_record_of_the_main_process_counts_for_both(
    monitored: list[Seen], directory: Path, tmp_path: Path
) -> None:
    output_dir(tmp_path, 0).mkdir()
    shutil.copy(output_dir(directory, 0) / "mui.jsonl", output_dir(tmp_path, 0))
    seen = launch(tmp_path, train, start_step=3, n_steps=STEPS + 2)
    assert steps(seen[0]) == [STEPS + 2]
    for one in seen:
        assert [step for step, _ in one.passes] == [STEPS + 2]
        assert list(one.measured) == [*REGULAR, STEPS + 2]
    header = [line["run"]["id"] for line in record(tmp_path) if "run" in line]
    assert header[0] == header[1]


# Which samples


def test_the_eval_data_of_the_main_process_are_those_of_all(tmp_path: Path) -> None:
    expected = ProbeSet({"eval": make_samples(0)}).fingerprint
    assert launch(tmp_path, read_eval_data) == [expected, expected]


def test_all_raise_if_one_cannot_read_its_eval_data(tmp_path: Path) -> None:
    error = "OSError: the data are gone"
    assert launch(tmp_path, read_eval_data, fails_in=1) == [f"ProbeError: process 1: {error}", error]


# When to probe


def test_both_keep_to_the_clock_of_the_main_process(tmp_path: Path) -> None:
    n_steps = 150
    seen = launch(tmp_path, train, n_steps=n_steps, every="auto", budget=0.5, sabotage={1: HastyClock()})
    assert [one.error for one in seen] == [None, None]
    assert seen[0].passes == seen[1].passes
    assert steps(seen[0]) == list(seen[0].measured) == list(seen[1].measured)
    assert steps(seen[0])[0] == 0
    assert steps(seen[0])[-1] == n_steps
    # By the other clock 100 s or more would have to pass before the second one.
    assert len(steps(seen[0])) > 3


# Where one does not come


@pytest.mark.parametrize("rank", BOTH)
def test_who_waits_in_vain_is_told(rank: int, tmp_path: Path) -> None:
    told = launch(tmp_path, agree_alone, ranks=(rank,), seconds=SHORT)
    assert told[1 - rank] == []
    assert len(told[rank]) == 1 + rank
    first = f"DesynchronizedError: process {rank} of 2 waited in vain for the others (2 s). Every "
    assert told[rank][0].startswith(first)
    for error in told[rank][1:]:  # nobody waits again for those who did not come
        assert error == f"DesynchronizedError: process {rank} of 2: another process gave up."


def test_a_monitor_in_the_main_process_alone_is_an_error(tmp_path: Path) -> None:
    seen = launch(tmp_path, make_monitor, ranks=(0,), wait=SHORT)
    assert str(seen[0].error).startswith("DesynchronizedError: process 0 of 2 waited in vain")
    assert seen[1].error is None


def test_a_step_that_one_does_not_report_ends_probing_and_not_training(without: list[Seen], tmp_path: Path) -> None:
    seen = launch(tmp_path, train, leaves_out={1: 4}, wait=SHORT)
    assert steps(seen[0]) == [0, 2, 4]
    assert [alert.kind for alert in seen[0].points[-1].alerts] == ["failure"]
    for rank in BOTH:
        (warning,) = seen[rank].warnings
        assert warning.startswith("MUI: no more probes after step ")
        assert "waited in vain for the others" in warning or "another process gave up" in warning
    assert_trained_as(without, seen)


@pytest.mark.parametrize(
    "on_error",
    [
        "warn",
        "raise",
    ],
)
def test_a_bug_in_the_loop_of_one_is_what_it_raises(on_error: str, tmp_path: Path) -> None:
    seen = launch(tmp_path, train, crashes_at={1: 3}, wait=SHORT, on_error=on_error)
    assert seen[1].error == "ArithmeticError: a bug in the loop"
    assert seen[0].error is not None  # gloo's own


def test_both_raise_what_the_main_process_cannot_go_on_from(tmp_path: Path) -> None:
    state = {"step": 3, "probed": {}}  # of a checkpoint that something else wrote
    launched = launch(tmp_path, make_monitor, state=state, wait=SHORT, on_error="raise")
    first, second = (str(seen.error) for seen in launched)
    assert first.startswith("ValueError: expected the state of a monitor, as state_dict() gives it, got")
    assert second == f"ProbeError: process 0: {first}"
