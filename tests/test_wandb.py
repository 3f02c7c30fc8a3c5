"""What a real (offline) W&B run holds afterwards, read back by W&B itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mui_callback.metrics.catalogue import CATALOGUE, key
from mui_callback.pictures.scene import HISTOGRAM_KEY, PICTURE_STEP_KEY, PICTURES, TABLE_KEY
from training import STEPS

HERE = Path(__file__).parent
X = "train/global_step"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, each in a folder of its name."""
    directory = tmp_path_factory.mktemp("wandb_runs")
    # Another test of this process may have had a run, and left its service and settings in the environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**clean, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, str(HERE / "wandb_training.py"), str(directory)]
    subprocess.run(command, env=environment, check=True, timeout=600, cwd=HERE)
    return directory


@cache
def recorded(directory: Path, way: str) -> list[dict[str, Any]]:
    """The records of the run's own file."""
    (run_dir,) = (directory / way / "wandb").glob("offline-run-*")
    wandb = shutil.which("wandb", path=Path(sys.executable).parent)
    assert wandb is not None
    inspect = [wandb, "leet", "inspect", "--json", str(run_dir)]
    shown = subprocess.run(inspect, capture_output=True, check=True, timeout=120, text=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def mui_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in history(records) if "mui/mui" in row]


def picture_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = tuple(f"mui/pictures/{name}." for name in PICTURES)
    return [row for row in history(records) if any(name.startswith(names) for name in row)]


def assert_pictures(records: list[dict[str, Any]], folder: Path, steps: dict[int, int]) -> None:
    """Each row of pictures has all of them, with captions and files, at the x of its point; the last one is there.

    Args:
        records: of a run.
        folder: of the run.
        steps: the x of each point by its step.
    """
    x = PICTURE_STEP_KEY
    rows = picture_rows(records)
    assert [row[x] for row in rows] == sorted(row[x] for row in rows)
    of_x = {place: step for step, place in steps.items()}
    assert list(steps.values())[-1] == rows[-1][x]
    (files,) = (folder / "wandb").glob("offline-run-*/files")
    for row in rows:
        keys = {name.rpartition(".")[0] for name in row if name.startswith(("mui/pictures/", "mui/histograms/"))} - {""}
        assert keys == {f"mui/pictures/{name}" for name in PICTURES} | {HISTOGRAM_KEY}
        assert len(keys) <= 6
        for name in PICTURES:
            picture = {part: row[f"mui/pictures/{name}.{part}"] for part in ("path", "caption", "width", "size")}
            assert f"Step {of_x[row[x]]}, " in picture["caption"]
            with Image.open(files / picture["path"]) as image:
                assert (image.format, image.width) == ("PNG", picture["width"])
            assert (files / picture["path"]).stat().st_size == picture["size"] < 150 * 1024
        assert sum(row[f"{HISTOGRAM_KEY}.values"]) == 16  # experts


@pytest.fixture(scope="module")
def with_trainer(directory: Path) -> list[dict[str, Any]]:
    return recorded(directory, "trainer")


def test_keys_are_those_of_the_catalogue(with_trainer: list[dict[str, Any]]) -> None:
    possible = {key(m.name) for m in CATALOGUE} | {key(m.name, "a") for m in CATALOGUE if m.scope.is_per_task}
    assert mui_rows(with_trainer)
    for row in mui_rows(with_trainer):
        logged = {name for name in row if not name.startswith("_")} - {X}
        assert logged <= possible
        assert {"mui/mui", "mui/a/mui", "mui/a/loss", "mui/shared_share", "mui/expert_gini"} <= logged


def test_steps_and_values_are_those_of_the_record(with_trainer: list[dict[str, Any]], directory: Path) -> None:
    lines = [json.loads(line) for line in (directory / "trainer" / "mui.jsonl").read_text().splitlines()][1:]
    logged = mui_rows(with_trainer)
    assert [row[X] for row in logged] == [line["step"] for line in lines] == [0, 3, 6, STEPS]
    for row, line in zip(logged, lines, strict=True):
        assert {name: row[name] for name in line["scalars"]} == pytest.approx(line["scalars"])


