"""The workspace of Weights & Biases: what is on it, and how it gets there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces.workspaces as ws

from distributed_training import launch
from mui_callback.cli import main
from mui_callback.metrics.catalogue import CATALOGUE, Scope, key
from mui_callback.metrics.sections import SECTIONS
from mui_callback.workspace.build import X_AXES, build_workspace, workspace_spec
from wandb_server import WandbServer

HERE = Path(__file__).parent
GOLDEN = HERE / "data" / "workspace.json"


def without_random_ids(spec: Any) -> Any:
    """wandb-workspaces draws the ids of panels and of the set of runs."""
    if isinstance(spec, dict):
        return {name: without_random_ids(value) for name, value in spec.items() if name not in ("__id__", "id")}
    return [without_random_ids(value) for value in spec] if isinstance(spec, list) else spec


def charts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return [p["config"] for s in sections for p in s["panels"] if p["viewType"] == "Run History Line Plot"]


def test_the_golden_workspace(tmp_path: Path) -> None:
    main(["workspace", "me/moe", "--json", str(tmp_path / "workspace.json")])
    made = without_random_ids(json.loads((tmp_path / "workspace.json").read_text()))
    if "UPDATE_GOLDEN" in os.environ:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
    assert made == json.loads(GOLDEN.read_text())


def test_json_to_the_terminal_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["workspace", "me/moe", "--json", "-"])
    assert without_random_ids(json.loads(capsys.readouterr().out)) == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("trainer", "x"), [("hf", "train/global_step"), ("lightning", "trainer/global_step"), ("loop", "mui/step")]
)
def test_mui_losses_and_benchmarks_are_on_the_trainers_own_axis(trainer: Any, x: str) -> None:
    spec = workspace_spec(build_workspace("me", "moe", X_AXES[trainer]))
    assert {chart["xAxis"] for chart in charts(spec)} == {x} == {spec["section"]["settings"]["xAxis"]}
    names = [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]]
    assert [name for name in names if name != "Pictures"] == list(SECTIONS)
    first = spec["section"]["panelBankConfig"]["sections"][0]["panels"][:4]
    shown = [panel["config"]["metricRegex"] for panel in first]
    for name in ("mui/mui", "mui/gsm8k/mui", "train/loss", "eval/loss", "train_loss", "loss", "mui/benchmark/arc/acc"):
        assert any(re.search(regex, name) for regex in shown), name


@pytest.mark.parametrize(
    "metric", [m for m in CATALOGUE if m.scope is not Scope.REPORT], ids=lambda metric: metric.name
)
def test_every_logged_key_is_on_a_panel(metric: Any) -> None:
    name = re.sub("<.*>", "some_name", metric.name)
    keys = [key(name)] if metric.scope is not Scope.END else []
    keys += [key(name, task) for task in ("gsm8k", "a b.c")] if metric.scope.is_per_task else []
    spec = workspace_spec(build_workspace("me", "moe", "hf"))
    for logged in keys:
        intervals = metric.name.endswith(("_low", "_high")) and logged != key(metric.name)
        found = [chart for chart in charts(spec) if re.search(chart["metricRegex"], logged)]
        assert bool(found) != intervals, logged  # the intervals of single tasks would cover the lines of the others


def test_every_metric_of_a_section_is_one_that_is_logged() -> None:
    logged = {metric.name for metric in CATALOGUE if metric.scope is not Scope.REPORT}
    for panel in (panel for panels in SECTIONS.values() for panel in panels):
        assert set(panel.metrics) <= logged, panel.title


def test_whoever_reads_may_have_had_enough() -> None:
    command = f"{sys.executable} -m mui_callback workspace me/moe --json - | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_nothing_else_is_on_the_panels() -> None:
    for logged in ("mui/benchmark/arc/acc_stderr", "mui/step", "my/mui/mui", "mui/a/b/mui", "train/grad_norm"):
        spec = workspace_spec(build_workspace("me", "moe", "hf"))
        assert not [chart for chart in charts(spec) if re.search(chart["metricRegex"], logged)], logged
    assert re.search(
        {panel.title: panel for panel in SECTIONS["Trajectory"]}["Benchmarks"].regex, "mui/benchmark/x/mrr"
    )


def test_what_is_written_is_what_wandb_workspaces_reads() -> None:
    made = build_workspace("me", "moe", X_AXES["lightning"])
    view = made._to_model()
    again = ws.Workspace._from_model(type(view).model_validate_json(view.model_dump_json(by_alias=True)))
    assert [section.name for section in again.sections] == [section.name for section in made.sections]
    assert without_random_ids(workspace_spec(again)) == without_random_ids(workspace_spec(made))


def call(*arguments: str, environment: dict[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since W&B keeps its settings; without the keys of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "mui_callback", "workspace", *arguments],
        env={**clean, "HOME": str(home), "NETRC": str(home / "netrc"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_it_is_saved_to_a_server(tmp_path: Path) -> None:
    with WandbServer("me/moe") as server:
        done = call("me/moe", "--trainer", "lightning", environment=server.environment, home=tmp_path)
        assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "moe", "MUI")
    expected = workspace_spec(build_workspace("me", "moe", X_AXES["lightning"]))
    assert without_random_ids(json.loads(view["spec"])) == without_random_ids(expected)
    assert f"{server.url}/me/moe?nw=" in done.stdout
    assert X_AXES["lightning"] in view["spec"]


def told(rank: int, directory: Path, *, project: str, environment: dict[str, str]) -> str:
    """What the command ends with where it cannot do what it is asked."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update({"HOME": str(directory), "NETRC": str(directory / "netrc"), **environment})
    with pytest.raises(SystemExit) as ended:
        main(["workspace", project])
    return str(ended.value.code)


def test_troubles_are_told_in_words(tmp_path: Path) -> None:
    with WandbServer("me/moe") as server:
        alone = partial(launch, tmp_path, told, size=1)
        (missing,) = alone(project="me/other", environment=server.environment)
        (nobody,) = alone(project="me/moe", environment={**server.environment, "WANDB_API_KEY": ""})
        server.behaviour = "deny"
        (denied,) = alone(project="me/moe", environment=server.environment)
        server.vanish()
        (gone,) = alone(project="me/moe", environment={**server.environment, "WANDB_HTTP_TIMEOUT": "1"})
    (wrong,) = alone(project="me", environment={})
    assert "there is no project me/other that you may see: log a run to it first" in missing
    assert "Run `wandb login`, or set WANDB_API_KEY" in nobody
    assert "Run `wandb login`, or set WANDB_API_KEY" in denied
    assert "see that the server can be reached" in gone
    assert "expected ENTITY/PROJECT, such as my-team/moe, got 'me'" in wrong
    assert server.views == []


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['wandb_workspaces'] = None; from mui_callback.cli import main;"
        "main(['workspace', 'me/moe', '--json', '-'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'mui-callback[workspace]'" in done.stderr
