"""The package as a whole: what an import costs, and that the documents say what the code does."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import mui_callback
from made import make_report
from mui_callback.cli import main
from mui_callback.metrics.catalogue import CATALOGUE, Scope, key, markdown_table
from mui_callback.pictures.scene import HISTOGRAM_KEY, PICTURE_STEP_KEY, PICTURES

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "transformers", "accelerate", "lightning", "wandb", "deepspeed", "datasets", "matplotlib")


def test_import_is_cheap() -> None:
    program = f"import mui_callback, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_it_adds_nothing_to_the_import_of_transformers() -> None:
    """Whatever else is loaded with it: neither by the import, nor by a plugin that is found by its entry point."""

    def loaded(program: str) -> set[str]:
        program += "; import sys; print(*sys.modules, sep='\\n')"
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return set(shown.stdout.split())

    alone, both = loaded("import transformers"), loaded("import mui_callback; import transformers")
    assert "transformers" in alone
    assert both - alone == {"mui_callback", "mui_callback.version"}
    assert {point.group for point in distribution("mui-callback").entry_points} == {"console_scripts"}


def test_the_core_needs_no_trainer_and_no_tracker() -> None:
    program = (
        "from mui_callback import MUIProbe, MUIReport, ProbeSet; ProbeSet.builtin(); import sys;"
        f"print([name for name in {HEAVY[2:]!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_public_names() -> None:
    for name in mui_callback.__all__:
        assert getattr(mui_callback, name).__name__ == name
        assert name in dir(mui_callback)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = mui_callback.Nonsense


def test_the_readme_holds_the_catalogue() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- catalogue -->")[1].split("<!-- /catalogue -->")[0].strip()
    assert table == markdown_table()


def test_each_row_of_the_catalogue_is_a_value_of_the_report() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    report = make_report([{0}])
    for metric in CATALOGUE:
        if metric.scope is Scope.LAYER:
            assert hasattr(report.pooled.layers[0], metric.attribute)
            continue
        attribute = (metric.attribute or metric.name).removesuffix("_low").removesuffix("_high")
        is_of_report = any(hasattr(owner, attribute) for owner in (report, report.pooled))
        assert is_of_report != (metric.scope in (Scope.RUN, Scope.PHASE, Scope.END, Scope.RULE))
        assert key(metric.name) == f"mui/{metric.name}"
        assert key(metric.name, "gsm8k") == f"mui/gsm8k/{metric.name}"


def test_a_run_of_three_tasks_has_at_most_60_keys_unless_more_are_asked_for() -> None:
    at_all_times = [
        m for m in CATALOGUE if m.scope not in (Scope.REPORT, Scope.RULE, Scope.LAYER, Scope.END) and "<" not in m.name
    ]
    in_pictures = len(PICTURES) + len((HISTOGRAM_KEY, PICTURE_STEP_KEY))
    assert len(at_all_times) + 3 * sum(metric.scope.is_per_task for metric in at_all_times) + in_pictures <= 60


def test_the_command_line_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    assert "Train a small MoE on real text" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["nonsense"])
    assert exit_.value.code == 2
    with pytest.raises(SystemExit, match="steps: expected a positive number, got 0"):
        main(["demo", "--steps", "0"])
