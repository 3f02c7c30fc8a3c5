"""A model of a billion parameters or more, trained by two processes under a monitor and probed as it is spread.

    export PYTHONPATH=src
    torchrun --nproc-per-node 2 tests/gpu/parallel.py --backend deepspeed_moe

What is measured is compared with what one process alone measures of the same weights, and timed against it and against
plain forward passes; the last line printed is a JSON object with every figure. ``--profile`` tells where the time goes.
With ``--tiny`` everything is small, in float32 and on the CPU. Where there are fewer GPUs than processes, these share
one over gloo: figures of time then mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from models import BACKENDS, Place, Trainee, all_tokens_kept, drops_tokens, whole_weights
from numpy.typing import NDArray
from torch import distributed, nn

from mui_callback import MemorySink, MUIMonitor, MUIProbe, MUIReport, ProbeSet
from mui_callback.probe.batches import Batch, make_rounds
from mui_callback.probe.samples import TokenSample

TINY = {
    "samples": 12,
    "texts": 6,
    "min_length": 16,
    "max_length": 32,
    "batch_tokens": 128,
    "batch_size": 2,
    "top_fraction": 0.02,
    "dtype": "float32",
    "repetitions": 2,
}
_PROFILED = 25
"""Operators that are shown."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--tiny", action="store_true", help="small, in float32, on the CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8, help="training sequences of a process in a step")
    parser.add_argument("--samples", type=int, default=1024, help="of which the last quarter is scored")
    parser.add_argument("--texts", type=int, default=512, help="samples in which every token is scored")
    parser.add_argument("--min-length", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--top-fraction", type=float, default=0.001)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times-only", action="store_true", help="no comparison with one process")
    parser.add_argument("--profile", action="store_true", help="show the operators that one measurement spends time in")
    parser.add_argument("--deadline", type=float, default=400, help="seconds until a process that hangs ends itself")
    parser.add_argument("--reference", type=Path, help="a directory; the part of one process, started by this script")
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY)
    return parser.parse_args()


def make_place(args: argparse.Namespace) -> Place:
    device = torch.device("cpu")
    if not args.tiny:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if "LOCAL_RANK" in os.environ:
            os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of a GPU
    return Place(device, getattr(torch, args.dtype), args.tiny, args.seed, args.batch_size)


def say(*words: object) -> None:
    """From the first process only."""
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        print(f"[{time.perf_counter() - _START:6.1f} s]", *words, flush=True)


_START = time.perf_counter()


# Data


