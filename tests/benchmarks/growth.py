"""How the cost of a probe grows: one factor doubled at a time, against the same base in the same run.

    export PYTHONPATH=src
    python tests/benchmarks/growth.py --out growth.json
    python tests/benchmarks/growth.py --factors samples --ranks 2 --device cuda

Each row is ``measure()`` of one factor at one, two, … times the base, timed in turns, and plain forwards of the same
batches beside it. With ``--ranks`` the samples of the base are also shared by up to so many processes, each with a GPU
of its own (NCCL), or all on the CPU (gloo): with fewer cores than processes, that says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from drawn import draw_samples, forward_all
from measuring import (
    Action,
    added_bytes,
    common_arguments,
    device_and_dtype,
    interleaved,
    machine,
    medians,
    quotients,
    seconds_of,
    table,
    turned,
    write,
)
from shapes import BatchShape, build
from tasks import samples_of
from torch import distributed, multiprocessing
from transformers import OlmoeConfig, PreTrainedModel

from mui_callback import MUIProbe, ProbeSet
from mui_callback.probe.batches import make_batches


@dataclass(frozen=True)
class Size:
    """A model and its probe set."""

    samples: int
    length: int
    """Tokens of a sample; all but the first are scored."""
    tasks: int
    layers: int
    experts: int
    width: int
    """Neurons of an expert."""
    hidden: int
    top_k: int
    vocab: int = 8192

    @property
    def config(self) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 128),
            num_key_value_heads=max(1, self.hidden // 128),
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


BASES = {
    "cuda": Size(samples=128, length=512, tasks=4, layers=4, experts=64, width=1024, hidden=2048, top_k=8),
    "cpu": Size(samples=64, length=128, tasks=4, layers=2, experts=16, width=128, hidden=256, top_k=4),
    "tiny": Size(samples=8, length=16, tasks=2, layers=1, experts=4, width=16, hidden=32, top_k=2),
}
FACTORS = {
    "samples": "samples",
    "length": "tokens of each sample",
    "layers": "layers",
    "experts": "experts, each token to as many",
    "width": "neurons of each expert",
    "tasks": "tasks, of the same samples",
}
"""Names of what is doubled, and what they are."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, repeats=5)
    parser.add_argument("--factors", default=",".join(FACTORS), help="default: all")
    parser.add_argument("--doublings", type=int, default=2, help="of each factor")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the samples, doubled up to this")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    return parser.parse_args()


def base_of(args: argparse.Namespace) -> Size:
    return BASES["tiny" if args.tiny else args.device]


# One size


def probe_set_of(size: Size, seed: int) -> ProbeSet:
    rng = np.random.default_rng(seed)
    samples = draw_samples(rng, size.vocab, BatchShape(size.samples, size.length), 1, "uniform", "all")
    return ProbeSet({f"task-{number}": samples[number :: size.tasks] for number in range(size.tasks)})


def model_of(args: argparse.Namespace, size: Size, device: torch.device) -> PreTrainedModel:
    return build(size.config, device, device_and_dtype(args)[1], attention="sdpa", seed=args.seed)


def actions_of(args: argparse.Namespace, size: Size, device: torch.device) -> tuple[Action, Action]:
    """A plain forward of all batches, and a probe."""
    model, probe_set = model_of(args, size, device), probe_set_of(size, args.seed)
    batches = make_batches(samples_of(probe_set), args.batch_tokens)
    probe = MUIProbe(model, probe_set, batch_tokens=args.batch_tokens)
    return partial(forward_all, model, batches, device), probe.measure


# One factor