def test_the_loss_is_on_the_same_axis_and_untouched(with_trainer: list[dict[str, Any]], directory: Path) -> None:
    plain = recorded(directory, "plain")

    def losses(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
        return [(row[X], row["train/loss"]) for row in history(records) if "train/loss" in row]

    assert [step for step, _ in losses(with_trainer)] == [2, 4, 6, 8]
    assert losses(with_trainer) == losses(plain)


def test_pictures_are_at_the_step_of_their_point(with_trainer: list[dict[str, Any]], directory: Path) -> None:
    assert_pictures(with_trainer, directory / "trainer", {step: step for step in (0, 3, 6, STEPS)})


def test_only_the_last_pictures_and_a_table(directory: Path) -> None:
    records = recorded(directory, "table")
    assert_pictures(records, directory / "table", {step: step for step in (0, 3, 6, STEPS)})
    assert len(picture_rows(records)) == 1
    (row,) = [row for row in history(records) if f"{TABLE_KEY}._type" in row]
    assert row[PICTURE_STEP_KEY] == STEPS
    (files,) = (directory / "table" / "wandb").glob("offline-run-*/files")
    table = json.loads((files / row[f"{TABLE_KEY}.path"]).read_text())
    assert table["columns"][:3] == ["expert", "layer", "kind"]
    names = [*(f"E{number}" for number in range(6)), "S1", "S2"]
    assert [one[0] for one in table["data"]] == [f"L{layer}-{name}" for layer in (0, 1) for name in names]


def test_the_axis_is_defined(with_trainer: list[dict[str, Any]]) -> None:
    metrics = [record["metric"] for record in with_trainer if record["type"] == "metric"]
    assert [m["step_metric"] for m in metrics if m.get("glob_name") == "mui/*"] == [X]
    steps = [row["_step"] for row in history(with_trainer)]
    assert steps == sorted(set(steps))  # no row was dropped or merged by W&B's own counter


def summaries(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last of each key."""
    found: dict[str, Any] = {}
    for record in records:
        if record["type"] == "summary":
            found |= record["summary"]["update"]
    return found


@pytest.mark.parametrize(("reporter", "x"), [("trainer", X), ("lightning", "trainer/global_step")])
def test_a_run_is_summed_up_by_what_is_best_or_most_alarming(reporter: str, x: str, directory: Path) -> None:
    records = recorded(directory, reporter)
    rows, summary = mui_rows(records), summaries(records)
    for name in ("mui/loss", "mui/a/loss", "mui/a/token_accuracy", "mui/dead_experts", "mui/mui", "mui/a/mui"):
        values = [row[name] for row in rows]
        expected: Any = {"last": values[-1]}
        if name.endswith("loss"):
            expected["min"] = min(values)
        elif name.endswith(("accuracy", "dead_experts")):
            expected["max"] = max(values)
        else:
            expected = values[-1]
        assert summary[name] == pytest.approx(expected), name
    defined = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {m["name"]: m.get("step_metric") for m in defined if m.get("name", "").startswith("mui/")}
    assert {axes.pop(name) for name in list(axes) if name.startswith(("mui/pictures", "mui/histograms"))} == {
        PICTURE_STEP_KEY, None
    }  # fmt: skip
    assert set(axes.values()) == {x}
    places = [row[x] for row in history(records) if x in row]
    assert places == sorted(places)  # pictures, which come later, take the axis of the trainer nowhere
    assert summary[x] == places[-1]
    hidden = {m["name"] for m in defined if m["options"].get("hidden")}
    assert {"mui/loss_low", "mui/loss_high", "mui/unscored", "mui/seconds"} <= hidden
    assert not {"mui/mui", "mui/a/loss", "mui/expert_gini", "mui/overhead", x} & hidden


def test_alerts_are_sent(directory: Path) -> None:
    alerts = [record["alert"] for record in recorded(directory, "ruin") if record["type"] == "alert"]
    lines = [json.loads(line) for line in (directory / "ruin" / "mui.jsonl").read_text().splitlines()]
    told = [one for line in lines for one in line.get("alerts", [])]
    assert [(one["title"], one["text"]) for one in alerts] == [(one["title"], one["text"]) for one in told]
    assert {"MUI: collapsing", "MUI: coarsening"} & {one["title"] for one in alerts}


def test_a_run_of_the_users_own(directory: Path) -> None:
    records = recorded(directory, "mine")
    assert [row[X] for row in mui_rows(records)] == [0, 3, 6, STEPS]
    assert {record["run"]["project"] for record in records if record["type"] == "run"} == {"mine"}


def test_lightning_has_the_same_keys_on_the_x_axis_of_its_loss(
    directory: Path, with_trainer: list[dict[str, Any]]
) -> None:
    records = recorded(directory, "lightning")
    x = "trainer/global_step"
    rows = mui_rows(records)
    assert [row[x] for row in rows] == [0, 2, 5, 7]  # Lightning counts from 0
    assert [row[x] for row in history(records) if "train/loss" in row] == list(range(STEPS))

    first, same = rows[0], mui_rows(with_trainer)[0]
    assert_pictures(records, directory / "lightning", {0: 0, 3: 2, 6: 5, STEPS: 7})

    logged = [{name for name in row if name.startswith("mui/")} for row in (first, same)]
    assert logged[0] == logged[1]
    assert all(first[name] == same[name] for name in logged[0] - {"mui/seconds"})  # the model is the same, too


@pytest.mark.parametrize("logs", ["steps", "rows", "nothing"])
def test_a_loop_that_logs_by_itself_loses_no_row_and_no_point(logs: str, directory: Path) -> None:
    records = recorded(directory, f"loop-{logs}")
    assert [row["mui/step"] for row in mui_rows(records)] == [0, 3, 6, STEPS]
    losses = [row for row in history(records) if "loss" in row]
    assert [row["loss"] for row in losses] == ([] if logs == "nothing" else list(range(STEPS)))
    if logs == "steps":
        assert [row["_step"] for row in losses] == list(range(STEPS))
    assert_pictures(records, directory / f"loop-{logs}", {step: step for step in (0, 3, 6, STEPS)})
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert [m["step_metric"] for m in metrics if m.get("glob_name") == "mui/*"] == ["mui/step"]
