"""Pictures are drawn beside the training, and whatever happens to them happens to nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb

from distributed_training import launch
from integrations import make_model, probe_set
from made import make_report
from mui_callback import MemorySink, MUICallback, MUIMonitor, ProbeSet
from mui_callback.pictures import sink as sink_module
from mui_callback.pictures.scene import HISTOGRAM_KEY, PICTURES, TABLE_KEY, picture_key
from mui_callback.pictures.sink import PictureSink
from mui_callback.pictures.studio import Studio, StudioError
from mui_callback.pictures.worker import Worker
from mui_callback.sinks.base import ProbePoint
from tiny_samples import make_samples
from training import STEPS, assert_same_to_the_bit, make_trainer, train

HERE = Path(__file__).parent


class Board:
    """A wall that keeps what is hung on it: (step, thread, values)."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.hung: list[tuple[int, str, Mapping[str, Any]]] = []
        self._fail = fail

    def place(self, step: int) -> Any:
        def hang(values: Mapping[str, Any], is_end: bool) -> None:
            self._fail()
            self.hung.append((step, threading.current_thread().name, values))

        return hang


def point(step: int) -> ProbePoint:
    return ProbePoint(step, report=make_report([{0, 1}, {2}], [0, 1]))


def drawn(sink: PictureSink, step: int) -> None:
    """Hand a point over and wait until it is drawn, or cannot be."""
    sink.write(point(step))
    worker = sink._worker
    while worker is not None and (worker._waiting or worker._is_busy):
        time.sleep(0.005)


# The worker


def test_the_newest_job_is_done_next_and_nothing_piles_up() -> None:
    started, go_on, done = threading.Event(), threading.Event(), []

    def work(job: int) -> int:
        started.set()
        assert go_on.wait(30)
        done.append(job)
        return job

    worker: Worker[int, int] = Worker(work, "test")
    worker.submit(0)
    assert started.wait(30)
    for job in range(1, 100):
        worker.submit(job)  # returns, though nothing is done
    assert not worker.has_news
    assert worker.take() == ([], None)
    go_on.set()
    assert worker.close(30)
    assert worker.has_news
    assert worker.take() == (done, None) == ([0, 99], None)
    assert worker.n_dropped == 98
    worker.submit(5)
    assert not worker.has_news


def test_results_that_nobody_takes_do_not_pile_up() -> None:
    worker: Worker[int, int] = Worker(lambda job: job, "test")
    for job in range(50):
        worker.submit(job)
        while not worker.take()[0] and job % 2:
            time.sleep(0.001)
    assert worker.close(30)
    assert len(worker.take()[0]) <= 4


def test_what_a_job_raises_comes_once_and_the_next_is_done() -> None:
    def work(job: int) -> float:
        return 1 / job

    worker: Worker[int, float] = Worker(work, "test")
    worker.submit(0)
    while not worker._error:
        time.sleep(0.001)
    worker.submit(2)
    assert worker.close(30)
    found, error = worker.take()
    assert found == [0.5]  # not lost, whatever another job raised
    assert isinstance(error, ZeroDivisionError)
    assert worker.take() == ([], None)


def test_a_job_without_end_is_not_waited_for() -> None:
    forever = threading.Event()
    worker: Worker[int, bool] = Worker(lambda _: forever.wait(60), "test")
    worker.submit(0)
    assert not worker.close(0.05)
    forever.set()


# The sink


def test_the_training_thread_logs_what_another_has_drawn() -> None:
    board = Board()
    sink = PictureSink([board])
    for step in (0, 5):
        drawn(sink, step)
        sink.between_points()
    assert [thread.name for thread in threading.enumerate()].count("mui-pictures") == 1  # for all points
    sink.close()
    assert [step for step, *_ in board.hung] == [0, 5]
    for _, thread, values in board.hung:
        assert thread == threading.current_thread().name
        assert values.keys() == {*(picture_key(name) for name in PICTURES), HISTOGRAM_KEY}
        assert all(isinstance(values[picture_key(name)], wandb.Image) for name in PICTURES)