def grow(args: argparse.Namespace, factor: str) -> list[dict[str, Any]]:
    """The base and its doublings in turns: seconds, and ratios to the base."""
    device, base = device_and_dtype(args)[0], base_of(args)
    sizes = [replace(base, **{factor: getattr(base, factor) * 2**doubling}) for doubling in range(args.doublings + 1)]
    actions: dict[str, Action] = {}
    for number, size in enumerate(sizes):
        actions[f"plain-{number}"], actions[f"probe-{number}"] = actions_of(args, size, device)
    every = interleaved(actions, args.repeats, device)
    seconds = medians(every)

    def ratio(over: str, under: str) -> float:
        return median(quotients(every[over], every[under]))

    return [
        {
            "factor": factor,
            "value": getattr(size, factor),
            "times": 2**number,
            "plain_seconds": seconds[f"plain-{number}"],
            "probe_seconds": seconds[f"probe-{number}"],
            "plain_growth": ratio(f"plain-{number}", "plain-0"),
            "probe_growth": ratio(f"probe-{number}", "probe-0"),
            "probe_over_plain": ratio(f"probe-{number}", f"plain-{number}"),
            "probe_added_bytes": added_bytes(actions[f"probe-{number}"], device),
            "every": [every[f"{kind}-{number}"] for kind in ("plain", "probe")],
        }
        for number, size in enumerate(sizes)
    ]


# Processes


def share(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The base, its samples shared by one, two, … processes."""
    counts = [2**doubling for doubling in range(args.ranks.bit_length())]
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for turn in range(1 if args.tiny else 2):
        for count in turned(counts, turn):
            found[count].append(_of_processes(args, count))
    seconds = {count: median(run["seconds"] for run in runs) for count, runs in found.items()}
    return [
        {
            "factor": "ranks",
            "value": count,
            "times": count,
            "probe_seconds": seconds[count],
            "probe_growth": seconds[count] / seconds[1],
            "sent_bytes": runs[0]["sent_bytes"],
            "every": runs,
        }
        for count, runs in found.items()
    ]


def _of_processes(args: argparse.Namespace, count: int) -> dict[str, float]:
    """Median seconds of the slowest of several processes, in a run of their own, and bytes that all of them sent."""
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(_process, (args, count, Path(directory)), nprocs=count)
        found: dict[str, float] = torch.load(Path(directory) / "found.pt")
    return found


def _process(rank: int, args: argparse.Namespace, count: int, directory: Path) -> None:
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(args.threads or 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=count)
    size = base_of(args)
    probe = MUIProbe(model_of(args, size, device), probe_set_of(size, args.seed), batch_tokens=args.batch_tokens)
    report = probe.measure()
    assert report.n_samples == size.samples
    seconds = torch.tensor([_together(probe.measure, device) for _ in range(args.repeats)], device=device)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    if rank == 0:
        torch.save({"seconds": float(seconds.median()), "sent_bytes": report.comm_bytes}, directory / "found.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _together(action: Action, device: torch.device) -> float:
    distributed.barrier()
    return seconds_of(action, device)


# All of them

COLUMNS = ["what grows", "to", "times", "probe s", "time of a probe", "of plain forwards", "probe / plain", "added GiB"]


def line(row: dict[str, Any]) -> list[object]:
    added = row.get("probe_added_bytes")
    return [
        *(FACTORS.get(row["factor"], "processes"), row["value"], row["times"], row["probe_seconds"]),
        *(row["probe_growth"], row.get("plain_growth"), row.get("probe_over_plain")),
        None if added is None else added / 2**30,
    ]


def main() -> None:
    args = arguments()
    rows: list[dict[str, Any]] = []
    everything = {"machine": machine(), "options": {**vars(args), "out": str(args.out)}, "base": vars(base_of(args))}
    for factor in args.factors.split(","):
        rows += grow(args, factor)
        print(table(COLUMNS, [line(row) for row in rows[-args.doublings - 1 :]]), flush=True)
        write({**everything, "rows": rows}, args.out)
        gc.collect()
    if args.ranks > 1:
        if args.device == "cpu" and args.ranks > len(os.sched_getaffinity(0)):
            print("There are more processes than cores: how long they take says nothing.", flush=True)
        rows += share(args)
        write({**everything, "rows": rows}, args.out)
    print(f"\nBase: {base_of(args)}, in batches of {args.batch_tokens} positions\n")
    print(table(COLUMNS, [line(row) for row in rows]))


if __name__ == "__main__":
    main()