class Chain:
    """Tokens of a Markov chain over a part of the vocabulary, one in ten of them drawn from all of it."""

    def __init__(self, vocab: int) -> None:
        rng = np.random.default_rng(0)
        self.vocab = vocab
        self.states = rng.choice(np.arange(3, vocab), min(1024, vocab // 2), replace=False)
        self.next = rng.integers(0, len(self.states), (len(self.states), 4))

    def draw(self, rng: np.random.Generator, n: int, length: int) -> NDArray[np.int64]:
        """Token ids ``[n, length]``."""
        state = np.empty((n, length), np.int64)
        state[:, 0] = rng.integers(0, len(self.states), n)
        which = rng.choice(4, (n, length), p=(0.6, 0.25, 0.1, 0.05))
        for t in range(1, length):
            state[:, t] = self.next[state[:, t - 1], which[:, t]]
        noise = rng.integers(3, self.vocab, (n, length))
        return np.where(rng.random((n, length)) < 0.1, noise, self.states[state])


def make_probe_set(args: argparse.Namespace, tokens: Chain) -> ProbeSet:
    """Prompts with a response, and plain text."""
    rng = np.random.default_rng(args.seed + 1)

    def samples(task: str, n: int, share: float) -> list[TokenSample]:
        ids = tokens.draw(rng, n, args.max_length)
        lengths = rng.integers(args.min_length, args.max_length + 1, n)
        return [
            TokenSample(f"{task}-{i}", ids[i, :length], np.arange(length) >= max(1, length - round(share * length)))
            for i, length in enumerate(lengths)
        ]

    return ProbeSet({"dialogue": samples("dialogue", args.samples, 0.25), "text": samples("text", args.texts, 1.0)})


def tokens_of(probe_set: ProbeSet) -> list[TokenSample]:
    return [sample for task in probe_set.tasks.values() for sample in task if isinstance(sample, TokenSample)]


# Training


def train(
    trainee: Trainee, args: argparse.Namespace, place: Place, tokens: Chain, probe_set: ProbeSet
) -> dict[str, Any]:
    sink, losses, seconds = MemorySink(), [], []
    rng = np.random.default_rng([args.seed, 2, distributed.get_rank()])
    options = {"batch_tokens": args.batch_tokens, "rules": f"top_fraction={args.top_fraction}"}
    with (
        tempfile.TemporaryDirectory() as output_dir,
        MUIMonitor(
            trainee.model,
            probe_set,
            tracker=None,
            sinks=[sink],
            every=8,
            output_dir=output_dir,
            on_error="raise",
            **options,
        ) as monitor,
    ):
        for step in range(1, args.steps + 1):
            input_ids = torch.from_numpy(tokens.draw(rng, args.batch_size, args.max_length)).to(place.device)
            start = time.perf_counter()
            losses.append(trainee.step(input_ids))
            seconds.append(time.perf_counter() - start)
            monitor.step(step)
    reports = {point.step: point.report for point in sink.points if point.report is not None}
    for step, report in reports.items():
        say(f"step {step}: {report!r}, {report.seconds:.3f} s, identity error {report.identity_error}")
    return {
        "losses": [losses[0], losses[-1]],
        "step_seconds": median(seconds),
        "points": {step: [report.mui, report.pooled.loss, report.seconds] for step, report in reports.items()},
    }


# Times


def synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    if distributed.is_initialized():
        distributed.barrier()


def median_seconds(action: Callable[[], object], repetitions: int, place: Place) -> float:
    """Of the slowest process, after a warm-up."""
    seconds = torch.zeros(repetitions + 1, dtype=torch.float64, device=place.device)
    for number in range(repetitions + 1):
        synchronize(place)
        start = time.perf_counter()
        action()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        seconds[number] = time.perf_counter() - start
    if distributed.is_initialized():
        distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return float(seconds[1:].median())


def measure(probe: MUIProbe, args: argparse.Namespace, place: Place) -> tuple[MUIReport, float, list[float]]:
    """A report, the median of the seconds, and GiB before and at most, after a warm-up."""
    warm_up = probe.measure()
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device) if place.device.type == "cuda" else 0
    seconds = []
    for _ in range(args.repetitions):
        synchronize(place)
        seconds.append(probe.measure().seconds)
    most = torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else 0
    return warm_up, median(seconds), [round(size / 2**30, 2) for size in (before, most)]


def forward_all(model: nn.Module, batches: Sequence[Batch], place: Place) -> None:
    """As a user evaluates: logits of every position."""
    with torch.no_grad():
        for batch in batches:
            input_ids = torch.from_numpy(batch.input_ids).to(place.device, non_blocking=True)
            mask = torch.from_numpy(batch.attention_mask).to(place.device, non_blocking=True)
            model(input_ids=input_ids, attention_mask=mask)


def profiled(action: Callable[[], object]) -> None:
    """Show what the first process does in it."""
    if distributed.is_initialized() and distributed.get_rank() > 0:
        action()
        return
    with torch.profiler.profile() as profile:
        action()
    averages = profile.key_averages()
    for key in ("self_device_time_total", "self_cpu_time_total"):
        say(f"by {key}\n{averages.table(sort_by=key, row_limit=_PROFILED, max_name_column_width=60)}")


def measure_and_time(
    model: nn.Module, probe_set: ProbeSet, args: argparse.Namespace, place: Place
) -> tuple[MUIReport, dict[str, Any]]:
    """A report, and tokens that all processes do in a second in a probe and in a plain forward of the same batches."""
    probe = MUIProbe(model, probe_set, batch_tokens=args.batch_tokens, rules=f"top_fraction={args.top_fraction}")
    report, seconds, memory = measure(probe, args, place)
    if args.profile:
        profiled(probe.measure)
    samples = tokens_of(probe_set)
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    batches = [batches[rank] for batches in make_rounds(samples, args.batch_tokens, size)]
    model.eval()
    taken = {"probe": seconds}
    forward = partial(forward_all, model, batches, place)
    taken["forward"] = median_seconds(forward, args.repetitions, place)
    if drops_tokens(model):
        with all_tokens_kept(model):
            taken["forward_without_drops"] = median_seconds(forward, args.repetitions, place)
    n_tokens = sum(len(sample.input_ids) for sample in samples)
    speed = {name: n_tokens / seconds for name, seconds in taken.items()}
    say(f"{report!r}; tokens per second: " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items()))
    return report, {"tokens": n_tokens, "seconds": taken, "tokens_per_second": speed, "probe_gib": memory}


# One process


