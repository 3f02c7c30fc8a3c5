"""The record of a run: what was written is read back, whatever happened to the file in between."""

from __future__ import annotations

import gc
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from integrations import make_model, probe_set
from mui_callback import MUIMonitor, MUIProbe, MUIReport, ProbeSet
from mui_callback.settings import ProbeSettings
from mui_callback.sinks import record as record_module
from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.sinks.jsonl import JsonlSink
from mui_callback.sinks.record import RecordedRun, RecordReader, read_record
from mui_callback.spent import Spent
from tiny import build
from tiny_samples import make_samples


@pytest.fixture(scope="module")
def report() -> MUIReport:
    return MUIProbe(build("olmoe"), ProbeSet({"a": make_samples(7), "b": make_samples(8)})).measure()


@pytest.fixture
def run(report: MUIReport) -> RunDescription:
    return RunDescription(report.task_names, "f" * 64, ProbeSettings(), report.layout, id="first")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mui.jsonl"


def make_point(step: int, report: MUIReport) -> ProbePoint:
    scalars = {"mui/mui": 1 / (step + 3), "mui/loss": 0.1 + step}
    return ProbePoint(step, report=report, scalars=scalars, spent=Spent(step, step * 0.7, 0.3, 0.1))


def read_quietly(path: Path) -> list[RecordedRun]:
    """What is read back where nothing is to be warned about."""
    runs, complaints = read_record(path)
    assert not complaints
    return runs


def test_what_was_written_is_read_back(path: Path, run: RunDescription, report: MUIReport) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    points = [make_point(step, report) for step in (0, 3, 6)]
    for point in points:
        sink.write(point)
    sink.close()
    (recorded,) = read_quietly(path)
    assert recorded.id == "first"
    assert recorded.probed == run.to_dict()
    assert recorded.points == {point.step: point.scalars for point in points}
    assert recorded.spent == points[-1].spent


