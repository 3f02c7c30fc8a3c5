"""A study against probes of its checkpoints one by one; gone on with, changed, and with checkpoints that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from tokenizers.processors import ByteLevel
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from made_tokenizer import made_tokenizer
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.cli import main
from mui_callback.errors import MUIError
from mui_callback.loading import ModelSource
from mui_callback.metrics.phases import PhaseRule
from mui_callback.metrics.trajectory import phase_at
from mui_callback.responses.task_config import TaskConfig
from mui_callback.settings import ProbeSettings
from mui_callback.trajectory import identity
from mui_callback.trajectory import run as run_module
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.config import ModelConfig, StudyConfig
from mui_callback.trajectory.places import ModelDirectory
from mui_callback.trajectory.planning import StudyPlan
from mui_callback.trajectory.records import open_study
from studies import PROBE, SUMS, WORDS, run, save_checkpoints, save_tasks, study, table
from tiny import build

STEPS = (5, 10, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("runs") / "run", STEPS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[TaskConfig]:
    return save_tasks(tmp_path_factory.mktemp("tasks"), sums=SUMS, words=WORDS)


@pytest.fixture(scope="module")
def measured(source: Path, tasks: list[TaskConfig], tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study that nothing disturbed."""
    config = study(tmp_path_factory.mktemp("measured") / "out", source, tasks)
    outcome, _ = run(config)
    assert outcome.is_complete
    return config


def probed(path: Path, tasks: list[TaskConfig], settings: ProbeSettings = PROBE) -> MUIReport:
    files = {task.name: task.file for task in tasks if task.file is not None}
    model = AutoModelForCausalLM.from_pretrained(path)
    return MUIProbe(model, ProbeSet.from_jsonl(files), tokenizer=ByT5Tokenizer(), rules=settings.rules).measure()


def test_rows_are_those_of_single_probes(measured: StudyConfig, source: Path, tasks: list[TaskConfig]) -> None:
    rows = table(measured.output)
    assert [(row["checkpoint"], row["step"], row["task"]) for row in rows] == [
        (f"checkpoint-{step}", step, task) for step in STEPS for task in ("sums", "words")
    ]
    for step in STEPS:
        report = probed(source / f"checkpoint-{step}", tasks)
        for row in (row for row in rows if row["step"] == step):
            task = report.tasks[row["task"]]
            for name in (
                "mui",
                "loss",
                "choice_accuracy",
                "key_expert_proportion",
                "shared_share",
                "effective_experts",
            ):
                assert row[name] == getattr(task, name)
            interval = report.intervals(row["task"])["mui"]
            ends = (None, None) if interval is None else (interval.low, interval.high)
            assert (row["mui_low"], row["mui_high"]) == ends
            expected = ("loss", task.loss) if row["task"] == "sums" else ("choice_accuracy", task.choice_accuracy)
            assert (row["performance_axis"], row["performance"]) == expected
            assert (row["n_samples"], row["n_tokens"]) == (task.n_samples, task.predictions.n_tokens)


def test_what_a_report_needs_is_kept(measured: StudyConfig, source: Path, tasks: list[TaskConfig]) -> None:
    kept = open_study(measured.output)
    assert (kept.models, kept.tasks) == (("run",), ("sums", "words"))
    assert kept.planned == tuple(CheckpointId("run", f"checkpoint-{step}", step) for step in STEPS)
    last = kept.records[-1].report
    assert last.key_neurons("sums") == probed(source / "checkpoint-20", tasks).key_neurons("sums")
    points = {record.checkpoint.step or 0: record.points["sums"] for record in kept.of("run")}
    assert list(points) == list(STEPS)
    called = phase_at(points, 20, PhaseRule(window=3))
    assert called is not None
    assert called.call.first_step == 5
    assert called.call.performance is not None


def test_the_same_command_measures_nothing_again(measured: StudyConfig) -> None:
    files = sorted((measured.output / "checkpoints").rglob("*.*"))
    before = [file.stat().st_mtime_ns for file in files], table(measured.output)
    outcome, said = run(measured)
    assert outcome.is_complete
    assert "3 of 3 checkpoints are measured" in said
    assert ([file.stat().st_mtime_ns for file in files], table(measured.output)) == before


