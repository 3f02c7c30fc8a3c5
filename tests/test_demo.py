"""The demo: nothing leaks into what is held out, sums are right, and a short run learns and leaves what it says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from mui_callback.cli import main
from mui_callback.demo import corpus as corpus_module
from mui_callback.demo import run as run_module
from mui_callback.demo import tracking
from mui_callback.demo.arithmetic import split_additions
from mui_callback.demo.checkpoints import Checkpoints
from mui_callback.demo.console import Screen, header, row
from mui_callback.demo.corpus import TASKS, Corpus, code_blocks, load_corpus, sentences
from mui_callback.demo.model import build_model, build_tokenizer
from mui_callback.demo.packing import IGNORED, pack
from mui_callback.demo.picture import expert_grid, save_picture
from mui_callback.errors import MUIError
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.loading import ModelSource, load_pretrained, load_tokenizer
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.samples import ProbeSample
from mui_callback.report import MUIReport
from mui_callback.sinks.base import ProbePoint

STEPS = 8


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(seed=0)


@pytest.fixture(scope="module")
def report(corpus: Corpus) -> MUIReport:
    tokenizer = build_tokenizer()
    probe_set = ProbeSet(corpus.held_out).subset(4)
    return MUIProbe(build_model(tokenizer), probe_set, tokenizer=tokenizer, rules="top_fraction=0.01").measure()


@dataclass
class Run:
    folder: Path
    picture: Path
    screen: str
    passed_to_model: set[str]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("demo")
    console = Console(width=80, force_terminal=False, record=True, file=StringIO())
    passed: set[str] = set()

    def build_watched(*args: Any) -> Any:
        model = build_model(*args)
        model.register_forward_pre_hook(
            lambda module, _, kwargs: passed.update(kwargs) if module.training else None, with_kwargs=True
        )
        return model

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        patch.setattr(run_module, "Console", lambda **_: console)
        patch.setattr(run_module, "build_model", build_watched)
        picture = run_module.run_demo(folder, steps=STEPS, every=4)
    torch.set_num_threads(threads)
    return Run(folder, picture, console.export_text(), passed)


def test_a_seed_decides_the_corpus(corpus: Corpus) -> None:
    assert load_corpus(seed=0) == corpus
    other = load_corpus(seed=1)
    for task in TASKS:
        assert other.held_out[task] != corpus.held_out[task]


@pytest.mark.parametrize("task", ["english", "code"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_text_leaks(task: str, seed: int) -> None:
    corpus = load_corpus(seed)
    training, held_out = corpus.training[task], corpus.held_out[task]
    assert len({sample.response for sample in held_out}) == 48
    assert len(training) > 500
    documents = [{sample.id.rpartition("-")[0] for sample in part} for part in (training, held_out)]
    assert documents[0].isdisjoint(documents[1])
    all_training = "\n\n".join(sample.response for part in corpus.training.values() for sample in part)
    assert not [sample.response for sample in held_out if sample.response in all_training]


def test_a_text_that_two_documents_share_is_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "This sentence is in every topic of the whole documentation."
    own = "Only one of the topics has these words, and its name is topic {}."
    topics = {name: f"{shared}\n\n{own.format(name)}\n\n   x = 1\n" for name in "abcdefghijklmnopqrstuvwx"}
    monkeypatch.setattr(corpus_module, "topics", topics)
    corpus = load_corpus(seed=0, n_held_out=4)
    assert shared in {sample.response for sample in corpus.training["english"]}
    assert {sample.response for sample in corpus.held_out["english"]} == {
        own.format(sample.id.rpartition("-")[0]) for sample in corpus.held_out["english"]
    }


def test_a_python_without_documentation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "topics", {"if": "x"})
    with pytest.raises(MUIError, match="english: expected 48 or more"):
        load_corpus()


def test_documents_are_cut_into_sentences_and_blocks() -> None:
    prose = (
        "The first sentence is long enough to be kept here. Short one. x = 1 is no prose at all, but code: y = 2.\n\n"
    )
    assert sentences(prose) == ["The first sentence is long enough to be kept here."]
    block = "def add(first, second):\n    return first + second"
    assert code_blocks(f"import os\n\n{block}\n  \n# end\n") == [block]


def test_sums_are_right_and_no_problem_is_in_both_parts() -> None:
    training, held_out = split_additions(Random(0), 1000)
    for sample in [*training, *held_out]:
        a, b = map(int, sample.prompt.removesuffix("=").split("+"))
        assert sample.response == str(a + b)
    for sample in held_out:
        assert sample.answer is not None
        assert sample.choices[sample.answer] == sample.response
        assert len(set(sample.choices)) == 4
        assert {len(choice) for choice in sample.choices} == {len(sample.response)}

    def problems(part: list[ProbeSample]) -> set[tuple[str, ...]]:
        return {tuple(sorted(sample.prompt.removesuffix("=").split("+"))) for sample in part}

    assert problems(training).isdisjoint(problems(held_out))
    assert len(problems(held_out)) == 1000
    assert len(problems(training) | problems(held_out)) == 50 * 51 / 2
    assert {sample.answer for sample in held_out} == {0, 1, 2, 3}


def test_rows_hold_whole_samples_in_the_asked_shares() -> None:
    samples = {
        "sum": [ProbeSample(id="1", prompt="1+2=", response="3"), ProbeSample(id="2", prompt="10+20=", response="30")],
        "text": [ProbeSample(id="3", response="some words"), ProbeSample(id="4", response="a few more")],
    }
    tokenizer = build_tokenizer()
    rows = pack(samples, {"sum": 0.25, "text": 0.75}, tokenizer, n_rows=40, row_length=64)
    assert len(rows) == 40
    pieces: list[str] = []
    for packed in rows:
        ids, labels, positions = packed["input_ids"], packed["labels"], packed["position_ids"]
        assert ids.shape == labels.shape == positions.shape == (64,)
        starts = [*np.flatnonzero(positions == 0), 64]
        for start, end in pairwise(starts):
            if ids[start] == tokenizer.pad_token_id:
                assert labels[start] == IGNORED
                continue
            text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
            pieces.append(text)
            n_prompt = text.find("=") + 1 or 1  # nothing predicts the first byte of a text without prompt
            assert (labels[start : start + n_prompt] == IGNORED).all()
            assert (labels[start + n_prompt : end] == ids[start + n_prompt : end]).all()
            assert ids[end - 1] == tokenizer.eos_token_id
    assert set(pieces) == {"1+2=3", "10+20=30", "some words", "a few more"}
    in_sums = sum(len(piece) + 1 for piece in pieces if "=" in piece)
    assert in_sums / sum(len(piece) + 1 for piece in pieces) == pytest.approx(0.25, abs=0.03)


def test_samples_of_a_row_do_not_see_each_other(short_run: Run) -> None:
    # transformers keeps them apart by their positions, unless it is given a mask.
    assert "position_ids" in short_run.passed_to_model
    assert "attention_mask" not in short_run.passed_to_model


def test_a_short_run_learns_and_is_recorded(short_run: Run) -> None:
    lines = [json.loads(line) for line in (short_run.folder / "mui.jsonl").read_text().splitlines()]
    points = [line for line in lines if "step" in line]
    assert [point["step"] for point in points] == [0, 4, 8]
    first, last = points[0]["scalars"], points[-1]["scalars"]
    for task in TASKS:
        assert last[f"mui/{task}/loss"] < first[f"mui/{task}/loss"] - 0.5
        assert 0 < last[f"mui/{task}/mui"] < 1
    assert "mui/arithmetic/choice_accuracy" in last
    assert 0 < last["mui/shared_share"] < 1


def test_a_short_run_draws_a_picture(short_run: Run) -> None:
    assert short_run.picture == short_run.folder / "mui.png"
    _check_picture(short_run.picture)


def test_a_short_run_says_what_it_did(short_run: Run) -> None:
    rows = [line for line in short_run.screen.splitlines() if line.count("│") == 4]
    assert rows[0].split() == ["│", "english", "│", "code", "│", "arithmetic", "│", "all", "tasks"]
    assert [line.split()[0] for line in rows[2:]] == ["0", "4", "8"]
    assert max(map(len, rows)) <= 80
    (wandb_run,) = (short_run.folder / "wandb").glob("offline-run-*")
    assert f"leet {wandb_run}\n" in short_run.screen
    assert f"sync {wandb_run}\n" in short_run.screen
    assert list(wandb_run.glob("*.wandb"))


def test_what_it_leaves_can_be_studied(short_run: Run, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"mui-callback ((?:watch|ablate|diversity|trajectory) .*)\n", short_run.screen)
    assert [command.split()[0] for command in commands] == ["watch", "ablate", "diversity"]
    main(commands[0].split())
    assert "arithmetic" in capsys.readouterr().out
    arguments = commands[1].split()
    assert arguments.pop() == str(short_run.folder / "held-out" / "*.jsonl")
    files = sorted((short_run.folder / "held-out").iterdir())
    main([*arguments, *map(str, files), "--draws", "1"])
    assert "key neurons" in capsys.readouterr().out
    read = ProbeSet.from_jsonl(files)
    assert dict(read.tasks).keys() == corpus.held_out.keys()
    for task, samples in read.tasks.items():
        assert tuple(replace(sample, source="") for sample in samples) == tuple(
            replace(sample, source="") for sample in corpus.held_out[task]
        )


def test_its_checkpoints_are_the_model_as_it_learns(short_run: Run) -> None:
    checkpoints = short_run.folder / run_module.CHECKPOINTS_NAME
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"checkpoint-{step}" for step in (0, 2, 4, 6, 8)]
    first = load_pretrained(ModelSource(str(checkpoints / "checkpoint-0")))
    assert _same_weights(first, build_model(build_tokenizer(), seed=0))
    last = load_pretrained(ModelSource(str(checkpoints / f"checkpoint-{STEPS}")))
    assert _same_weights(last, load_pretrained(ModelSource(str(short_run.folder / run_module.MODEL_NAME))))
    assert not _same_weights(last, first)
    tokenizer = load_tokenizer(ModelSource(str(checkpoints / "checkpoint-2")))
    assert tokenizer is not None
    assert tokenizer("1+2=").input_ids == build_tokenizer()("1+2=").input_ids


def test_checkpoints_are_saved_every_so_often_and_at_the_end_and_earlier_ones_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-999").mkdir()
    (tmp_path / "notes").mkdir()
    tokenizer, control = build_tokenizer(), TrainerControl()
    model, state = build_model(tokenizer), TrainerState(max_steps=7)
    saved = Checkpoints(tmp_path, tokenizer, every=3)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    random_state = torch.get_rng_state()
    saved.on_train_begin(arguments, state, control, model=model)
    for step in range(1, 8):
        state.global_step = step
        saved.on_step_end(arguments, state, control, model=model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {path.name for path in tmp_path.iterdir()} == {*(f"checkpoint-{step}" for step in (0, 3, 6, 7)), "notes"}


def test_the_study_of_its_checkpoints_is_named_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(picture: Path) -> bool:
        console = Console(record=True, width=200, file=StringIO())
        run_module._say_what_next(console, picture, None)
        return "mui-callback trajectory configs/tiny.yaml\n" in console.export_text()

    monkeypatch.chdir(Path(__file__).parents[1])
    assert said(Path("mui-demo/mui.png"))
    assert not said(tmp_path / "mui.png")  # which the study does not look into
    monkeypatch.chdir(tmp_path)
    assert not said(Path("mui-demo/mui.png"))


def test_without_wandb_the_demo_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with tracking.wandb_run(tmp_path) as run:
        assert run is None
    console = Console(record=True, width=80)
    run_module._say_what_next(console, tmp_path / "mui.png", None)
    assert "pip install wandb" in console.export_text()


def test_the_screen_has_a_line_for_each_probe(report: MUIReport) -> None:
    console = Console(record=True, width=80)
    with Screen(console) as screen:
        screen.write(ProbePoint(0, report=report))
        screen.write(ProbePoint(60, error="ProbeError: no experts"))
        screen.write(ProbePoint(9999, report=report))
    lines = console.export_text().splitlines()
    assert len(lines) == 5
    assert "the probe failed: ProbeError: no experts" in lines[3]
    assert {len(line.rstrip()) for line in lines[1:3]} == {79}
    assert [len(line) for line in str(header(report)).splitlines()] == [79, 79]
    assert len(row(0, report)) == 79
    english = report.tasks["english"]
    assert f"{english.loss:.2f}" in lines[2]
    assert f" {100 * (english.mui or 0):.1f} │" in lines[2]


def test_the_picture_leaves_failed_probes_out(report: MUIReport, tmp_path: Path) -> None:
    points = [ProbePoint(0, report=report), ProbePoint(5, error="failed"), ProbePoint(10, report=report)]
    _check_picture(save_picture(points, tmp_path / "a.png", "title"))
    with pytest.raises(ValueError, match="one or more points with a report"):
        save_picture(points[1:2], tmp_path / "b.png")


def test_the_grid_sets_shared_experts_apart() -> None:
    layout = ExpertLayout([LayerShape(1, "a", 3, 4, (4, 4)), LayerShape(2, "b", 2, 4, (4,))])
    nan = np.nan
    expected = [[0, 1, 2, nan, 3, 4], [5, 6, nan, nan, 7, nan]]
    np.testing.assert_array_equal(expert_grid(layout, np.arange(8.0)), expected)
    routed_only = ExpertLayout([LayerShape(0, "a", 3, 4)])
    np.testing.assert_array_equal(expert_grid(routed_only, np.arange(3.0)), [[0, 1, 2]])


def _same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == also and torch.equal(weight, like) for (name, weight), (also, like) in pairs)


def _check_picture(path: Path) -> None:
    pixels = imread(path)
    assert pixels.shape[:2] == (1080, 1800)
    assert pixels[..., :3].std() > 0.1