def run_reference(args: argparse.Namespace) -> None:
    """Measure the weights in a directory and leave the report there."""
    place, backend, directory = make_place(args), BACKENDS[args.backend], args.reference
    model = backend.reference(place).eval()
    state = torch.load(directory / "weights.pt", map_location=place.device, weights_only=True)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not missing, f"weights that were not gathered: {missing}"
    del state
    probe_set = make_probe_set(args, Chain(model.lm_head.out_features))
    report, times = measure_and_time(model, probe_set, args, place)
    halved = MUIProbe(
        model, probe_set, batch_tokens=args.batch_tokens // 2, rules=f"top_fraction={args.top_fraction}"
    ).measure()
    report.save(directory / "one.npz")
    halved.save(directory / "halved.npz")
    (directory / "times.json").write_text(json.dumps(times))


def start_reference(directory: Path) -> None:
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value for name, value in os.environ.items() if name not in own and not name.startswith("TORCHELASTIC")
    }
    command = [sys.executable, *sys.argv, "--reference", str(directory)]
    subprocess.run(command, env=environment, check=True)


# Both


def compare(first: MUIReport, second: MUIReport) -> dict[str, Any]:
    """How far the report of all processes is from that of one."""

    def jaccard(task: str | None = None) -> float:
        here, there = first.key_neurons(task), second.key_neurons(task)
        return len(here & there) / max(len(here | there), 1)

    losses = [report.pooled.loss or 0.0 for report in (first, second)]
    routed = [report.counts.routed for report in (first, second)]
    return {
        "jaccard": jaccard(),
        **{f"jaccard_{task}": jaccard(task) for task in first.task_names},
        "mui": [first.mui, second.mui],
        "mui_difference": (first.mui or 0.0) - (second.mui or 0.0),
        "loss": losses,
        "loss_difference": losses[0] - losses[1],
        "routed_differently": float(np.abs(routed[0] - routed[1]).sum() / routed[1].sum()),
        "identity_error": [first.identity_error, second.identity_error],
        "dropped_tokens": first.dropped_tokens,
    }


def machine() -> dict[str, Any]:
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "python": sys.version.split()[0],
        **{
            name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "transformers", "deepspeed")
        },
    }


def run_in_all(args: argparse.Namespace) -> None:
    place, backend = make_place(args), BACKENDS[args.backend]
    size = int(os.environ["WORLD_SIZE"])
    has_own_gpu = place.device.type == "cuda" and torch.cuda.device_count() >= size
    distributed.init_process_group("nccl" if has_own_gpu else "gloo", timeout=timedelta(minutes=4))
    is_first = distributed.get_rank() == 0
    trainee = backend.build(place)
    torch.manual_seed(args.seed + distributed.get_rank())  # DeepSpeed's routers draw
    synchronize(place)
    inner: Any = getattr(trainee.model, "module", trainee.model)
    tokens = Chain(inner.lm_head.out_features)
    probe_set = make_probe_set(args, tokens)
    say(f"built {args.backend} on {place.device}, {probe_set!r}")
    trained = train(trainee, args, place, tokens, probe_set)
    say(f"trained: {trained}")
    report, times = measure_and_time(trainee.model, probe_set, args, place)
    if args.times_only:
        say(json.dumps({"backend": args.backend, "all_processes": times, "training": trained}))
        return
    weights = whole_weights(backend, trainee.model, place)
    n_parameters = sum(value.numel() for value in weights.values())
    synchronize(place)
    distributed.destroy_process_group()
    del trainee, inner
    gc.collect()
    torch.cuda.empty_cache()
    if not is_first:
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.save(weights, directory / "weights.pt")
        weights.clear()
        start_reference(directory)
        one, halved = (MUIReport.load(directory / f"{which}.npz") for which in ("one", "halved"))
        times_of_one = json.loads((directory / "times.json").read_text())
    here, there = times["tokens_per_second"], times_of_one["tokens_per_second"]
    figures = {
        "backend": args.backend,
        "parameters": n_parameters,
        "against_one": compare(report, one),
        "one_against_itself_in_other_batches": compare(one, halved),
        "all_processes": times,
        "one_process": times_of_one,
        "probe_against_probe_of_one": here["probe"] / there["probe"],
        **{f"probe_against_{name}": here["probe"] / here[name] for name in here if name != "probe"},
        "probe_against_forward_in_one": there["probe"] / there["forward"],
        "training": trained,
        "machine": machine(),
        "has_own_gpu": has_own_gpu,
        "command": " ".join(sys.argv),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    options = arguments()
    faulthandler.dump_traceback_later(options.deadline, exit=True)
    run_reference(options) if options.reference else run_in_all(options)
    faulthandler.cancel_dump_traceback_later()