def test_more_checkpoints_are_added(
    source: Path, tasks: list[TaskConfig], measured: StudyConfig, tmp_path: Path
) -> None:
    (model,) = measured.models
    first = replace(model, checkpoints=["checkpoint-20"])
    run(replace(measured, output=tmp_path, models=[first]))
    outcome, said = run(replace(measured, output=tmp_path))
    assert outcome.is_complete
    assert "1 of 3 checkpoints are measured" in said
    assert table(tmp_path) == table(measured.output)


CHANGES: dict[str, Callable[[StudyConfig], StudyConfig]] = {
    "probe.rules": lambda config: replace(config, probe=ProbeSettings(rules="top_fraction=0.02")),
    "response": lambda config: replace(config, response="generate"),
    "model.dtype": lambda config: replace(config, models=[replace(config.models[0], dtype="bfloat16")]),
    "tasks.sums": lambda config: replace(config, tasks=[replace(config.tasks[0], max_samples=4), config.tasks[1]]),
    "tasks.words": lambda config: replace(config, tasks=config.tasks[:1]),
    "code": lambda config: config,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_study_does_not_mix_rows(what: str, measured: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table(measured.output)
    if what == "code":
        monkeypatch.setattr(identity, "__version__", "9.9")
    with pytest.raises(MUIError, match=f"run was measured otherwise before .{what} (was|is gone).*--redo"):
        run(CHANGES[what](measured))
    assert table(measured.output) == before


def test_a_changed_study_is_measured_anew(measured: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(measured.output, tmp_path / "out")
    changed = replace(measured, output=tmp_path / "out", probe=ProbeSettings(rules="top_fraction=0.1"), redo=True)
    outcome, said = run(changed)
    assert outcome.is_complete
    assert "0 of 3 checkpoints are measured" in said
    run(replace(changed, output=tmp_path / "new"))
    assert table(tmp_path / "out") == table(tmp_path / "new")
    assert [row["mui"] for row in table(tmp_path / "out")] != [row["mui"] for row in table(measured.output)]


def test_tokens_may_be_told_later(measured: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(measured.output, tmp_path / "out")
    (model,) = measured.models
    _, said = run(replace(measured, output=tmp_path / "out", models=[replace(model, tokens_per_step=1e6)]))
    assert "3 of 3 checkpoints are measured" in said
    rows = table(tmp_path / "out")
    assert [row["tokens"] for row in rows] == [row["step"] * 1e6 for row in rows]
    assert [row | {"tokens": None} for row in rows] == table(measured.output)
    found = open_study(tmp_path / "out")
    assert tuple(record.checkpoint for record in found.records) == found.planned


def test_another_repository_of_the_same_name(measured: StudyConfig) -> None:
    one, other = (
        identity.identity_of(measured, ModelConfig(source), {"sums": "…"}) for source in ("alice/tiny", "bob/tiny")
    )
    assert one != other
    with pytest.raises(MUIError, match=r"model\.source was alice/tiny, is bob/tiny"):
        identity.check_unchanged(measured.output, {"tiny": one}, {"tiny": other})


def test_a_plan_that_is_replaced_meanwhile(
    measured: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(measured.output, tmp_path / "out")
    config = replace(measured, output=tmp_path / "out")
    (model,) = config.models
    other = replace(config, models=[replace(model, name="other", checkpoints=["checkpoint-5"])])
    write_rows = run_module.write_rows

    def replaced(file: Path, rows: Any) -> None:
        monkeypatch.setattr(run_module, "write_rows", write_rows)
        write_rows(file, rows)
        StudyPlan.of(config).write()

    monkeypatch.setattr(run_module, "write_rows", replaced)
    outcome, _ = run(other)
    assert (outcome.n_planned, outcome.n_measured) == (1, 0)


def test_what_changes_no_number(measured: StudyConfig) -> None:
    """Batches, and, where nothing is generated, how answers would be."""
    tasks = [replace(task, max_new_tokens=9, stop=["x"]) for task in measured.tasks]
    outcome, said = run(replace(measured, probe=replace(measured.probe, batch_tokens=16), tasks=tasks))
    assert outcome.is_complete
    assert "3 of 3 checkpoints are measured" in said


def test_broken_and_missing_checkpoints(source: Path, measured: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-10" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40_000])
    names = ["checkpoint-5", "checkpoint-7", "checkpoint-10", "checkpoint-20"]
    model = ModelConfig(str(tmp_path / "run"), checkpoints=names)
    config = replace(measured, output=tmp_path / "out", models=[model])
    outcome, said = run(config)
    assert not outcome.is_complete
    assert {one.label for one in outcome.failures} == {"checkpoint-7", "checkpoint-10"}
    assert "checkpoint-7: there is no such directory" in said
    assert "2 of 4 checkpoints are not measured" in said
    rows = [row for row in table(measured.output) if row["step"] != 10]
    assert table(tmp_path / "out") == rows
    told = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [one["checkpoint"]["label"] for one in told] == ["checkpoint-7", "checkpoint-10"]
    weights.write_bytes(whole)
    outcome, said = run(replace(config, models=[replace(model, checkpoints=["checkpoint-*"])]))
    assert outcome.is_complete
    assert table(tmp_path / "out") == table(measured.output)


def test_other_weights_at_the_same_place(source: Path, measured: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "run")
    shutil.copytree(measured.output, tmp_path / "out")
    config = replace(measured, output=tmp_path / "out", models=[ModelConfig(str(tmp_path / "run"))])
    _, said = run(config)  # a copy is what it was
    assert "3 of 3 checkpoints are measured" in said
    build("qwen2_moe", seed=77).save_pretrained(tmp_path / "run" / "checkpoint-10")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")  # measured, and deleted since
    (model,) = config.models
    names = [f"checkpoint-{step}" for step in STEPS]
    outcome, said = run(replace(config, models=[replace(model, checkpoints=names)]))
    assert "checkpoint-10: other files than those that were measured" in said
    assert "2 of 3 checkpoints are measured" in said
    assert outcome.is_complete
    now, before = table(tmp_path / "out"), table(measured.output)
    assert [one == other for one, other in zip(now, before, strict=True)] == [True] * 2 + [False] * 2 + [True] * 2


def test_what_tells_a_checkpoint_from_another(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(source / "checkpoint-5", path)
    place = ModelDirectory(ModelSource(str(path)))
    seen = [place.weights]
    weights = load_file(path / "model.safetensors")
    weights = {name: -tensor if "layers.1.mlp.experts" in name else tensor for name, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})  # neither the first nor the last
    seen.append(place.weights)
    for name in ("config.json", "tokenizer_config.json"):
        (path / name).write_text((path / name).read_text() + "\n")
        seen.append(place.weights)
    assert None not in seen
    assert len(set(seen)) == 4
    (path / "trainer_state.json").write_text("{}")  # says nothing of the model
    assert place.weights == seen[-1]
    (path / "model.safetensors").unlink()
    assert place.weights is None


def test_checkpoints_that_were_deleted_since(source: Path, measured: StudyConfig, tmp_path: Path) -> None:
    """As a Trainer does that keeps the last ones only."""
    shutil.copytree(source, tmp_path / "run")
    config = replace(measured, output=tmp_path / "out", models=[ModelConfig(str(tmp_path / "run"))])
    shutil.move(tmp_path / "run" / "checkpoint-20", tmp_path / "later")
    run(config)
    shutil.move(tmp_path / "later", tmp_path / "run" / "checkpoint-20")
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    outcome, said = run(config)
    assert "2 of 3 checkpoints are measured" in said
    assert outcome.is_complete
    assert table(tmp_path / "out") == table(measured.output)
    assert run(replace(config, models=[replace(config.models[0], checkpoints=["*-10"])]))[0].n_planned == 1


def test_a_study_that_measured_nothing_can_be_corrected(source: Path, measured: StudyConfig, tmp_path: Path) -> None:
    wrong = ModelConfig(str(source), tokenizer=str(tmp_path / "no"), checkpoints=["checkpoint-5"])
    outcome, said = run(replace(measured, output=tmp_path / "out", models=[wrong]))
    assert outcome.n_measured == 0
    assert "the same command tries again" in said
    assert "mui-callback report" not in said
    outcome, said = run(replace(measured, output=tmp_path / "out"))
    assert outcome.is_complete
    assert "mui-callback report" in said


def test_a_task_in_which_nothing_is_scored_is_not_measured(
    source: Path, tasks: list[TaskConfig], tmp_path: Path
) -> None:
    tokenizer = made_tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel()  # no token begins a text
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = ModelConfig(str(source), tokenizer=str(tmp_path / "tokenizer"), checkpoints=["checkpoint-5"])
    letters = save_tasks(tmp_path / "tasks", letters=[{"response": letter} for letter in "abc"])
    outcome, said = run(StudyConfig(tmp_path / "out", [model], [*tasks, *letters], probe=PROBE, device="cpu"))
    assert outcome.n_measured == 0
    assert "task 'letters': expected tokens to score, got none in 3 samples" in said


def test_a_path_that_is_not_there_is_said_before_anything_is_measured(measured: StudyConfig, tmp_path: Path) -> None:
    elsewhere = ModelConfig(str(tmp_path / "no"))
    with pytest.raises(MUIError, match=f"^{tmp_path}/no: there is no such path$"):
        run(replace(measured, output=tmp_path / "out", models=[*measured.models, elsewhere]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cdua", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(device: str, measured: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(
        MUIError, match=f"device: expected cpu, cuda, cuda:1 or auto, and that it is there, got .{device}"
    ):
        run(replace(measured, output=tmp_path / "out", device=device))
    assert not (tmp_path / "out").exists()


def test_an_interrupt(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measure = run_module.Measuring.measure

    def interrupted(self: Any, checkpoint: Any) -> Any:
        if checkpoint.id.step == 10:
            raise KeyboardInterrupt
        return measure(self, checkpoint)

    monkeypatch.setattr(run_module.Measuring, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["trajectory", str(config_file)])
    assert stop.value.code == 130
    assert capsys.readouterr().out.endswith("stopped; the same command goes on\n")
    assert len(table(config_file.parent / "out")) == 2


def test_models_side_by_side(source: Path, tasks: list[TaskConfig], measured: StudyConfig, tmp_path: Path) -> None:
    other = save_checkpoints(tmp_path / "other", [30], "gpt_oss")
    models = [ModelConfig(str(other), name="another"), *measured.models]
    config = replace(measured, output=tmp_path / "out", models=models, tasks=tasks)
    outcome, _ = run(config)
    assert outcome.is_complete
    rows = table(tmp_path / "out")
    assert [row["model"] for row in rows] == ["another"] * 2 + ["run"] * 6
    assert rows[0]["shared_share"] is None
    assert rows[2:] == table(measured.output)


def test_answers_of_the_model(measured: StudyConfig, tmp_path: Path) -> None:
    config = replace(measured, output=tmp_path, response="generate")
    outcome, _ = run(config)
    assert outcome.is_complete
    rows = table(tmp_path)
    assert {row["response"] for row in rows} == {"generate"}
    assert {row["performance_axis"] for row in rows} == {"answer_accuracy"}
    for row in rows:
        assert 0 <= row["performance_low"] <= row["performance"] <= row["performance_high"] <= 1
        assert row["higher_is_better"]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "generations").iterdir()}
    assert len(files) == len(rows)
    run(replace(config, probe=ProbeSettings(rules="top_fraction=0.1"), redo=True))  # the answers are the same
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "generations").iterdir()} == files
    assert [row["loss"] for row in table(tmp_path)] == [row["loss"] for row in rows]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_answers_of_other_weights_are_not_taken(source: Path, measured: StudyConfig, tmp_path: Path) -> None:
    shutil.copytree(source / "checkpoint-10", tmp_path / "model")
    config = replace(measured, output=tmp_path / "out", models=[ModelConfig(str(tmp_path / "model"))])
    config = replace(config, response="generate")
    run(config)
    build("qwen2_moe", seed=77).save_pretrained(tmp_path / "model")
    run(config)
    run(replace(config, output=tmp_path / "fresh"))
    assert table(tmp_path / "out") == table(tmp_path / "fresh")


def test_performance_of_the_harness(measured: StudyConfig, source: Path, tmp_path: Path) -> None:
    from mui_callback.benchmarks.lm_eval import LMEvalBenchmark
    from mui_callback.benchmarks.run import run_benchmarks
    from mui_callback.benchmarks.tasks import LMEval
    from test_lm_eval import tasks

    path = tasks(tmp_path)["choose"]
    (model,) = measured.models
    config = replace(
        measured,
        output=tmp_path / "out",
        models=[replace(model, checkpoints=["checkpoint-10"])],
        lm_eval=[path],
        lm_eval_limit=6,
        performance={"words": "choose/acc_norm"},
    )
    run(config)
    rows = {row["task"]: row for row in table(tmp_path / "out")}
    live = AutoModelForCausalLM.from_pretrained(source / "checkpoint-10")
    expected, _ = run_benchmarks([LMEvalBenchmark(LMEval([path], limit=6), ByT5Tokenizer())], live, 0)
    assert rows["words"]["performance_axis"] == "benchmark/choose/acc_norm"
    assert rows["words"]["performance"] == expected["choose/acc_norm"].value
    assert rows["words"]["performance_low"] < rows["words"]["performance"] < rows["words"]["performance_high"]
    assert rows["sums"]["performance_axis"] == "loss"
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert {row["score"]: row["value"] for row in scores} == {name: one.value for name, one in expected.items()}
    assert {row["checkpoint"] for row in scores} == {"checkpoint-10"}
    outcome, said = run(replace(config, output=tmp_path / "other", performance={"words": "choose/f1"}))
    assert not outcome.is_complete
    assert "performance: lm-eval gave no 'choose/f1'; it gave choose/acc, choose/acc_norm" in said


@pytest.fixture
def config_file(source: Path, tasks: list[TaskConfig], tmp_path: Path) -> Path:
    stored: dict[str, Any] = {
        "output": str(tmp_path / "out"),
        "models": [{"source": str(source)}],
        "tasks": [{"name": task.name, "file": str(task.file)} for task in tasks],
        "probe": {"rules": "top_fraction=0.05"},
        "device": "cpu",
    }
    (tmp_path / "study.yaml").write_text(json.dumps(stored))  # which is YAML, too
    return tmp_path / "study.yaml"


def test_dry_run(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["trajectory", str(config_file), "--dry-run"])
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for shown in ("checkpoint-5 ", "checkpoint-20 ", "to do", "sums: 5 samples", "A probe of run: "):
        assert shown in said


def test_exit_status(config_file: Path, tmp_path: Path, measured: StudyConfig) -> None:
    whole = config_file.read_text()
    stored = json.loads(whole)
    stored["models"][0]["checkpoints"] = ["checkpoint-5", "checkpoint-6"]
    config_file.write_text(json.dumps(stored))
    with pytest.raises(SystemExit) as stop:
        main(["trajectory", str(config_file)])
    assert stop.value.code == 1
    config_file.write_text(whole)
    main(["trajectory", str(config_file)])
    assert [row["mui"] for row in table(tmp_path / "out")] == [row["mui"] for row in table(measured.output)]


def test_what_lies_beside_the_checkpoints_is_in_the_identity(
    measured: StudyConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source / "checkpoint-5", tmp_path / "tokenizer")
    (tmp_path / "made_here.py").write_text("def build():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = ModelConfig(str(source), tokenizer=str(tmp_path / "tokenizer"), architecture="made_here:build")
    changed = [identity.identity_of(measured, model, {})]
    for file in (tmp_path / "tokenizer" / "tokenizer_config.json", tmp_path / "made_here.py"):
        file.write_text(file.read_text() + "\n")
        changed.append(identity.identity_of(measured, model, {}))
    (tmp_path / "tokenizer" / "model.safetensors").unlink()
    changed.append(identity.identity_of(measured, model, {}))
    assert [one == other for one, other in pairwise(changed)] == [False, False, True]
