"""A probe pass against a plain forward of the same tokens, for shapes of published models, in one run.

    export PYTHONPATH=src
    python tests/benchmarks/probe_pass.py --shapes olmoe,qwen3 --batches 4x512,16x512 --out pass.json

The plain forward is one without gradients, with transformers' own ``grouped_mm`` experts and the logits of every
position, without a cache of keys and values, as the probe has none. A pass has 64 samples of one shape, or
``--batches-per-pass`` batches; its first batch also checks the conservation identity, so what further ones cost is said
apart (steady). Before anything is timed, the probe is compared with plain loops on two layers of the shape.

``--tasks`` measures a whole ``measure()`` at its defaults instead: three tasks with the lengths of GSM8K, ARC and
HumanEval, 200 samples each.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from counted import difference, dispatched, launches, profiled, synchronizations
from drawn import draw_samples, forward_all, n_scored
from measuring import (
    Action,
    cell,
    common_arguments,
    device_and_dtype,
    interleaved,
    machine,
    medians,
    peak_bytes,
    quotients,
    seconds_of,
    table,
    write,
)
from naive_probe import check
from shapes import SHAPES, BatchShape, Shape, build, floor
from tasks import draw_tasks, padding, samples_of

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.probe.batches import Batch, make_batches
from mui_callback.probe.samples import TokenSample

SAMPLES = 64
"""Of a pass; as many as `MUICallback` takes of the eval data by default."""
CHECKED = BatchShape(8, 12)
"""Samples that the probe is compared with loops on, scored from the middle on."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, repeats=7)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: all")
    parser.add_argument("--batches", help="such as 4x512,16x512; default: those of the shape")
    parser.add_argument("--batches-per-pass", type=int, help=f"default: those of {SAMPLES} samples")
    parser.add_argument("--layers", type=int, help="only the first layers, to fit into memory or time")
    parser.add_argument("--attention", help="for the plain forward and the probe; default: that of the shape")
    parser.add_argument("--tokens", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--scored", choices=("all", "response"), default="all", help="response: the last quarter")
    parser.add_argument("--tasks", action="store_true", help="three tasks at default settings, see above")
    parser.add_argument("--samples", type=int, default=200, help="with --tasks: samples of each")
    parser.add_argument("--times-only", action="store_true", help="count no operators, waits and launches")
    parser.add_argument("--no-check", action="store_true", help="no comparison with loops")
    parser.add_argument("--profile", action="store_true", help="show what a pass spends time in")
    parser.add_argument("--trace", type=Path, help="with --profile: a folder for traces that Chrome shows")
    return parser.parse_args()


@dataclass(frozen=True)
class Bench:
    """A model on a device, and how it is to be measured."""

    args: argparse.Namespace
    shape: Shape
    device: torch.device
    model: Any

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def n_batches(self, batch: BatchShape) -> int:
        """Of a pass."""
        return int(self.args.batches_per_pass or max(1, SAMPLES // batch.rows))

    def probe(self, samples: Sequence[TokenSample], batch: BatchShape) -> MUIProbe:
        fraction = self.shape.fraction(tiny=self.args.tiny)
        return MUIProbe(
            self.model,
            ProbeSet({"all": list(samples)}),
            batch_tokens=batch.tokens,
            dense=self.shape.dense,
            rules=f"top_fraction={fraction}",
        )


# One batch shape


def measure(bench: Bench, batch: BatchShape) -> dict[str, Any]:
    """Everything about one batch shape; seconds, bytes and counts."""
    n, device = bench.n_batches(batch), bench.device
    rng = np.random.default_rng(bench.args.seed)
    vocab = bench.model.config.vocab_size
    samples = draw_samples(rng, vocab, batch, n + 1, bench.args.tokens, bench.args.scored)
    batches = make_batches(samples[: n * batch.rows], batch.tokens)
    assert [one.input_ids.shape for one in batches] == [(batch.rows, batch.length)] * n
    plain = partial(forward_all, bench.model, batches, device)
    probes = {k: bench.probe(samples[: k * batch.rows], batch) for k in (1, n, n + 1)}
    first = seconds_of(probes[n].measure, device)
    actions: dict[str, Action] = {"plain": plain, **{f"probe_{k}": probe.measure for k, probe in probes.items()}}
    seconds = interleaved(actions, bench.args.repeats, device)
    report = probes[n].measure()
    return {
        "shape": bench.shape.name,
        "batch": str(batch),
        "batches": n,
        **times(seconds, n, batch),
        "first_pass_seconds": first,
        "memory": memory(plain, probes[n].measure, device),
        "report": check_report(report, samples[: n * batch.rows], next(bench.model.parameters()).dtype),
        **({} if bench.args.times_only else {"counts": counts(bench, batches, probes, n)}),
        "seconds": seconds,
    }


def times(seconds: dict[str, list[float]], n: int, batch: BatchShape) -> dict[str, Any]:
    """Milliseconds of a batch, and ratios: of a whole pass of n batches, and of what one more batch costs; medians."""
    of_steady = [(more - one) / n for more, one in zip(seconds[f"probe_{n + 1}"], seconds["probe_1"], strict=True)]
    ratios = quotients(seconds[f"probe_{n}"], seconds["plain"])
    plain, probe = median(seconds["plain"]), median(seconds[f"probe_{n}"])
    return {
        "plain_ms": 1e3 * plain / n,
        "probe_ms": 1e3 * probe / n,
        "first_batch_ms": 1e3 * median(seconds["probe_1"]),
        "steady_ms": 1e3 * median(of_steady),
        "ratio": median(ratios),
        "ratios": ratios,
        "steady_ratio": n * median(quotients(of_steady, seconds["plain"])),
        "plain_tokens_per_second": n * batch.tokens / plain,
        "probe_tokens_per_second": n * batch.tokens / probe,
    }


def memory(plain: Action, probe: Action, device: torch.device) -> dict[str, int | None]:
    """Bytes that are taken before, and most bytes in either; None on a CPU."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    plain_peak, probe_peak = peak_bytes(plain, device), peak_bytes(probe, device)
    extra = None if plain_peak is None or probe_peak is None else probe_peak - plain_peak
    return {"before": before, "plain_peak": plain_peak, "probe_peak": probe_peak, "extra": extra}


def counts(bench: Bench, batches: Sequence[Batch], probes: dict[int, MUIProbe], n: int) -> dict[str, Any]:
    """Operators, waits for the device, bytes to the host and launches, in runs of their own."""
    device, layers = bench.device, bench.layers
    one, more = probes[1].measure, probes[n + 1].measure
    forward = partial(forward_all, bench.model, batches, device)
    plain, one_seen, seen = dispatched(forward), dispatched(one), dispatched(more)
    steady, on_cuda = seen.minus(one_seen, n), device.type == "cuda"
    found: dict[str, Any] = {
        "operators_per_batch": {"plain": plain.operators / n, "probe": steady["operators"]},
        "operators_per_layer": {"plain": plain.operators / n / layers, "probe": steady["operators"] / layers},
        "host_reads_per_batch": {"plain": plain.host_reads / n, "probe": steady["host_reads"]},
        "host_reads": {"plain": {k: v / n for k, v in plain.reads.items()}, "probe": steady["reads"]},
        "host_bytes_in_a_pass": seen.host_bytes if on_cuda else None,
        "host_bytes_per_batch": (seen.host_bytes - one_seen.host_bytes) / n if on_cuda else None,
        "first_batch_operators": one_seen.operators,
    }
    if on_cuda:
        waits = difference(synchronizations(more, device), synchronizations(one, device), n)
        of_plain = difference(synchronizations(forward, device), {}, n)
        launched = [launches(forward, device) or 0, (launches(more, device) or 0) - (launches(one, device) or 0)]
        found |= {
            "waits_per_batch": {"plain": sum(of_plain.values()), "probe": sum(waits.values())},
            "waits_at": {"plain": of_plain, "probe": waits},
            "launches_per_batch": {"plain": launched[0] / n, "probe": launched[1] / n},
        }
    return found


def check_report(report: MUIReport, samples: Sequence[TokenSample], dtype: torch.dtype) -> dict[str, Any]:
    """Assert that the pass that was timed has counted everything."""
    counted = report.counts
    found = {
        "samples": report.n_samples,
        "tokens": report.tokens,
        "mui": report.mui,
        "loss": report.pooled.loss,
        "identity_error": report.identity_error,
        "not_finite": report.not_finite,
    }
    assert report.n_samples == len(samples)
    assert report.tokens == sum(int(sample.scored.sum()) for sample in samples)
    assert report.not_finite == report.broken_samples == report.unscored == report.truncated == 0
    assert report.identity_error is not None
    assert report.identity_error < (1e-3 if dtype == torch.float32 else 2e-2), found
    assert (np.diff(counted.key_sets[0].end, prepend=0) > 0).all(), "a sample without key neurons"
    assert (counted.loss > 0).all()
    return found


# Three tasks


def measure_tasks(bench: Bench) -> dict[str, Any]:
    """Seconds of one `measure()` at its defaults, and of plain forwards of the same batches."""
    args, device = bench.args, bench.device
    rng = np.random.default_rng(args.seed)
    config = bench.model.config
    probe_set = draw_tasks(rng, config.vocab_size, args.samples, args.tokens, config.max_position_embeddings)
    probe = MUIProbe(bench.model, probe_set, dense=bench.shape.dense)
    samples = samples_of(probe_set)
    choices = [choice for sample in samples for choice in sample.choices]
    batch_tokens = probe.settings.batch_tokens
    batches = [batch for part in (samples, choices) for batch in make_batches(part, batch_tokens)]
    plain = partial(forward_all, bench.model, batches, device)
    first = seconds_of(probe.measure, device)
    every = interleaved({"plain": plain, "probe": probe.measure}, args.repeats, device)
    seconds, ratios = medians(every), quotients(every["probe"], every["plain"])
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return {
        "shape": bench.shape.name,
        "batch": f"tasks at {batch_tokens} positions",
        "plain_ms": 1e3 * seconds["plain"] / len(batches),
        "probe_ms": 1e3 * seconds["probe"] / len(batches),
        "ratio": median(ratios),
        "ratios": ratios,
        "probe_tokens_per_second": tokens / seconds["probe"],
        "pass_seconds": seconds["probe"],
        "first_pass_seconds": first,
        "samples": padding(samples, batch_tokens),
        "choices": padding(choices, batch_tokens),
        "memory": memory(plain, probe.measure, device),
        "report": check_report(probe.measure(), samples, next(bench.model.parameters()).dtype),
    }


def say(result: dict[str, Any]) -> None:
    """What is known of a batch shape, as soon as it is."""
    values = zip(COLUMNS, line(result), strict=True)
    words = [f"{name} {cell(value)}" for name, value in values if value is not None]
    print(", ".join([*words, *filter(None, [result.get("error")])]), flush=True)


def say_tasks(result: dict[str, Any]) -> None:
    words = [
        f"{result['shape']}: a pass over {result['report']['samples']} samples {result['pass_seconds']:.3f} s "
        f"(the first one {result['first_pass_seconds']:.3f} s), {result['ratio']:.2f} times plain forwards"
    ]
    for what in ("samples", "choices"):
        found = result[what]
        words.append(f"{what}: {found['padding']:.1%} of {found['positions']} positions are padding")
    print("; ".join(words), flush=True)


# All of them


def checked(args: argparse.Namespace, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the probe with loops on two layers of a shape."""
    model = build(
        shape.config(tiny=args.tiny, layers=2), device, dtype, attention=args.attention or shape.attention, seed=1
    )
    rng = np.random.default_rng(args.seed + 1)
    scored = np.arange(CHECKED.length) >= CHECKED.length // 2
    vocab = model.config.vocab_size
    samples = [TokenSample(str(i), rng.integers(0, vocab, CHECKED.length), scored) for i in range(CHECKED.rows)]
    return check(model, samples, shape.fraction(tiny=args.tiny), dense=shape.dense)


def run_shape(args: argparse.Namespace, shape: Shape) -> Iterator[dict[str, Any]]:
    """One result for each batch shape, as soon as it is there."""
    device, dtype = device_and_dtype(args)
    attention = args.attention or shape.attention
    about: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "attention": attention}
    if not args.no_check:
        found = about["against_loops"] = checked(args, shape, device, dtype)
        print(
            f"{shape.name}: {'as' if found['agrees'] else 'NOT AS'} loops over two layers have it: {found}", flush=True
        )
        release(device)
    model = build(shape.config(tiny=args.tiny, layers=args.layers), device, dtype, attention=attention)
    bench = Bench(args, shape, device, model)
    about |= {"layers": bench.layers, "parameters": sum(p.numel() for p in model.parameters())}
    print(
        f"{shape.name}: {about['parameters'] / 1e9:.2f} B parameters in {about['dtype']}, {bench.layers} layers"
        f"{' (cut)' if args.layers else ''}, {attention} attention, grouped_mm experts, no cache",
        flush=True,
    )
    if args.tasks:
        result = measure_tasks(bench)
        say_tasks(result)
        yield {**result, **about}
        return
    batches = tuple(map(BatchShape.parse, args.batches.split(","))) if args.batches else ()
    for batch in batches or shape.default_batches(tiny=args.tiny):
        try:
            found = measure(bench, batch)
        except torch.OutOfMemoryError as error:
            found = {"shape": shape.name, "batch": str(batch), "error": str(error).splitlines()[0]}
        scored = batch.rows * n_scored(batch.length, args.scored)
        cost = floor(shape, batch, scored, tiny=args.tiny, layers=args.layers)
        yield {**found, **about, "floor": cost.as_dict}
        if args.profile and "error" not in found:
            show_profile(bench, batch)
        release(device)


def show_profile(bench: Bench, batch: BatchShape) -> None:
    """Where the time goes in a warm pass, and in plain forwards."""
    args, n = bench.args, bench.n_batches(batch)
    rng = np.random.default_rng(args.seed)
    samples = draw_samples(rng, bench.model.config.vocab_size, batch, n, args.tokens, args.scored)
    probe = bench.probe(samples, batch)
    probe.measure()
    plain = partial(forward_all, bench.model, make_batches(samples, batch.tokens), bench.device)
    actions: dict[str, Action] = {"plain": plain, "probe": probe.measure}
    for name, action in actions.items():
        print(f"{bench.shape.name}, {batch}: {name}, {n} batches", flush=True)
        trace = None if args.trace is None else args.trace / f"{bench.shape.name}-{batch}-{name}.json"
        profiled(action, bench.device, trace)


def release(device: torch.device) -> None:
    """Give back the memory of what is not used any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(result: dict[str, Any]) -> list[object]:
    """A row of the table that is printed at the end."""
    extra = result.get("memory", {}).get("extra")
    found = result.get("counts", {})
    waits = found.get("waits_per_batch") or found.get("host_reads_per_batch") or {}
    per_layer = found.get("operators_per_layer") or {}
    return [
        *(result["shape"], result["batch"], result.get("batches")),
        *(result.get(name) for name in ("plain_ms", "probe_ms", "ratio")),
        f"{min(ratios):.2f} to {max(ratios):.2f}" if (ratios := result.get("ratios")) else None,
        *(result.get(name) for name in ("first_batch_ms", "steady_ms", "steady_ratio", "probe_tokens_per_second")),
        None if extra is None else extra / 2**30,
        *(waits.get("plain"), waits.get("probe"), per_layer.get("plain"), per_layer.get("probe")),
    ]


COLUMNS = [
    *("shape", "batch", "batches", "plain ms", "probe ms", "ratio", "in the repeats"),
    *(
        "first batch ms",
        "steady ms",
        "steady ratio",
        "tokens/s",
        "extra GiB",
        "waits (plain)",
        "waits (probe)",
        "operators a layer (plain)",
        "(probe)",
    ),
]


def main() -> None:
    args = arguments()
    if args.trace is not None:
        args.trace.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    everything = {"machine": machine(), "options": {**vars(args), "out": str(args.out)}, "results": results}
    everything["options"]["trace"] = None if args.trace is None else str(args.trace)
    for name in args.shapes.split(","):
        for result in run_shape(args, SHAPES[name]):
            results.append(result)
            say(result)
            write(everything, args.out)
        release(device_and_dtype(args)[0])
    print(f"\n{table(COLUMNS, [line(result) for result in results])}")
    wrong = [result["shape"] for result in results if not result.get("against_loops", {"agrees": True})["agrees"]]
    assert not wrong, f"not what loops find: {wrong}"


if __name__ == "__main__":
    main()
