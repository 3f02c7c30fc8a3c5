"""Several processes on one study, whether a launcher started them or not: the table of a single one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from mui_callback.responses.task_config import TaskConfig
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.claims import Claims
from mui_callback.trajectory.config import Distribute
from mui_callback.trajectory.records import open_study
from studies import SUMS, WORDS, run, save_checkpoints, save_tasks, study, table

HERE = Path(__file__).parent
STEPS = (5, 10, 15)
Response = str


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("studies")
    save_checkpoints(directory / "run", STEPS)
    (directory / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"broken")
    return directory


@pytest.fixture(scope="module")
def tasks(directory: Path) -> list[TaskConfig]:
    return save_tasks(directory / "tasks", sums=SUMS, words=WORDS[:1])


@pytest.fixture(scope="module")
def alone(directory: Path, tasks: list[TaskConfig]) -> dict[Response, Path]:
    """Studies of a single process."""
    for response in ("gold", "generate"):
        run(study(directory / response, directory / "run", tasks, response=response))
    return {response: directory / response for response in ("gold", "generate")}


@pytest.fixture(scope="module")
def launched(directory: Path) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(HERE / "launched_studies.py"), str(directory)],
        check=True,
        timeout=150,
        cwd=HERE,
        env=environment,
    )
    return [json.loads((directory / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("response", ["gold", "generate"])
@pytest.mark.parametrize("distribute", get_args(Distribute))
def test_a_launched_study(
    distribute: str, response: str, directory: Path, alone: dict[Response, Path], launched: list[dict[str, Any]]
) -> None:
    name = f"{distribute}-{response}"
    found, expected = table(directory / name), table(alone[response])
    assert [row["checkpoint"] for row in found] == ["checkpoint-5"] * 2 + ["checkpoint-15"] * 2
    for one, other in zip(found, expected, strict=True):
        numbers = [name for name, value in other.items() if isinstance(value, float)]
        assert {**one, **dict.fromkeys(numbers)} == {**other, **dict.fromkeys(numbers)}
        assert [one[name] for name in numbers] == pytest.approx([other[name] for name in numbers], rel=1e-5)
    keys = [
        [one.report.key_neurons() for one in open_study(path).records] for path in (directory / name, alone[response])
    ]
    assert keys[0] == keys[1]
    for seen in launched:
        assert (seen[name]["n_measured"], seen[name]["failures"]) == (2, ["checkpoint-10"])
    said = "".join(seen[name]["said"] for seen in launched)
    for label in ("checkpoint-5: sums", "checkpoint-15: sums"):  # by one of them
        assert said.count(label) == 1
    assert [seen[name]["said"].count("2 of 3 checkpoints") for seen in launched] == [0, 0]
    assert launched[0][name]["said"].count("1 of 3 checkpoints are not measured") == 1


def test_two_processes_share_a_study(directory: Path, tasks: list[TaskConfig], alone: dict[Response, Path]) -> None:
    """A process that holds a checkpoint and then ends without having measured it: this one waits, and measures it."""
    config = study(directory / "shared", directory / "run", tasks)
    held = CheckpointId("run", "checkpoint-5", 5)
    command = [sys.executable, "-c", _HOLD, str(config.output), held.model, held.label]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        threading.Thread(target=_kill_after, args=(holder, config.output), daemon=True).start()
        outcome, said = run(config)
        assert holder.wait() != 0
    lines = [line for line in said.splitlines() if ": sums" in line]
    assert ["checkpoint-15" in lines[0], "checkpoint-5:" in lines[1], len(lines)] == [True, True, 2]
    assert outcome.n_measured == 2
    assert table(config.output) == table(alone["gold"])


def _kill_after(holder: subprocess.Popen[str], output: Path) -> None:
    """Once what nobody holds is measured."""
    while not [*output.glob("checkpoints/run--checkpoint-15-*")]:
        time.sleep(0.05)
    holder.kill()


def test_a_claim_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    checkpoint = CheckpointId("a", "b")
    claims = [Claims(tmp_path) for _ in range(2)]
    with claims[0].claim(checkpoint) as first, claims[1].claim(checkpoint) as second:
        assert (first, second) == (True, False)
        with claims[1].claim(CheckpointId("a", "c")) as other:
            assert other
    with Claims(tmp_path).claim(checkpoint) as again:
        assert again


_HOLD = """
import sys, time
from pathlib import Path
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.claims import Claims
with Claims(Path(sys.argv[1])).claim(CheckpointId(sys.argv[2], sys.argv[3])) as is_mine:
    assert is_mine
    print("held", flush=True)
    time.sleep(100)
"""