@pytest.mark.parametrize(("pictures", "steps"), [(True, [0, 1, 2]), ("end", [2]), (False, [])])
def test_when_there_are_pictures(pictures: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PictureSink, "_draw", lambda _, job: (job[0], {"step": job[1].step}))
    board = Board()
    sink = PictureSink([board], pictures=pictures)
    for step in range(3):
        drawn(sink, step)
    sink.write(ProbePoint(3, error="failed"))
    sink.close()
    assert [values["step"] for *_, values in board.hung] == steps
    assert all(values["step"] == step for step, _, values in board.hung)


def test_paths_have_error_bars_of_every_task() -> None:
    board, sink = Board(), None
    samples, tasks = [{0, 1}, {2}, {3, 4}, {5}, {6, 7}, {8}], [0, 0, 0, 1, 1, 1]
    report = make_report(samples, tasks, loss=np.array([1.0, 2, 4, 3, 9, 5]))
    assert "mui/a/loss_low" not in report.scalars()
    sink = PictureSink([board], pictures="end")
    phases = {task: SimpleNamespace(point=SimpleNamespace(axis="-loss")) for task in (None, "a", "b")}
    sink.write(ProbePoint(5, report=report, scalars=report.scalars(), phases=phases))  # type: ignore[arg-type]
    assert sink._latest is not None
    paths = sink._latest[1].paths
    assert [path.task for path in paths] == [None, "a", "b"]
    for path in paths:
        (point,) = path.points
        expected = report.intervals(path.task, metrics=("mui", "loss"))
        assert point.mui_interval == (expected["mui"].low, expected["mui"].high)
        assert point.performance_interval == (expected["loss"].low, expected["loss"].high)


def test_the_table_comes_last_and_without_pictures_too() -> None:
    board = Board()
    sink = PictureSink([board], pictures=False, tables=True)
    sink.write(point(4))
    assert not board.hung
    sink.close()
    ((step, _, values),) = board.hung
    assert step == 4
    assert len(values[TABLE_KEY].data) == 7


def test_without_a_run_nothing_is_drawn() -> None:
    class Bare:
        def place(self, step: int) -> None:
            return None

    sink = PictureSink([Bare()], tables=True)
    sink.write(point(0))
    assert sink._worker is None
    sink.close()


# In training


def watched(board: Board, memory: MemorySink, **options: Any) -> MUICallback:
    return MUICallback(ProbeSet({"a": make_samples(7)}), every=2, sinks=[PictureSink([board]), memory], **options)


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    board = Board()
    plain = train(tmp_path / "plain", [])
    with_pictures = train(tmp_path / "pictures", [watched(board, MemorySink())])
    assert_same_to_the_bit(plain, with_pictures)
    assert board.hung[-1][0] == STEPS


@pytest.mark.parametrize(("where", "on_error"), [("drawing", "warn"), ("drawing", "raise"), ("logging", "raise")])
def test_pictures_that_fail_cost_one_warning_and_no_point(
    where: str, on_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no space left")

    if where == "drawing":  # a scene that cannot be drawn
        scene = PictureSink._scene
        monkeypatch.setattr(PictureSink, "_scene", lambda *args: replace(scene(*args), pooled="nothing"))
    memory = MemorySink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, [watched(Board(fail if where == "logging" else lambda: None), memory, on_error=on_error)])
    assert [p.step for p in memory.points] == [0, 2, 4, 6, 8]
    assert all(p.error is None for p in memory.points)
    (ours,) = [str(w.message) for w in caught if "pictures" in str(w.message)]
    assert ("AttributeError" if where == "drawing" else "OSError: no space left") in ours


def test_time_that_pictures_take_between_probes_is_overhead(tmp_path: Path) -> None:
    class Slow(MemorySink):
        def between_points(self) -> None:
            time.sleep(0.1)

    never = {"at_start": False, "at_end": False, "every": None}
    with MUIMonitor(make_model(), probe_set(), output_dir=tmp_path, tracker=None, sinks=[Slow()], **never) as monitor:
        for step in range(1, 6):
            monitor.step(step)
        spent = monitor.state_dict()["history"]["spent"]
    assert spent["probing"] >= 0.5


