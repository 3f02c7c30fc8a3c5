"""`mui-callback watch`: frames of real records, rendered to text."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from integrations import make_model, probe_set
from mui_callback import MUIMonitor
from mui_callback.cli import main
from mui_callback.watch.run import Record, watch_record
from mui_callback.watch.sparkline import sparkline


def train(directory: Path, steps: range) -> None:
    """A real run, whose weights do not matter here."""
    with MUIMonitor(make_model(), probe_set(), every=2, output_dir=directory, tracker=None) as monitor:
        for step in steps:
            monitor.step(step)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("watched")
    train(directory, range(1, 7))
    return directory / "mui.jsonl"


def shown(path: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    watch_record(path, once=True, console=console)
    return console.file.getvalue()


def copied(lines: list[str], directory: Path) -> Path:
    path = directory / "mui.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_frame_shows_the_last_point(record: Path) -> None:
    frame = shown(record.parent)
    last = json.loads(record.read_text().splitlines()[-1])
    scalars = last["scalars"]
    assert f"step {last['step']} · 4 points" in frame
    for task in last["tasks"]:
        (line,) = [line for line in frame.splitlines() if line.split()[:1] == [task]]
        assert f"{100 * scalars[f'mui/{task}/mui']:.2f}" in line
        assert f"{scalars[f'mui/{task}/loss']:.3g}" in line
    assert f"Gini {scalars['mui/expert_gini']:.3g}" in frame
    assert last["pooled"]["top_experts"][0]["expert"] in frame
    assert "overhead" in frame


def test_a_trend_leaves_the_untrained_model_out(record: Path) -> None:
    rows = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    values = [row["scalars"]["mui/mui"] for row in rows]
    (line,) = [line for line in shown(record).splitlines() if line.startswith("all tasks")]
    assert sparkline(values[1:], 40) in line.split()


@pytest.mark.parametrize("width", [40, 60, 80, 110, 160, 250])
def test_nothing_is_wider_than_the_terminal_and_nothing_cut_at_80(record: Path, width: int) -> None:
    frame = shown(record, width)
    assert max(map(len, frame.splitlines())) <= width
    assert width < 80 or "…" not in frame


def test_many_tasks_fit_the_height(record: Path, tmp_path: Path) -> None:
    lines = record.read_text().splitlines()
    first = json.loads(lines[0])
    first["run"]["tasks"] = [f"task{i}" for i in range(50)]
    path = copied([json.dumps(first), *lines[1:]], tmp_path)
    seen = Record(path)
    seen.look()
    console = Console(file=io.StringIO(), width=80)
    console.print(seen.frame(80, 24))
    frame = console.file.getvalue()
    assert len(frame.splitlines()) <= 24
    assert "… 43 more" in frame


def test_lines_that_are_cut_are_counted_and_the_rest_is_shown(record: Path, tmp_path: Path) -> None:
    lines = record.read_text().splitlines()
    path = tmp_path / "mui.jsonl"
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
        path.write_text("\n".join([*lines[:-1], lines[-1][:cut]]))
        frame = shown(path)
        assert "step 4 · 3 points" in frame
        assert "1 line of the record cannot be read." in frame


def test_errors_are_shown(record: Path, tmp_path: Path) -> None:
    lines = record.read_text().splitlines()
    row = json.loads(lines[-1])
    del row["scalars"], row["pooled"], row["tasks"]
    failed = json.dumps({**row, "step": 8, "error": "OutOfMemoryError: no [b]memory[/b]", "traceback": ""})
    frame = shown(copied([*lines, failed], tmp_path))
    assert "Last error (step 8): OutOfMemoryError: no [b]memory[/b]" in frame
    assert "step 6 · 4 points" in frame
    frame = shown(copied([lines[0], failed], tmp_path))
    assert "No probe has succeeded yet." in frame


def test_a_run_that_goes_on_is_one_and_another_one_is_told_apart(record: Path, tmp_path: Path) -> None:
    lines = record.read_text().splitlines()
    resumed = [*lines[:3], lines[0], *lines[3:]]
    frame = shown(copied(resumed, tmp_path))
    assert "step 6 · 4 points" in frame
    assert "started 2 times" in frame
    copied(lines, tmp_path)
    train(tmp_path, range(1, 3))
    frame = shown(tmp_path)
    assert "2 of 2 in the record" in frame
    assert "step 2 · 2 points" in frame


def test_what_is_not_there_is_waited_for_or_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no record yet; without --once, watch waits for it"):
        main(["watch", str(tmp_path / "nowhere"), "--once"])
    (tmp_path / "mui.jsonl").touch()
    assert "no run in it yet" in shown(tmp_path).replace("\n", " ")


def test_it_follows_a_process_that_writes_and_ends_quietly(record: Path, tmp_path: Path) -> None:
    """In a terminal: it waits, then shows each new point; Ctrl-C leaves the last frame and no traceback."""
    lines = record.read_text().splitlines(keepends=True)
    main_end, its_end = pty.openpty()
    command = [sys.executable, "-m", "mui_callback", "watch", str(tmp_path / "run")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    watching = subprocess.Popen(
        command,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background of a shell it is ignored
    )
    os.close(its_end)
    output = ""

    def until(text: str) -> None:
        nonlocal output
        end = time.monotonic() + 60
        while text not in (plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)):
            assert time.monotonic() < end, plain
            if select.select([main_end], [], [], 1)[0]:
                output += os.read(main_end, 1 << 16).decode(errors="replace")
        output = ""

    try:
        until("not there yet")
        program = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"
        (tmp_path / "run").mkdir()
        for count, expected in ((2, "step 0"), (3, "step 2"), (5, "step 6")):
            (tmp_path / "run" / "mui.jsonl").unlink(missing_ok=True)
            write = [sys.executable, "-c", program, str(tmp_path / "run" / "mui.jsonl")]
            subprocess.run(write, input="".join(lines[:count]), text=True, check=True)
            until(expected)
        watching.send_signal(signal.SIGINT)
        until("overhead")
        assert watching.wait(timeout=60) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(main_end)


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(1, 30))
def test_a_sparkline_is_in_the_order_of_its_values(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    if len(values) <= width:
        pairs = [(a, b) for a, x in zip(values, line, strict=True) for b, y in zip(values, line, strict=True) if x < y]
        assert all(a < b for a, b in pairs)
        assert not values or len(set(values)) == 1 or {"▁", "█"} <= set(line)


def test_a_record_of_another_version_is_told_in_a_line(record: Path, tmp_path: Path) -> None:
    path = copied(record.read_text().replace('"n_routed"', '"n_others"').splitlines(), tmp_path)
    assert "expected a record of this version (KeyError: 'n_routed')" in " ".join(shown(path, 250).split())


def test_the_last_alert_is_shown(record: Path, tmp_path: Path) -> None:
    *lines, last = record.read_text().splitlines()
    alerts = [{"kind": "failure", "step": 6, "title": "MUI: probes fail", "text": "No more.", "is_bad": True}]
    path = copied([*lines, json.dumps({**json.loads(last), "alerts": 2 * alerts})], tmp_path)
    assert "Last alert (step 6, 2 alerts in all): MUI: probes fail. No more." in shown(path)


def test_the_accuracy_of_all_tasks_is_of_all_samples(record: Path, tmp_path: Path) -> None:
    def acc(rows: list[dict[str, Any]]) -> str:
        path = copied([json.dumps(row) for row in rows], tmp_path)
        (line,) = [line for line in shown(path, 250).splitlines() if line.startswith("all tasks")]
        return line.split()[-3]

    rows = [json.loads(line) for line in record.read_text().splitlines()]
    first, *others = rows[0]["run"]["tasks"]
    rows[-1]["scalars"] |= {"mui/token_accuracy": 0.25, "mui/choice_accuracy": 0.75}
    rows[-1]["scalars"][f"mui/{first}/choice_accuracy"] = 0.75
    for task in others:
        rows[-1]["scalars"].pop(f"mui/{task}/choice_accuracy", None)
    assert acc(rows) == "25"
    rows[-1]["scalars"] |= {f"mui/{task}/choice_accuracy": 0.75 for task in others}
    assert acc(rows) == "75"
