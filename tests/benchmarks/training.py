"""What the callback costs a training: the same training with `MUICallback` at its defaults and without, in turns.

    export PYTHONPATH=src
    python tests/benchmarks/training.py --shape olmoe --layers 4 --batch 8x512 --steps 2000 --out training.json

A training is one of transformers' Trainer, from the same weights with the same data each time; only its loop is timed,
with all that the callback does in it. The first probe of the process is told apart: it is cold. What the callback
probes is, as by default, the first 64 samples of the eval data, as often as its budget allows.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from drawn import draw_ids
from measuring import common_arguments, device_and_dtype, machine, synchronize, table, turned, write
from shapes import SHAPES, BatchShape, build
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging as transformers_logging

from mui_callback import MemorySink, MUICallback

WARM_UP = 5
"""Steps of a training before those that are timed."""
EVAL_ROWS = 64
ROWS = 512
"""Different rows to train on."""
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, repeats=2)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--layers", type=int, help="only the first layers")
    parser.add_argument("--batch", type=BatchShape.parse, default=BatchShape(8, 256), help="of a step, such as 8x256")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tracker", choices=("none", "wandb"), default="none", help="wandb: offline")
    return parser.parse_args()


@dataclass
class Trained:
    """One training."""

    seconds: float
    """Of the loop, from its first event to its last."""
    step_seconds: float
    """Median over the steps, from the beginning of one to that of the next."""
    loss: float
    """Mean over all steps, nats a token."""
    probed: list[int] = field(default_factory=list)
    """Steps that were probed."""
    probe_seconds: list[float] = field(default_factory=list)
    """Of each pass."""
    begin_seconds: float = 0.0
    """In the callback before the first step: finding experts, encoding, the first probe, opening sinks."""
    end_seconds: float = 0.0
    """In the callback after the last probe: closing sinks, waiting for the last pictures."""
    other_seconds: float = 0.0
    """In the callback at steps that were not probed, on the host."""
    overhead: float | None = None
    """What the callback says at the last probe: time in probes over the time outside."""


def train(args: argparse.Namespace, *, steps: int, watched: bool) -> Trained:
    """Train once, with the callback or without."""
    device, dtype = device_and_dtype(args)
    shape, memory = SHAPES[args.shape], MemorySink()
    model = build(shape.config(tiny=args.tiny, layers=args.layers), device, dtype, attention=shape.attention)
    first, last, spent = _Clock(device), _Clock(device), _Spent()
    callbacks = [spent.of(MUICallback(sinks=[memory], dense=shape.dense))] if watched else []
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model,
            training_arguments(args, directory, steps),
            data_collator=default_data_collator,
            train_dataset=rows(args, model.config.vocab_size, ROWS, seed=1),
            eval_dataset=rows(args, model.config.vocab_size, EVAL_ROWS, seed=2),
            callbacks=[first, *callbacks, last],
        )
        trainer.remove_callback(PrinterCallback)
        with tracked(args, directory):
            loss = trainer.train().training_loss
    del trainer, model
    gc.collect()
    reports = [point.report for point in memory.points]
    assert not watched or (reports and None not in reports), "a probe failed"
    probed = [point.step for point in memory.points]
    return Trained(
        seconds=last.ended - first.began,
        step_seconds=median(after - before for before, after in pairwise(first.steps)),
        loss=loss,
        probed=probed,
        probe_seconds=[report.seconds for report in reports if report is not None],
        begin_seconds=spent.seconds_in("on_train_begin"),
        end_seconds=spent.seconds_in("on_train_end"),
        other_seconds=sum(seconds for _, step, seconds in spent.events if step not in probed),
        overhead=memory.points[-1].spent.overhead if watched else None,
    )


@contextmanager
def tracked(args: argparse.Namespace, directory: str) -> Iterator[None]:
    """Whatever W&B logs stays in a directory."""
    if args.tracker == "none":
        yield
        return
    import wandb

    with patch.dict(os.environ, WANDB_MODE="offline", WANDB_DIR=directory, WANDB_SILENT="true"):
        yield
        wandb.finish()


def training_arguments(args: argparse.Namespace, directory: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=directory,
        max_steps=steps,
        per_device_train_batch_size=args.batch.rows,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        logging_steps=50,
        save_strategy="no",
        report_to=["wandb"] if args.tracker == "wandb" else "none",
        disable_tqdm=True,
        dataloader_pin_memory=args.device == "cuda",
        use_cpu=args.device == "cpu",
        seed=args.seed,
    )


def rows(args: argparse.Namespace, vocab: int, n: int, *, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token ids of which some are more frequent, so that there is something to learn."""
    rng = np.random.default_rng([args.seed, seed])
    ids = torch.from_numpy(draw_ids(rng, vocab, n * args.batch.length, "zipf")).view(n, args.batch.length)
    return [{"input_ids": row, "labels": row} for row in ids]