def test_a_wall_where_nothing_can_be_hung_keeps_nothing_from_another() -> None:
    def fail() -> None:
        raise OSError("no space left")

    board = Board()
    sink = PictureSink([Board(fail), board])
    drawn(sink, 0)
    with pytest.raises(OSError, match="no space left"):
        sink.between_points()
    assert [step for step, *_ in board.hung] == [0]
    sink.close()


def test_a_process_that_is_killed_is_told_once_and_another_draws_on() -> None:
    board = Board()
    sink = PictureSink([board])
    drawn(sink, 0)
    sink.between_points()
    process = sink._studio._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    drawn(sink, 1)
    with pytest.raises(StudioError, match="the process that draws ended"):
        sink.between_points()
    drawn(sink, 2)
    sink.close()
    assert [step for step, *_ in board.hung] == [0, 2]
    assert sink._studio._process is None


def test_what_is_in_the_directory_of_the_training_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("open('was_run', 'w'); raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", tmp_path / "somewhere", *sys.path])  # as Python itself allows
    board = Board()
    sink = PictureSink([board])
    drawn(sink, 0)
    sink.close()
    assert [step for step, *_ in board.hung] == [0]
    assert not (tmp_path / "was_run").exists()


def test_a_process_that_hangs_does_not_hang_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "_PATIENCE", 0.2)
    started = Studio._started

    def stopped(studio: Studio) -> Any:
        process = started(studio)
        os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(Studio, "_started", stopped)
    memory = MemorySink()
    with pytest.warns(UserWarning, match="the last pictures are not drawn after 0.2 s"):
        train(tmp_path, [watched(Board(), memory)])
    assert len(memory.points) == 5


def test_the_process_ends_with_the_one_that_trains_and_imports_no_torch() -> None:
    code = """
import os, sys
from made import make_report
from mui_callback.pictures.scene import Scene
from mui_callback.pictures.studio import Studio
studio, report = Studio(), make_report([{0}])
studio.draw(Scene(0, report.pooled, report.tasks, ()))
maps = open(f"/proc/{studio._process.pid}/maps").read()
print(studio._process.pid, "matplotlib" in maps, "torch" in maps, flush=True)
os._exit(1)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    pid, has_matplotlib, has_torch = shown.stdout.split()
    assert (has_matplotlib, has_torch) == ("True", "False")
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.01)
    else:
        pytest.fail("it goes on")


def train_without_pillow(rank: int, directory: Path) -> tuple[list[int], list[str], list[bool]]:
    """The steps of the points, what was warned of, and whether values and pictures are in the run."""
    for name in ["PIL", *(name for name in sys.modules if name.startswith("PIL."))]:
        sys.modules[name] = None  # type: ignore[assignment] # cannot be imported
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(directory), WANDB_SILENT="true")
    memory = MemorySink()
    callback = MUICallback(ProbeSet({"a": make_samples(7)}), every=4, sinks=[memory])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(directory, [callback], report_to=["wandb"], max_steps=8).train()
    summary = wandb.run.summary.keys()
    logged = ["mui/mui" in summary, "mui/pictures/expert_mui" in summary]
    wandb.finish()
    return [p.step for p in memory.points], [str(w.message) for w in caught if "MUI" in str(w.message)], logged


def test_without_pillow_there_is_one_warning_and_all_the_rest(tmp_path: Path) -> None:
    ((steps, (warned,), logged),) = launch(tmp_path, train_without_pillow, size=1)
    assert steps == [0, 4, 8]
    assert warned.startswith("MUI: there are no pictures, as pillow cannot be imported; va")
    assert logged == [True, False]


# Options


@pytest.mark.parametrize("pictures", ["never", None, 1.5, "True"])
def test_an_option_that_is_none_is_told(pictures: Any) -> None:
    with pytest.raises(ValueError, match="pictures: expected True, False or 'end', got"):
        MUICallback(pictures=pictures)
    with pytest.raises(ValueError, match="pictures: expected"):
        MUIMonitor(None, pictures=pictures)  # type: ignore[arg-type]
