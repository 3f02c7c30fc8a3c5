"""The same keys and values in every tracker, each a real one, read back with its own tools."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mui_callback.sinks.mlflow import MLflowSink

HERE = Path(__file__).parent
Values = dict[int, dict[str, float]]
"""By step and key."""
COUNTED_FROM_0 = {0: 0, 3: 2, 6: 5, 8: 7}
"""Steps as Lightning's loggers have them."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, each in a folder of its name."""
    directory = tmp_path_factory.mktemp("trackers")
    # Another test of this process may have left settings in the environment.
    of_trackers = ("WANDB_", "MLFLOW_", "TRACKIO_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(of_trackers)}
    command = [sys.executable, str(HERE / "tracked_training.py"), str(directory)]
    subprocess.run(command, env=clean, check=True, timeout=300, cwd=HERE)
    return directory


def in_record(output_dir: Path) -> Values:
    lines = [json.loads(line) for line in (output_dir / "mui.jsonl").read_text().splitlines()]
    return {line["step"]: line["scalars"] for line in lines if "scalars" in line}


def collected(values: Iterable[tuple[int, str, float]]) -> Values:
    """By step and key; what is ours comes once."""
    found: Values = {}
    for step, key, value in values:
        of_step = found.setdefault(int(step), {})
        assert key not in of_step or not key.startswith("mui/"), f"{key} twice at step {step}"
        of_step[key] = float(value)
    return dict(sorted(found.items()))


def in_tensorboard(output_dir: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [EventAccumulator(str(file)).Reload() for file in output_dir.rglob("events.out.tfevents.*")]
    of_keys = [(key, file.Scalars(key)) for file in files for key in file.Tags()["scalars"]]
    return collected((event.step, key, event.value) for key, events in of_keys for event in events)


def in_mlflow(output_dir: Path) -> Values:
    """From the files of its store: time, value and step in each line."""
    files = [path for directory in output_dir.glob("mlruns/*/*/metrics") for path in directory.rglob("*")]
    lines = [(path, line.split()) for path in files if path.is_file() for line in path.read_text().splitlines()]
    return collected((line[2], str(path).partition("/metrics/")[2], line[1]) for path, line in lines)


def in_csv(output_dir: Path) -> Values:
    (file,) = output_dir.rglob("metrics.csv")
    rows = csv.DictReader(file.read_text().splitlines())
    return collected((row["step"], key, value) for row in rows for key, value in row.items() if value)


def in_trackio(output_dir: Path, step_key: str = "train/global_step") -> Values:
    program = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps([row for run in S.get_runs('huggingface') for row in S.get_logs('huggingface', run)]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(output_dir / "trackio")}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    rows = json.loads(shown.stdout.splitlines()[-1])
    return collected(
        (row[step_key], key, value)
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and step_key in row
    )


def only_mui(values: Values) -> Values:
    kept = {step: {key: of[key] for key in of if key.startswith("mui/")} for step, of in values.items()}
    for of_step in kept.values():
        of_step.pop("mui/step", None)
    return {step: of for step, of in kept.items() if of}


def assert_same(found: Values, expected: Values) -> None:
    assert list(only_mui(found)) == list(expected)
    for step, values in expected.items():
        assert only_mui(found)[step] == pytest.approx(values, rel=1e-6), step


READERS = {"csv": in_csv, "tensorboard": in_tensorboard, "mlflow": in_mlflow, "trackio": in_trackio}


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "trackio"])
def test_reporters_of_transformers(tracker: str, directory: Path) -> None:
    output_dir = directory / "transformers"
    found = READERS[tracker](output_dir)
    assert list(in_record(output_dir)) == [0, 3, 6, 8]
    assert_same(found, in_record(output_dir))
    assert {step for step, values in found.items() if {"train/loss", "loss"} & values.keys()} == {2, 4, 6, 8}


@pytest.mark.parametrize("tracker", ["csv", "tensorboard", "mlflow"])
def test_loggers_of_lightning(tracker: str, directory: Path) -> None:
    output_dir = directory / "lightning"
    found = READERS[tracker](output_dir)
    points = in_record(output_dir)
    assert list(points) == [0, 3, 6, 8]
    assert_same(found, {COUNTED_FROM_0[step]: scalars for step, scalars in points.items()})
    assert {step for step, values in found.items() if "train/loss" in values} == set(range(8))


def test_names_that_mlflow_cannot_tell_apart_stay_apart() -> None:
    sink = MLflowSink()
    for _ in range(2):
        renamed = sink._renamed({"mui/a?/mui": 1.0, "mui/a!/mui": 2.0, "mui/数学/mui": 3.0, "mui/代码/mui": 4.0})
        assert renamed == {"mui/a_/mui": 1.0, "mui/a_/mui_2": 2.0, "mui/数学/mui": 3.0, "mui/代码/mui": 4.0}


@pytest.mark.parametrize("tracker", READERS)
def test_trackers_of_a_loop(tracker: str, directory: Path) -> None:
    """MLflow refuses whole batches for the name of one metric."""
    output_dir = directory / "loop"
    found = in_trackio(output_dir, "mui/step") if tracker == "trackio" else READERS[tracker](output_dir)
    name = "über_" if tracker == "mlflow" else "über?"
    points = in_record(output_dir)
    assert list(points) == [0, 3, 6, 8]
    assert "mui/über?/mui" in points[0]
    renamed = {step: {key.replace("über?", name): of[key] for key in of} for step, of in points.items()}
    assert_same(found, renamed)


@contextmanager
def dashboard(output_dir: Path) -> Iterator[str]:
    """The address of Trackio's page."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"open_browser=False, host='127.0.0.1', server_port={port}, block_thread=True"
    program = f"import trackio; trackio.show(project='huggingface', {options})"
    environment = {**os.environ, "TRACKIO_DIR": str(output_dir / "trackio")}
    with (output_dir / "dashboard.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/?project=huggingface"
    finally:
        server.kill()
        server.wait()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_trackio_shows_it_in_a_browser(directory: Path, tmp_path: Path) -> None:
    with dashboard(directory / "transformers") as address:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--window-size=1500,4000",
        ]
        command = [BROWSER, *options, "--virtual-time-budget=10000", "--dump-dom", address]
        page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    text = re.sub(r"<[^>]*>", "\n", re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL))
    shown = {line.strip() for line in text.splitlines()}
    assert any(re.fullmatch(r"mui \(\d+\)", line) for line in shown)
    assert {"expert_gini", "shared_share", "mui_low", "overhead"} <= shown