class _Clock(TrainerCallback):
    """When a training began and ended, for an idle device, and when its steps began, on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.began = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.ended = time.perf_counter()


class _Spent:
    """Times every event of a callback, on the host."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float]] = []
        """Name, optimizer steps done, seconds."""

    def of(self, callback: Any) -> Any:
        for name in EVENTS:
            setattr(callback, name, self._timed(name, getattr(callback, name)))
        return callback

    def seconds_in(self, name: str) -> float:
        return sum(seconds for event, _, seconds in self.events if event == name)

    def _timed(self, name: str, event: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(event)
        def timed(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return event(args, state, control, **kwargs)
            finally:
                self.events.append((name, state.global_step, time.perf_counter() - start))

        return timed


def in_turns(args: argparse.Namespace) -> dict[str, list[Trained]]:
    """Trainings without the callback and with it, the order turned round each time."""
    train(args, steps=WARM_UP, watched=False)
    found: dict[str, list[Trained]] = {"without": [], "with": []}
    for repeat in range(args.repeats):
        for name in turned(found, repeat):
            found[name].append(train(args, steps=args.steps, watched=name == "with"))
            print(f"{name}: {found[name][-1]}", flush=True)
    return found


def summary(args: argparse.Namespace, found: dict[str, list[Trained]]) -> dict[str, Any]:
    """Ratios of medians; seconds."""
    without, watched = found["without"], found["with"]
    plain = median(run.seconds for run in without)
    whole = median(run.seconds for run in watched)
    between = median(run.seconds - run.begin_seconds - run.end_seconds for run in watched)
    others = [args.steps - sum(step > 0 for step in run.probed) for run in watched]
    tokens = args.steps * args.batch.tokens
    return {
        "tokens_per_second": {"without": tokens / plain, "with": tokens / whole},
        "ratio": whole / plain,
        "ratio_without_beginning_and_end": between / plain,
        "ratio_of_median_steps": median(run.step_seconds for run in watched)
        / median(run.step_seconds for run in without),
        "share_in_probes": median(sum(run.probe_seconds) / run.seconds for run in watched),
        "overhead_as_logged": median(run.overhead or 0.0 for run in watched),
        "first_probe_of_the_process_seconds": watched[0].probe_seconds[0],
        "beginning_seconds": [run.begin_seconds for run in watched],
        "end_seconds": [run.end_seconds for run in watched],
        "warm_probe_seconds": median(seconds for run in watched for seconds in run.probe_seconds[1:]),
        "probed": [run.probed for run in watched],
        "seconds_a_step_without_a_probe": median(run.other_seconds / n for run, n in zip(watched, others, strict=True)),
        "spread": {name: _spread([run.seconds for run in runs]) for name, runs in found.items()},
        "same_loss": len({run.loss for runs in found.values() for run in runs}) == 1,
    }


def _spread(seconds: list[float]) -> float:
    return max(seconds) / min(seconds) - 1


def main() -> None:
    args = arguments()
    transformers_logging.set_verbosity_error()
    found = in_turns(args)
    sums = summary(args, found)
    options = {**vars(args), "out": str(args.out), "batch": str(args.batch)}
    runs = {name: [asdict(run) for run in runs] for name, runs in found.items()}
    write({"machine": machine(), "options": options, "summary": sums, "runs": runs}, args.out)
    speed = sums["tokens_per_second"]
    cells = {
        "": f"{args.shape}{f', {args.layers} layers' if args.layers else ''}, {args.batch}, {args.steps} steps",
        "tokens/s without": speed["without"],
        "tokens/s with": speed["with"],
        "time with / without": f"{sums['ratio']:.4f}",
        "without beginning and end": f"{sums['ratio_without_beginning_and_end']:.4f}",
        "of median steps": f"{sums['ratio_of_median_steps']:.4f}",
        "as logged": f"{sums['overhead_as_logged']:.4f}",
        "probes": len(sums["probed"][0]),
        "first probe s": sums["first_probe_of_the_process_seconds"],
        "later probes s": sums["warm_probe_seconds"],
        "µs a step without a probe": 1e6 * sums["seconds_a_step_without_a_probe"],
        "spread": f"{max(sums['spread'].values()):.4f}",
    }
    print(table(list(cells), [list(cells.values())]))
    assert args.device == "cuda" or sums["same_loss"], "the callback changed the training"


if __name__ == "__main__":
    main()
