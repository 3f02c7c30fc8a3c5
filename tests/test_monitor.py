"""`MUIMonitor` in loops of the user's own."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from transformers import ByT5Tokenizer

from integrations import make_model, probe_set
from mui_callback import MemorySink, MUICallback, MUIMonitor, MUIProbe, ProbeSet
from mui_callback.errors import ProbeSetError
from mui_callback.probe.samples import TokenChoice, TokenSample
from mui_callback.probe.unwrap import unwrapped
from mui_callback.sinks.base import ProbePoint


def monitor(directory: Path, **options: Any) -> tuple[MUIMonitor, MemorySink]:
    memory = MemorySink()
    defaults = {"every": 2, "sinks": [memory], "output_dir": directory, "on_error": "raise", "tracker": None}
    model = options.pop("model") if "model" in options else make_model()
    samples = options.pop("probe_set", None) or probe_set()
    return MUIMonitor(model, samples, **{**defaults, **options}), memory


def steps(memory: MemorySink) -> list[int]:
    return [point.step for point in memory.points]


def test_the_untrained_model_is_probed_at_once(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path)
    assert steps(memory) == [0]
    for step in (1, 2, 3):
        made.step(step)
    assert steps(memory) == [0, 2]
    made.close()
    assert steps(memory) == [0, 2, 3]
    made.step(4)
    assert steps(memory) == [0, 2, 3]


def test_as_a_context_manager(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path)
    with made as same:
        assert same is made
        same.step(1)
    assert steps(memory) == [0, 1]
    assert memory.closed


def test_after_an_exception_there_is_no_last_point(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path)
    made.step(1)
    with pytest.raises(RuntimeError, match="mine"), made:
        raise RuntimeError("mine")
    assert steps(memory) == [0]
    assert memory.closed


def test_nothing_trained_is_no_last_step(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, at_start=False)
    made.close()
    assert steps(memory) == []


def test_evaluations_are_said_by_the_loop(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, every=None, on_evaluation=True)
    made.step(1)
    made.step(2, evaluated=True)
    made.step(3)
    made.step(3, evaluated=True)
    assert steps(memory) == [0, 2, 3]


def test_a_loop_that_went_on_without_saying_so_is_noticed(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path)
    with pytest.warns(UserWarning, match=r"first step that it is told of is 801.*start_step=800"):
        made.step(801)
    made.close()
    assert steps(memory) == [0, 801]


def test_a_loop_that_counts_from_0_is_told(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path)
    with pytest.warns(UserWarning, match="step 0 is the untrained model, which was probed before"):
        made.step(0)
    assert steps(memory) == [0]


def test_a_loop_that_begins_to_count_again_in_each_epoch_is_told_once(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, on_error="warn", every=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for step in range(1, 5):
                made.step(step)
    (warning,) = [str(w.message) for w in caught if "count on from epoch to epoch" in str(w.message)]
    assert "expected the number of optimizer steps done so far, at least 4, got 1" in warning
    assert steps(memory) == [0, 3]


def test_a_loop_that_goes_back_is_an_error_where_that_is_wanted(tmp_path: Path) -> None:
    made, _ = monitor(tmp_path)
    made.step(1)
    made.step(2)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        made.step(1)


def test_steps_that_were_due_in_between_are_made_up_for(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, every=10, at=[5], warmup=True)
    for step in (1, 3, 6, 9, 12, 15, 18, 21, 22):
        made.step(step)
    assert steps(memory) == [0, 1, 3, 6, 9, 12, 21]  # for 1, 2, 4 and 5, 8, 10, 20


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_whole_numbers_of_other_kinds_are_steps(kind: Any, tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, every=np.int64(2), at=np.array([3]), start_step=kind(0))
    for step in (1, 2, 3):
        made.step(kind(step))
    assert steps(memory) == [0, 2, 3]
    state = made.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert [json.loads(row).get("step") for row in (tmp_path / "mui.jsonl").read_text().splitlines()] == [None, 0, 2, 3]


def test_a_step_that_is_no_whole_number_is_refused_at_once(tmp_path: Path) -> None:
    made, _ = monitor(tmp_path)
    with pytest.raises(TypeError, match="float"):
        made.step(1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sinks": MemorySink()}, "sinks: expected a list of sinks"),
        ({"sinks": [MemorySink]}, "sinks: expected a list of sinks"),
        (
            {"tracker": "tensorboard"},
            r"tracker: expected 'wandb', .* a SummaryWriter, .* got 'tensorboard'",
        ),
        ({"tracker": [None, 3]}, r"tracker: expected .* a list of these or None, got 3"),
        ({"at": 3}, "at: expected a collection of step numbers, got 3"),
        ({"state": {"epoch": 3}}, "state: expected what MUIMonitor.state_dict"),
        ({"on_error": "ignore"}, "on_error: expected 'warn' or 'raise', got 'ignore'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        monitor(tmp_path, **options)


def test_a_probe_set_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="probe_set: expected a ProbeSet"):
        MUIMonitor(make_model(), {"a": ["text"]}, output_dir=tmp_path)


@pytest.mark.parametrize("rows", [[{"input_ids": [5, 6], "labels": [-100, -100]}] * 3, [{"input_ids": [5]}] * 3])
def test_a_task_in_which_nothing_is_scored_is_refused(rows: list[dict[str, list[int]]], tmp_path: Path) -> None:
    silent = ProbeSet.from_token_rows(rows, task="silent")
    words = "task 'silent': expected tokens to score, got none in 3 samples: all their labels are -100, or they have"
    with pytest.raises(ProbeSetError, match=words):
        MUIMonitor(make_model(), probe_set() | silent, output_dir=tmp_path, tracker=None)
    assert not list(tmp_path.iterdir())


def test_a_task_whose_scored_tokens_are_cut_off_is_refused(tmp_path: Path) -> None:
    early = ProbeSet.from_token_rows([{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, -100]}])
    words = r"got none in 1 samples: all their labels are -100 or were cut off \(max_length: 3\), or"
    with pytest.raises(ProbeSetError, match=words), pytest.warns(UserWarning, match="too long"):
        MUIMonitor(make_model(), early, output_dir=tmp_path, tracker=None, max_length=3)


def test_a_task_of_choices_needs_no_other_tokens(tmp_path: Path) -> None:
    choices = tuple(TokenChoice(np.array([5, 6, last]), np.arange(3) == 2) for last in (7, 8))
    sample = TokenSample("0", np.array([5, 6, 7]), np.zeros(3, dtype=bool), choices=choices, answer=0)
    with pytest.warns(UserWarning, match="1 of 1 samples have no response token"):
        _, memory = monitor(tmp_path, probe_set=ProbeSet({"q": [sample]}))
    assert memory.points[0].scalars["mui/q/choice_accuracy"] in (0, 1)
    assert memory.points[0].scalars["mui/unscored"] == 1


def test_samples_in_which_nothing_is_scored_are_named(tmp_path: Path) -> None:
    rows = [{"id": str(n), "input_ids": [5, 6, 7], "labels": [-100, -100, 7 if n < 3 else -100]} for n in range(8)]
    mixed = ProbeSet.from_token_rows(rows, task="mixed")
    with pytest.warns(UserWarning, match=r"5 of 8 samples have no response token.* no neuron: 3, 4, 5, \.\.\.$"):
        _, memory = monitor(tmp_path, probe_set=mixed)
    assert memory.points[0].scalars["mui/unscored"] == 5


def test_a_start_that_is_not_that_of_the_state_is_refused(tmp_path: Path) -> None:
    made, _ = monitor(tmp_path)
    made.step(1)
    with pytest.raises(ValueError, match="start_step: expected the step of the state, 1, or none, got 7"):
        monitor(tmp_path, state=made.state_dict(), start_step=7)


def test_a_process_alone_writes_whatever_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    _, memory = monitor(tmp_path)
    assert steps(memory) == [0]


def test_the_arguments_of_the_callback_and_of_the_monitor_have_the_same_defaults() -> None:
    callback, mine = (inspect.signature(kind.__init__).parameters for kind in (MUICallback, MUIMonitor))
    shared = callback.keys() & mine.keys() - {"self"}
    assert len(shared) > 14
    for name in shared:
        assert callback[name].default == mine[name].default, name
        assert callback[name].annotation == mine[name].annotation, name


def test_a_loop_that_goes_on_has_no_point_at_step_0(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, start_step=800)
    made.step(801)
    made.step(802)
    made.close()
    assert steps(memory) == [802]
    assert json.loads((tmp_path / "mui.jsonl").read_text().splitlines()[0])["run"]["start_step"] == 800


def test_without_a_probe_set_the_builtin_one(tmp_path: Path) -> None:
    memory = MemorySink()
    MUIMonitor(make_model(), tokenizer=ByT5Tokenizer(), output_dir=tmp_path, sinks=[memory], tracker=None)
    assert memory.run.task_names == ProbeSet.builtin().task_names


def test_without_a_tokenizer_neither_it_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match="pass a probe set, or a tokenizer for the built-in one"):
        MUIMonitor(make_model(), output_dir=tmp_path)


def test_it_measures_in_the_autocast_that_it_is_called_in(tmp_path: Path) -> None:
    model = make_model()
    made, memory = monitor(tmp_path, model=model, every=1)
    with torch.autocast("cpu", torch.bfloat16):
        made.step(1)
        inside = MUIProbe(model, probe_set()).measure()
    assert memory.points[1].report.counts.loss.tolist() == inside.counts.loss.tolist()
    assert memory.points[0].report.counts.loss.tolist() != inside.counts.loss.tolist()


def test_the_share_of_time_spent_is_logged(tmp_path: Path) -> None:
    made, memory = monitor(tmp_path, every=1)
    for step in (1, 2):
        made.step(step)
    assert "mui/overhead" not in memory.points[0].scalars
    for point in memory.points[1:]:
        spent = point.spent
        assert point.scalars["mui/overhead"] == spent.probing / spent.training
        assert spent.probing > point.report.seconds
    assert memory.points[2].spent.probing > memory.points[1].spent.probing + memory.points[2].report.seconds
    assert [point.spent.steps for point in memory.points] == [0, 1, 2]


def test_points_are_short_to_look_at(tmp_path: Path) -> None:
    _, memory = monitor(tmp_path)
    (point,) = memory.points
    loss = f"{point.scalars['mui/loss']:.4g}"
    assert repr(point) == f"ProbePoint(step=0, MUIReport(a, b: 8 samples, mui=0.1094, loss={loss}))"
    assert repr(memory) == f"MemorySink(1 points, the last one: {point!r})"
    assert len(repr(point.report.pooled)) < 200
    assert repr(ProbePoint(3, error="OSError: gone")) == "ProbePoint(step=3, error='OSError: gone')"


# What is wrapped around a model


class Engine(nn.Module):
    """What keeps the model as its only part with weights, as DDP and a DeepSpeed engine do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self.timer = model, nn.Identity()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the engine is not to run in a probe")


@pytest.mark.parametrize("wrap", [Engine, DataParallel, torch.compile, lambda m: Engine(torch.compile(m))])
def test_the_model_itself_is_probed(wrap: Any, tmp_path: Path) -> None:
    model = make_model()
    assert unwrapped(wrap(model)) is model
    _, memory = monitor(tmp_path, model=wrap(model))
    assert memory.points[0].report.key_neurons() == MUIProbe(model, probe_set()).measure().key_neurons()


def test_a_module_that_has_more_than_the_model_is_no_wrapper() -> None:
    class Two(Engine):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.head = nn.Linear(2, 2)

    two = Two(make_model())
    assert unwrapped(two) is two
    model = make_model()
    assert unwrapped(model) is model