def test_a_run_without_points(path: Path, run: RunDescription) -> None:
    JsonlSink(path).open(run)
    assert read_quietly(path) == [RecordedRun("first", run.to_dict(), {}, Spent())]


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_without_lines_there_are_no_runs(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    assert read_quietly(path) == []


def test_the_directory_is_made(tmp_path: Path, run: RunDescription) -> None:
    JsonlSink(tmp_path / "a" / "b" / "mui.jsonl").open(run)
    assert len(read_quietly(tmp_path / "a" / "b" / "mui.jsonl")) == 1


def test_runs_in_one_file_stay_apart(tmp_path: Path, path: Path, run: RunDescription, report: MUIReport) -> None:
    for id_, start_step, steps in [("first", 0, (0, 3)), ("second", 0, (0, 5)), ("first", 3, (6,))]:
        sink = JsonlSink(path)
        sink.open(replace(run, id=id_, start_step=start_step))
        for step in steps:
            sink.write(make_point(step, report))
        sink.close()
    recorded = read_quietly(path)
    assert [(part.id, list(part.points)) for part in recorded] == [
        ("first", [0, 3]),
        ("second", [0, 5]),
        ("first", [6]),
    ]
    assert [part.spent.steps for part in recorded] == [3, 5, 6]
    headers = [row["run"] for row in map(json.loads, path.read_text().splitlines()) if "run" in row]
    assert [header["start_step"] for header in headers] == [0, 0, 3]


def test_runs_that_are_recorded_at_the_same_time_stay_apart(path: Path, run: RunDescription, report: MUIReport) -> None:
    sinks = [JsonlSink(path), JsonlSink(path)]
    for sink, id_ in zip(sinks, ["first", "second"], strict=True):
        sink.open(replace(run, id=id_))
    for step in range(6):
        sinks[step % 2].write(make_point(step, report))
    assert [(part.id, list(part.points), part.spent.steps) for part in read_quietly(path)] == [
        ("first", [0, 2, 4], 4),
        ("second", [1, 3, 5], 5),
    ]


def test_points_that_failed_are_not_among_the_points_but_their_time_counts(
    path: Path, run: RunDescription, report: MUIReport
) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    spent = Spent(4, 9.0, 2.0, 1.5)
    sink.write(ProbePoint(4, error="RuntimeError: no", spent=spent))
    (recorded,) = read_quietly(path)
    assert list(recorded.points) == [0]
    assert recorded.spent == spent
    assert json.loads(path.read_text().splitlines()[-1])["error"] == "RuntimeError: no"


@pytest.mark.parametrize(
    "line",
    [
        b"no JSON",
        pytest.param(b"\0" * 60, id="zeros, as a power cut leaves them"),
        pytest.param(b"[" * 100_000, id="brackets"),
        b"\xff\xfe\xfd",
        b"null",
        b"5",
        b"[1, 2]",
        b'"run"',
        b"{}",
        b'{"run": 1}',
        b'{"run": {"id": "x"}}',
        b'{"run": {"tasks": [], "probe_set": "", "settings": {}, "layers": []}}',
        b'{"step": 9, "scalars": {}, "spent": {}}',
        b'{"id": "first", "step": 9}',
        b'{"id": "first", "step": "nine", "scalars": {}, "spent": {}}',
        b'{"id": "first", "step": 9, "scalars": 4, "spent": {}}',
        b'{"id": "first", "step": 9, "scalars": {}, "spent": {"hours": 3}}',
        b'{"id": "another", "step": 9, "scalars": {}, "spent": {}}',
    ],
)
def test_a_line_that_is_none_of_a_record_is_warned_about_and_left_out(
    path: Path, run: RunDescription, report: MUIReport, line: bytes
) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    whole = read_quietly(path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    runs, (complaint,) = read_record(path)
    assert runs == whole
    assert complaint.startswith(f"{path}, line 3: expected a run or a point of one")
    sink.write(make_point(3, report))
    runs, (complaint,) = read_record(path)
    assert list(runs[0].points) == [0, 3]


def test_a_point_of_no_run_is_left_out_and_said(path: Path, run: RunDescription, report: MUIReport) -> None:
    sink = JsonlSink(path)
    sink.write(make_point(0, report))
    sink.open(run)
    sink.write(make_point(3, report))
    (recorded,), (complaint,) = read_record(path)
    assert list(recorded.points) == [3]
    assert "line 1: expected a run or a point of one" in complaint


def test_a_record_that_cannot_be_read_raises(path: Path) -> None:
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        read_record(path)


def test_wherever_the_last_line_is_torn_the_next_one_is_whole(
    path: Path, run: RunDescription, report: MUIReport
) -> None:
    """As SIGKILL, a power cut or a full disk leave it."""
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    before = path.read_bytes()
    sink.write(ProbePoint(3, error="RuntimeError: é", spent=Spent()))
    last = path.read_bytes()[len(before) :]
    for end in range(1, len(last) - 1):
        path.write_bytes(before + last[:end])
        for points in ([0], [0, 6]):
            (recorded,), (complaint,) = read_record(path)
            assert complaint.startswith(f"{path}, line 3: ")
            assert complaint.endswith("it is left out.")
            assert list(recorded.points) == points
            sink.write(make_point(6, report))


def test_a_last_line_that_only_lacks_its_end_is_whole(path: Path, run: RunDescription, report: MUIReport) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert list(read_quietly(path)[0].points) == [0]
    sink.write(make_point(3, report))
    assert list(read_quietly(path)[0].points) == [0, 3]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow over so many bytes; what is written beyond is cut, as by a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_spoils_nothing(path: Path, run: RunDescription, report: MUIReport) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    with full_disk(path.stat().st_size + 30):
        with pytest.raises(OSError, match=r"mui.jsonl: only 30 of \d+ bytes could be written; is the disk full\?"):
            sink.write(make_point(3, report))
        with pytest.raises(OSError, match="only 30 of"):
            sink.write(make_point(6, report))
    sink.write(make_point(9, report))
    (recorded,) = read_quietly(path)  # what was cut is taken back
    assert list(recorded.points) == [0, 9]


def test_a_run_whose_description_found_a_full_disk_is_described_with_its_first_point(
    path: Path, run: RunDescription, report: MUIReport
) -> None:
    before, sink = JsonlSink(path), JsonlSink(path)
    before.open(run)
    before.write(make_point(0, report))
    with full_disk(path.stat().st_size + 30), pytest.raises(OSError, match="is the disk full"):
        sink.open(replace(run, id="second"))
    sink.write(make_point(3, report))
    sink.write(make_point(6, report))
    recorded = read_quietly(path)
    assert [(part.id, list(part.points)) for part in recorded] == [("first", [0]), ("second", [3, 6])]


def test_numbers_that_json_cannot_hold_are_refused_before_anything_is_written(
    path: Path, run: RunDescription, report: MUIReport
) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        sink.write(ProbePoint(3, report=report, scalars={"mui/loss": float("nan")}))
    assert path.read_bytes() == before


def interrupted(action: Callable[[], None], at: int) -> bool:
    """Whether Ctrl-C before the bytecode of this number, in whatever function, came before the end of the action."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count > at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # what it runs in between is no part of the action, and swallows interrupts
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False


@pytest.mark.filterwarnings("ignore:unclosed file")  # an interrupt may come before anybody can close it
@pytest.mark.parametrize("torn", [b"", b'{"step": 1, "sca'])
def test_an_interrupt_wherever_it_comes_leaves_whole_lines_only(path: Path, run: RunDescription, torn: bytes) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    before = path.read_bytes() + torn
    point = ProbePoint(3, error="RuntimeError: no")
    outcomes = []
    for at in range(100_000):
        path.write_bytes(before)
        if not interrupted(lambda: sink.write(point), at):
            break
        after = path.read_bytes()
        assert after.startswith(before)
        added = after[len(before) :].removeprefix(b"\n") if torn else after[len(before) :]
        assert not added or (added.endswith(b"\n") and json.loads(added)["step"] == 3)
        outcomes.append(bool(added))
    assert len(outcomes) > 200
    assert (outcomes[0], outcomes[-1]) == (False, True)


def test_what_comes_later_is_read_on_from_there(
    path: Path, run: RunDescription, report: MUIReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces are in which it comes, what is known is what the record holds; no line is parsed twice."""
    sink, source = JsonlSink(path.with_name("source")), path.with_name("source")
    sink.open(run)
    for step in (0, 3):
        sink.write(make_point(step, report))
    lines = source.read_bytes().splitlines(keepends=True)
    lines.insert(2, b"nonsense\n")
    whole = b"".join(lines)
    n_parsed: list[bytes] = []
    parse = record_module._read_line
    monkeypatch.setattr(record_module, "_read_line", lambda line, runs: (n_parsed.append(line), parse(line, runs))[1])
    reader = RecordReader(path)
    path.touch()
    reader.read()
    for begin in range(0, len(whole), 997):
        with path.open("ab") as file:
            file.write(whole[begin : begin + 997])
        reader.read()
    reader.read()
    assert len(n_parsed) == len(lines)
    expected = read_record(path)
    assert (reader.runs, reader.complaints) == expected
    assert list(reader.runs[0].points) == [0, 3]


def test_another_file_at_the_same_place_is_read_from_its_beginning(
    path: Path, run: RunDescription, report: MUIReport
) -> None:
    reader = RecordReader(path)
    for run_id, steps in (("one", (0,)), ("other", (0, 3, 6)), ("third", (0,))):  # longer than before, and shorter
        path.unlink(missing_ok=True)
        sink = JsonlSink(path)
        sink.open(replace(run, id=run_id))
        for step in steps:
            sink.write(make_point(step, report))
        reader.read()
        assert [(one.id, tuple(one.points)) for one in reader.runs] == [(run_id, steps)]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reader.read()


def test_a_last_line_without_its_end_is_waited_for(path: Path, run: RunDescription, report: MUIReport) -> None:
    sink = JsonlSink(path)
    sink.open(run)
    sink.write(make_point(0, report))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    reader = RecordReader(path)
    reader.read()
    assert not reader.runs[0].points
    assert "line 2: expected a run or a point of one" in reader.complaints[0]
    path.write_bytes(whole)
    reader.read()
    assert list(reader.runs[0].points) == [0]
    assert not reader.complaints
    path.write_bytes(whole[:-1])  # whoever goes on with it will not write the point again
    (recorded,), complaints = read_record(path)
    assert (list(recorded.points), complaints) == ([0], [])


def test_training_may_go_to_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with MUIMonitor(make_model(), probe_set(), every=1, output_dir=".", tracker=None) as monitor:
        monitor.step(1)
        monkeypatch.chdir("other")
        monitor.step(2)
    (run,), complaints = read_record(tmp_path / "mui.jsonl")
    assert list(run.points) == [0, 1, 2]
    assert not complaints
    assert not list((tmp_path / "other").iterdir())
