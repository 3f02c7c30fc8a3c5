"""The command line: it parses and calls, nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

from mui_callback.errors import MUIError
from mui_callback.model_options import ModelOptions


def demo(output_dir: Path = Path("mui-demo"), steps: int | None = None, seed: int = 0) -> None:
    """Train a small MoE on real text on the CPU, in about three minutes, and watch its experts.

    Args:
        output_dir: where the record, the W&B run and the picture go.
        steps: optimizer steps, if not the demo's own number; fewer take less time and show less.
        seed: seed of the weights and of the data.
    """
    if steps is not None and steps < 1:
        raise MUIError(f"steps: expected a positive number, got {steps}")
    from mui_callback.demo.run import DEFAULT_STEPS, run_demo

    run_demo(output_dir, steps=DEFAULT_STEPS if steps is None else steps, seed=seed)


def inspect(model: str, verify: bool = False, probe: Path | None = None, **options: Any) -> None:
    """Show the expert layers of a model, what a probe of it costs and, on demand, whether it is read right.

    Without --verify only the config is read, so that any size of model is inspected at once.

    Args:
        model: a directory, a config as a JSON file, or a hub id.
        verify: run a few tokens and compare, in each layer, the contributions of all neurons with the layer's output.
            Exit status 1 and the layer's name if they differ by more than rounding.
        probe: a JSONL file of samples whose probe is costed; without it the built-in probe set.
    """
    chosen = ModelOptions(model, **options)
    from rich.console import Console

    from mui_callback.inspection.run import inspect_model

    if not inspect_model(chosen, probe=probe, verify=verify, console=Console()):
        sys.exit(1)


def diversity(
    model: str,
    *,
    data: list[Path],
    at: int | None = None,
    level: float = 0.95,
    picture: Path = Path("diversity.png"),
    json: Path | None = None,
    **options: Any,
) -> None:
    """Compare data sets by how many of a model's neurons they need, at equal numbers of samples.

    Args:
        model: a directory or a hub id; its tokenizer reads the samples.
        data: JSONL files of samples, one data set each.
        at: number of samples to compare at; without it that of the smallest data set.
        level: of the confidence intervals.
        picture: where the coverage curves are drawn, a PNG.
        json: a file for all numbers.
    """
    chosen = ModelOptions(model, **options)
    from rich.console import Console

    from mui_callback.studies.diversity import compare_diversity

    compare_diversity(chosen, data, at=at, level=level, picture=picture, record=json, console=Console())


def select(
    model: str,
    *,
    probe: list[Path],
    output: Path,
    size: int = 64,
    json: Path | None = None,
    **options: Any,
) -> None:
    """Choose the few samples of a probe set that keep most of its coverage, so that a probe costs less.

    Args:
        model: a directory or a hub id; its tokenizer reads the samples.
        probe: JSONL files of samples, one task each.
        output: a new or empty directory, for one JSONL file of each task.
        size: samples to choose, of all tasks together.
        json: a file for all numbers.
    """
    chosen = ModelOptions(model, **options)
    from rich.console import Console

    from mui_callback.studies.selection import select_samples

    select_samples(chosen, probe, size=size, output=output, record=json, console=Console())


def ablate(
    model: str,
    probe: list[Path] | None = None,
    what: Literal["neurons", "experts"] = "neurons",
    draws: int = 3,
    level: float = 0.95,
    seed: int = 0,
    json: Path | None = None,
    **options: Any,
) -> None:
    """Check that key neurons, or key experts, are key: the loss without them, and without as many random ones.

    Args:
        model: a directory or a hub id; its tokenizer reads the samples.
        probe: JSONL files of samples, one task each; without it the built-in probe set.
        what: what is masked; with experts, all their neurons.
        draws: random controls of each task.
        level: of the confidence intervals.
        seed: of the random controls and the intervals.
        json: a file for all numbers.
    """
    chosen = ModelOptions(model, **options)
    from rich.console import Console

    from mui_callback.studies.ablation import check_key

    check_key(chosen, probe, what=what, draws=draws, level=level, seed=seed, record=json, console=Console())


def report(study: Path, output: Path | None = None, phase_window: int = 5, phase_level: float = 0.95) -> None:
    """Write the report of a checkpoint study: one HTML page that needs no network, and its figures as PNG and SVG.

    Args:
        study: directory of the study, which may still be running.
        output: directory of the report; without it, `report` in that of the study.
        phase_window: checkpoints that a phase is called from.
        phase_level: of the interval of each slope.
    """
    from mui_callback.html_report.build import write_report
    from mui_callback.metrics.phases import PhaseRule

    files = write_report(study, output, PhaseRule(phase_window, phase_level))
    print(f"{files.page}, and {len(files.figures)} files of figures")


def workspace(
    project: str,
    trainer: Literal["hf", "lightning", "loop"] = "hf",
    x_axis: str | None = None,
    json: Path | None = None,
) -> None:
    """Make a workspace in Weights & Biases: MUI, loss and benchmarks on one x axis, experts, routing, cost.

    Args:
        project: ENTITY/PROJECT, which is there already.
        trainer: whose steps are the x axis: of transformers' Trainer, of Lightning, or of a loop of your own.
        x_axis: another x axis, the key that a loop logs its steps as.
        json: a file for the workspace as W&B would get it, or - for the terminal; then no server is asked.
    """
    try:
        from mui_callback.workspace.build import X_AXES
        from mui_callback.workspace.run import make_workspace
    except ImportError as error:
        missing = "a workspace needs more packages: pip install 'mui-callback[workspace]'"
        raise MUIError(f"{missing} ({error})") from error
    print(make_workspace(project, x_axis=x_axis or X_AXES[trainer], record=json))


def watch(output_dir: Path, once: bool = False) -> None:
    """Show a run in the terminal while it trains, from the record in its output directory.

    Args:
        output_dir: of the run, or the record itself; it may not be there yet.
        once: print what there is and end, as it does where the output is no terminal.
    """
    from rich.console import Console

    from mui_callback.watch.run import watch_record

    watch_record(output_dir, once=once, console=Console(highlight=False))


def trajectory(config: Path) -> None:
    """Measure many checkpoints of one model or several, and write a row for each checkpoint and task.

    Args:
        config: the YAML file of the study; every key of it is an option, too.
    """
    _trajectory([str(config)])


def _trajectory(arguments: list[str]) -> None:
    from rich.console import Console

    from mui_callback.trajectory.parser import parse_study

    study, is_dry_run = parse_study(arguments)
    console = Console(highlight=False)
    if is_dry_run:
        from mui_callback.trajectory.dry_run import show_plan

        if not show_plan(study, console):
            sys.exit(1)
        return
    from mui_callback.trajectory.run import run_study

    try:
        is_complete = run_study(study, console).is_complete
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        sys.exit(130)
    if not is_complete:
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``mui-callback``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from jsonargparse import auto_cli

        from mui_callback.options import OptionParser
    except ImportError:
        sys.exit("mui-callback's command line needs more packages: pip install 'mui-callback[hf,wandb,study]'")
    commands = {
        "demo": demo,
        "inspect": inspect,
        "diversity": diversity,
        "select": select,
        "trajectory": trajectory,
        "ablate": ablate,
        "report": report,
        "watch": watch,
        "workspace": workspace,
    }
    try:
        if arguments[:1] == ["trajectory"]:  # whose options come from a file and the environment, too
            _trajectory(arguments[1:])
        else:
            auto_cli(commands, args=arguments, prog="mui-callback", parser_class=OptionParser)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has had enough
        # What is left must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MUIError, ValueError, OSError) as error:
        sys.exit(f"mui-callback: {error}")
    except ImportError as error:
        sys.exit(f"mui-callback: {error}. pip install 'mui-callback[hf,wandb,study]' installs what is missing.")
