"""The command line; see the package."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .figures import save_all
from .results import Results, is_done
from .summary import show
from .training import QUICK, Settings, run
from .variants import VARIANTS, Variant

_Run = tuple[Variant, int]
"""And its seed."""


def study(output: Path, settings: Settings, *, seeds: int, jobs: int, console: Console) -> Results:
    """Make the runs that are missing, the tables and the pictures.

    Raises:
        ValueError: a run is there with other settings.
    """
    wanted = [(variant, seed) for seed in range(seeds) for variant in VARIANTS]
    missing = [(variant, seed) for variant, seed in wanted if not is_done(output, variant, seed, settings)]
    _run_all(missing, settings, output, jobs, console)
    results = Results.load(output, range(seeds))
    results.write(output)
    show(results, console)
    console.print("", *save_all(results, output), f"{results.seconds / 60:.1f} minutes of processor time", sep="\n")
    return results


def _run_all(missing: Sequence[_Run], settings: Settings, output: Path, jobs: int, console: Console) -> None:
    columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(missing))
        for (variant, seed), said in (_side_by_side if jobs > 1 else _in_turn)(missing, settings, output, jobs):
            progress.advance(bar)
            console.print(f"{variant.name}, seed {seed}: {said}")


def _side_by_side(missing: Sequence[_Run], settings: Settings, output: Path, jobs: int) -> Iterator[tuple[_Run, str]]:
    """Each in a process and on a thread of its own: with steps this small, threads would wait for each other."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, *one, settings, output): one for one in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_turn(missing: Sequence[_Run], settings: Settings, output: Path, _: int) -> Iterator[tuple[_Run, str]]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for one in missing:
            yield one, run(*one, settings, output)
    finally:
        torch.set_num_threads(n_threads)


def main() -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.controlled_study", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("mui-study"))
    parser.add_argument("--seeds", type=int, help="4, or 2 with --quick")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="to see that it works: a few small steps")
    given = parser.parse_args()
    settings = QUICK if given.quick else Settings()
    if given.steps is not None:
        settings = replace(settings, steps=given.steps)
    seeds = given.seeds or (2 if given.quick else 4)
    try:
        study(given.output, settings, seeds=seeds, jobs=given.jobs, console=Console(highlight=False))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
