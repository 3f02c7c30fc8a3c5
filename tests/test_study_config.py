"""The config of a study: from a file, the environment and the command line, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mui_callback.errors import MUIError
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.config import ModelConfig, StudyConfig
from mui_callback.trajectory.parser import parse_study

STUDY = """\
output: out
models:
  - source: a/model
    checkpoints: [one, "two*"]
tasks:
  - name: sums
    file: sums.jsonl
    max_new_tokens: 7
probe:
  rules: top_fraction=0.002
keep_checkpoints: 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def test_from_a_file(file: Path) -> None:
    study, is_dry_run = parse_study([str(file)])
    assert not is_dry_run
    assert (study.output, study.keep_checkpoints, study.response) == (Path("out"), 3, "gold")
    assert study.models == [ModelConfig("a/model", checkpoints=["one", "two*"])]
    assert (study.tasks[0].name, study.tasks[0].file, study.tasks[0].max_new_tokens) == ("sums", Path("sums.jsonl"), 7)
    assert study.probe.rules == ("top_fraction=0.002",)
    assert study.title == "out"


def test_the_command_line_goes_before_the_file_and_the_file_before_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUI_KEEP_CHECKPOINTS", "5")
    monkeypatch.setenv("MUI_RESPONSE", "generate")
    study, is_dry_run = parse_study([str(file), "--dry-run", "--output", "elsewhere", "--probe.rules", "topscore=0.5"])
    assert is_dry_run
    assert (study.output, study.keep_checkpoints, study.response) == (Path("elsewhere"), 3, "generate")
    assert study.probe.rules == ("topscore=0.5",)
    same, _ = parse_study(["--config", str(file)])
    assert same.keep_checkpoints == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "max_new_tokens",
            "max_tokens",
            ":8: unknown key 'max_tokens' in entry 1 of tasks; did you mean max_new_tokens?",
        ),
        ("keep_checkpoints", "keep_checkpoint", ":11: unknown key 'keep_checkpoint'; did you mean keep_checkpoints?"),
        ("  rules", "  rule", ":10: unknown key 'rule' in probe; did you mean rules?"),
        ("keep_checkpoints: 3", "output: b", ":11: 'output' is there twice"),
        ("keep_checkpoints: 3", "zzz: b", ":11: unknown key 'zzz'; there is output, models, "),
        ("probe:", "probe: [", "expected YAML, got something else: "),
    ],
)
def test_a_mistake_in_a_file(old: str, new: str, said: str, file: Path) -> None:
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(MUIError) as error:
        parse_study([str(file)])
    assert str(error.value).startswith(str(file))
    assert said in str(error.value)


def test_all_mistakes_at_once(file: Path) -> None:
    file.write_text(STUDY.replace("file:", "fil:").replace("probe:", "prob:"))
    with pytest.raises(MUIError) as error:
        parse_study([str(file)])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [f"{file}:7", f"{file}:9"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep_checkpoint", "3"], "unknown option --keep_checkpoint; did you mean keep_checkpoints?"),
        (["--probe.batch_token=3"], "unknown option --probe.batch_token; did you mean probe.batch_tokens?"),
        (["--keep_checkpoints", "-1"], "keep_checkpoints: expected a number of at least 0, or null, got -1"),
        (["--probe.rules", "half"], "rules: expected a rule such as .*, got 'half'"),
        (["--performance", "{arc: arc/acc}"], "performance: there is no task 'arc'"),
    ],
)
def test_a_mistake_on_the_command_line(arguments: list[str], said: str, file: Path) -> None:
    with pytest.raises((MUIError, ValueError), match=said):
        parse_study([str(file), *arguments])


