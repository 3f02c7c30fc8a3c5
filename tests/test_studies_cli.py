"""`mui-callback diversity`, `select` and `ablate` as a user types them, on tiny models that are saved and read back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import ByT5Tokenizer

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.cli import main
from mui_callback.metrics.ablation import LossChange, LossChanges
from mui_callback.metrics.diversity import compare
from mui_callback.metrics.resampling import Interval
from mui_callback.model_options import ModelOptions
from mui_callback.probe.ablation import AblationReport, TaskAblation
from mui_callback.studies.ablation_screen import show_ablation
from test_dense import dense_model
from tiny import build

RULES = "top_fraction=0.05"
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen2"
    build("qwen2_moe", moe_intermediate_size=32, shared_expert_intermediate_size=64).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sums, which are almost all the same, words of all kinds, and a data set of one sample."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    sets = {
        "sums": [{"prompt": f"{a}+1=", "response": "2"} for a in (1,) * 7 + (2, 3)],
        "words": [{"response": "".join(map(chr, rng.integers(33, 126, 12)))} for _ in range(12)],
        "one": [{"response": "a single sample"}],
    }
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / f"{name}.jsonl" for name in sets]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def in_new_directory(*arguments: object) -> tuple[int, str]:
        status, said = 0, ""
        try:
            main([*map(str, arguments)])
        except SystemExit as stop:
            status, said = (1, stop.code) if isinstance(stop.code, str) else (int(stop.code or 0), "")
        shown = capsys.readouterr()
        return status, shown.out + shown.err + said

    return in_new_directory


def measured(model: Path, files: list[Path], rules: str = RULES) -> tuple[MUIProbe, MUIReport]:
    options = ModelOptions(str(model))
    probe = MUIProbe(options.load(), ProbeSet.from_jsonl(files), tokenizer=ByT5Tokenizer(), rules=rules)
    return probe, probe.measure()


def test_diversity(model: Path, data: list[Path], run: Run, tmp_path: Path) -> None:
    status, shown = run("diversity", model, "--data", *data[:2], "--rules", RULES, "--json", "all.json")
    assert status == 0
    _, report = measured(model, data[:2])
    sets = {name: report.key_neuron_sets()[report.sample_table.task == i] for i, name in enumerate(report.task_names)}
    expected = compare(sets)
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["study"] == "diversity"
    assert found["model"]["rules"] == RULES
    assert found["comparison"]["size"] == 9
    for name, mui in expected.mui.items():
        assert found["comparison"]["mui"][name] == {"value": mui.value, "low": mui.low, "high": mui.high}
        assert found["data_sets"][name]["mui"] == report.tasks[name].mui
        assert f"{100 * mui.value:.2f}" in shown
    (difference,) = found["comparison"]["differences"]
    assert difference["is_clear"] is True
    assert "words has a higher MUI than sums" in shown
    assert (tmp_path / "diversity.png").stat().st_size > 10_000
    assert "Coverage curves: diversity.png\nAll numbers: all.json" in shown


def test_a_data_set_of_one_sample(model: Path, data: list[Path], run: Run, tmp_path: Path) -> None:
    status, shown = run("diversity", model, "--data", *data, "--json", "all.json", "--picture", "a.png")
    assert status == 0
    assert "one and words cannot be compared" in shown or "words and one cannot be compared" in shown
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["data_sets"]["one"]["total"] is None
    assert found["data_sets"]["one"]["curve"]["low"] is None
    assert {one["is_clear"] for one in found["comparison"]["differences"]} <= {None, True, False}


def test_select(model: Path, data: list[Path], run: Run, tmp_path: Path) -> None:
    arguments = ("--probe", *data, "--size", 6, "--output", "few", "--rules", RULES, "--json", "all.json")
    status, shown = run("select", model, *arguments)
    assert status == 0
    few = ProbeSet.from_jsonl(sorted((tmp_path / "few").glob("*.jsonl")))
    assert len(few) == 6
    _, whole = measured(model, data)
    _, part = measured(model, sorted((tmp_path / "few").glob("*.jsonl")))
    found = json.loads((tmp_path / "all.json").read_text())
    for index, task in enumerate(found["tasks"]):
        kept = len(part.key_neurons(task)) / len(whole.key_neurons(task)) if task in part.task_names else 0.0
        assert found["kept"]["by_task"][index][-1] == pytest.approx(kept)
    assert {(one["task"], one["id"]) for one in found["samples"]} == {
        (task, sample.id) for task, samples in few.tasks.items() for sample in samples
    }
    assert f"6 of 22 samples, with {100 * part.tokens / whole.tokens:.3g} % of the response tokens." in shown
    assert run("select", model, *arguments) == (1, "mui-callback: few: expected a new or an empty directory to write "
        "to, as nothing is overwritten")  # fmt: skip


@pytest.mark.parametrize("what", ["neurons", "experts"])
def test_ablate(what: Any, model: Path, data: list[Path], run: Run, tmp_path: Path) -> None:
    probe, report = measured(model, data)
    expected = probe.ablate(report, what=what, draws=2, seed=5)
    asked = ("--what", what, "--draws", 2, "--seed", 5, "--rules", RULES, "--json", "all.json")
    status, shown = run("ablate", model, "--probe", *data, *asked)
    assert status == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert (found["what"], found["draws"], found["seed"], list(found["tasks"])) == (
        what,
        2,
        5,
        ["sums", "words", "one"],
    )
    for task, one in expected.tasks.items():
        assert one.changes is not None
        changes = found["tasks"][task]["changes"]
        assert changes["difference"]["value"] == pytest.approx(one.changes.difference.value)
        assert changes["random_draws"] == pytest.approx(one.changes.random_draws)
        assert found["tasks"][task]["n_key"] == one.n_key
        line = next(line for line in shown.splitlines() if line.split()[:1] == [task])
        changed = [f"{change.value:+.3f}" for change in (one.changes.key, one.changes.random)]
        assert line.split() == [task, str(one.n_samples), str(one.n_key), f"{one.changes.loss:.3f}", *changed]
    assert "one: cannot be said from 1 sample" in shown


def test_what_has_a_default_of_its_own(model: Path, run: Run, tmp_path: Path) -> None:
    """The built-in samples, and a model without experts, without weights, in 16 bits."""
    config = tmp_path / "config"
    dense_model("llama").config.save_pretrained(config)
    ByT5Tokenizer().save_pretrained(config)
    asked = ("--dense", "--random-weights", "--dtype", "bfloat16", "--batch-tokens", 2000, "--max-length", 64)
    status, shown = run("ablate", config, *asked, "--draws", 1, "--json", "all.json")
    assert status == 0
    assert [line.split(":")[0] for line in shown.splitlines()[-5:-2]] == ["english", "code", "arithmetic"]
    assert "60 of 60 probe samples are too long" in shown
    assert "UserWarning" not in shown
    header = json.loads((tmp_path / "all.json").read_text())["model"]
    assert (header["dense"], header["random_weights"], header["dtype"], header["batch_tokens"]) == (
        True,
        True,
        "bfloat16",
        2000,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diversity", "{model}"], "are required: diversity.data"),
        (["diversity", "--data", "{data}", "{model}"], "model"),
        (["diversity", "{model}", "--data", "/no/such.jsonl"], "/no/such.jsonl"),
        (["diversity", "{model}", "--data", "{data}", "--at", "10"], "from 1 to 9, which is all that 'sums' has, got"),
        (["diversity", "{model}", "--data", "{data}", "--level", "95"], "expected a number in (0, 1), got 95"),
        (
            ["diversity", "{model}", "--data", "{data}", "--picture", "a.gif"],
            "a .png file in a directory that is there",
        ),
        (
            ["diversity", "{model}", "--data", "{data}", "--json", "no/a.json"],
            "a .json file in a directory that is there",
        ),
        (["diversity", "/no/such/model", "--data", "{data}"], "there is no such path"),
        (["select", "{model}", "--probe", "{data}"], "are required: select.output"),
        (["select", "{model}", "--probe", "{data}", "--output", "few"], "from 1 to the 9 that there are, got 64"),
        (["ablate", "{model}", "--draws", "0"], "draws: expected a positive number of random controls, got 0"),
        (["ablate", "{model}", "--what", "layers"], "layers"),
        (["ablate", "{model}", "--level", "1"], "level: expected a number in (0, 1), got 1"),
        (["ablate", "{model}", "--rules", "top=3"], "rules: expected a rule such as 'top_fraction=0.001'"),
        (["ablate", "{model}", "--revision", "main"], "expected a hub id with a revision, got a local path"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, model: Path, data: list[Path], run: Run) -> None:
    status, shown = run(*(one.format(model=model, data=data[0]) for one in arguments))
    assert status != 0
    assert message in " ".join(shown.split())
    assert "Traceback" not in shown


def test_a_model_without_a_tokenizer_or_experts(run: Run, data: list[Path], tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path / "mute")
    dense_model("llama").save_pretrained(tmp_path / "dense")
    status, shown = run("ablate", "mute")
    assert status == 1
    assert "the model has no tokenizer, which the built-in samples need" in shown
    for name, message in (("mute", "tokenizer"), ("dense", "has no MoE layer")):
        status, shown = run("diversity", name, "--data", data[0])
        assert status == 1
        assert message in shown


@pytest.mark.parametrize("command", ["inspect", "diversity", "select", "ablate"])
def test_all_commands_have_the_options_of_the_model(command: str, run: Run) -> None:
    _, shown = run(command, "--help")
    options = ("revision", "random-weights", "dtype", "device", "rules", "batch-tokens", "max-length", "dense")
    for option in (*options, "trust-remote-code", "allow-pickle"):
        assert f"--{option}" in shown
    assert "Python code that comes with the model" in " ".join(shown.split())


# The screen of the causal check


def change(value: float, low: float | None = None, high: float | None = None) -> LossChange:
    return LossChange(value, None if low is None or high is None else Interval(low, high, 0.95))


def task(difference: LossChange | None, n_samples: int = 9, n_overlap: int = 0) -> TaskAblation:
    changes = None if difference is None else LossChanges(2.0, change(1.5, 1, 2), change(0.5), difference, (0.5, 0.5))
    return TaskAblation(n_samples, 99, 1234, 1234, (n_overlap, 0), changes)


@pytest.mark.parametrize("width", [80, 160])
def test_the_outcome_is_said_in_words(width: int) -> None:
    tasks = {
        "more": task(change(1.0, 0.5, 1.5)),
        "less": task(change(-1.0, -1.5, -0.5)),
        "neither": task(change(0.1, -0.5, 0.7)),
        "a task of which there is one sample [1]": task(change(1.0), n_samples=1),
        "nothing": task(None),
        "silent": task(None, n_samples=0),
        "overlapping": task(change(1.0, 0.5, 1.5), n_overlap=617),
    }
    console = Console(width=width, record=True, file=io.StringIO())
    show_ablation(console, AblationReport("neurons", 2, 0.95, 0, tasks))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    said = " ".join(shown.split("samples and draws.")[1].split())
    for expected in (
        "more: key neurons matter more than random ones, by 0.500 to 1.500 nats less:",
        "less: key neurons matter less than random ones, by 0.500 to 1.500 nats neither:",
        "neither: key neurons and random ones cannot be told apart (-0.500 to +0.700 nats)",
        "one sample [1]: cannot be said from 1 sample nothing: no key neurons silent: no response token",
        "Of the random ones 25 % (overlapping) are key too, as there are too few others",
    ):
        assert expected in said