@pytest.mark.parametrize(
    ("asked", "described"),
    [
        ("--help", "Downloaded checkpoints that stay in the cache"),
        ("--models.help", "evenly spaced, the first and the last"),
        ("--tasks.help", "Expression for the list of alternatives"),
    ],
)
def test_the_help_describes_keys(asked: str, described: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_study([asked])
    assert stop.value.code == 0
    assert described in " ".join(capsys.readouterr().out.split())


def test_keys_of_another_mapping(file: Path) -> None:
    merged = "  - <<: &same {split: dev, max_samples: 5}\n    name: sums"
    file.write_text(STUDY.replace("  - name: sums", merged) + "  # more\n")
    study, _ = parse_study([str(file)])
    assert (study.tasks[0].name, study.tasks[0].split, study.tasks[0].max_samples) == ("sums", "dev", 5)
    file.write_text(file.read_text().replace("split: dev", "splt: dev"))
    with pytest.raises(MUIError, match="unknown key 'splt' in entry 1 of tasks; did you mean split"):
        parse_study([str(file)])


def test_options_may_have_dashes(file: Path) -> None:
    study, _ = parse_study([str(file), "--keep-checkpoints=1", "--probe.batch-tokens", "9", "--redo"])
    assert (study.keep_checkpoints, study.probe.batch_tokens, study.redo) == (1, 9, True)


@pytest.mark.parametrize(
    ("arguments", "is_anew", "is_dry_run"),
    [
        (["FILE", "--redo", "true"], True, False),
        (["FILE", "--redo", "false", "--dry-run"], False, True),
        (["FILE", "--redo=false"], False, False),
        (["--redo", "False", "FILE"], False, False),
        (["--redo=true", "FILE"], True, False),
        (["FILE", "--redo", "--dry-run"], True, True),
        (["--dry-run", "FILE"], False, True),
        (["--redo", "--dry-run", "FILE", "--keep-checkpoints", "2"], True, True),
    ],
)
def test_switches_may_have_values_and_come_first(
    arguments: list[str], is_anew: bool, is_dry_run: bool, file: Path
) -> None:
    study, parsed = parse_study([str(file) if argument == "FILE" else argument for argument in arguments])
    assert (study.redo, parsed) == (is_anew, is_dry_run)
    assert study.keep_checkpoints == (2 if "2" in arguments else 3)


def test_the_output_may_be_at_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    study, _ = parse_study([str(file), "--output", "~/mine"])
    assert study.output == Path("/somewhere/mine")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MUIError, match=r"no\.yaml: expected the config of a study, got No such file"):
        parse_study([str(tmp_path / "no.yaml")])


def test_a_value_of_another_type(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_study([str(file), "--keep_checkpoints", "many"])
    assert stop.value.code == 2
    assert "keep_checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "said"),
    [([], "one or more models"), ([ModelConfig("a/x"), ModelConfig("b/x")], "expected different names, got 'x' twice")],
)
def test_models_that_cannot_be(models: list[ModelConfig], said: str, file: Path) -> None:
    study, _ = parse_study([str(file)])
    with pytest.raises(ValueError, match=said):
        StudyConfig(study.output, models, study.tasks)


@pytest.mark.parametrize(
    ("label", "step", "tokens"),
    [
        ("step120000-tokens503B", 120_000, 503e9),
        ("checkpoint-500", 500, None),
        ("global_step20", 20, None),
        ("epoch=1-step=300.ckpt", 300, None),
        ("iter_0001000", 1000, None),
        ("stage1-step10000-tokens42B", 10_000, 42e9),
        ("1.5T-tokens", None, 1.5e12),
        ("ckpt100B-tokens", None, None),
        ("step500k-tokens1.5T", 500_000, 1.5e12),
        ("step=1000-tokens=3.5e9.ckpt", 1000, None),
        ("checkpoint-7b", None, None),
        ("step1,000", None, None),
        ("main", None, None),
        ("footstep9", None, None),
    ],
)
def test_what_a_label_says(label: str, step: int | None, tokens: float | None) -> None:
    checkpoint = CheckpointId.named("m", label)
    assert (checkpoint.step, checkpoint.tokens) == (step, tokens)


def test_tokens_of_steps() -> None:
    assert CheckpointId.named("m", "checkpoint-10", tokens_per_step=4e6).tokens == 4e7
    assert CheckpointId.named("m", "step10-tokens2B", tokens_per_step=4e6).tokens == 2e9


def test_slugs_differ() -> None:
    ids = [CheckpointId(*names) for names in (("a", "b--c"), ("a--b", "c"), ("a/b", "c"), ("a b", "c"), ("a", "B--c"))]
    assert len({one.slug.lower() for one in ids}) == len(ids)
    assert all("/" not in one.slug for one in ids)
