"""What every benchmark needs: seconds that can be compared, memory, and the machine in words."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

Action = Callable[[], object]

_T = TypeVar("_T")

PACKAGES = ("torch", "transformers", "triton", "numpy")


def common_arguments(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Options of every script."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch on the host; default: its own")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that the script runs")
    parser.add_argument("--out", type=Path, help="a JSON file of everything")


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where models are made, and in what."""
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu"), getattr(torch, name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Action, device: torch.device) -> float:
    """Wall time of an action, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(actions: Mapping[str, Action], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each action, one of each in every repeat, in an order that turns round; each is warmed up once."""
    for action in actions.values():
        seconds_of(action, device)
    gc.collect()
    gc.freeze()  # Python does not look through all that was made so far again, in whichever action it happens to
    try:
        found: dict[str, list[float]] = {name: [] for name in actions}
        for repeat in range(repeats):
            for name in turned(actions, repeat):
                found[name].append(seconds_of(actions[name], device))
    finally:
        gc.unfreeze()  # or models would stay in memory, which hold themselves in circles
    return found


def turned(names: Iterable[_T], repeat: int) -> list[_T]:
    """Their order, which turns round with each repeat, so that none always comes after the same."""
    return list(names)[:: 1 if repeat % 2 == 0 else -1]


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: median(values) for name, values in seconds.items()}


def quotients(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Of each repeat: a machine that is slower in some of them is so for both."""
    return [one / other for one, other in zip(over, under, strict=True)]


def peak_bytes(action: Action, device: torch.device) -> int | None:
    """Most bytes that tensors take on the device while an action runs, those that were there before included."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    action()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def added_bytes(action: Action, device: torch.device) -> int | None:
    """Most bytes that an action takes on the device besides those that were there before; None on a CPU."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    peak = peak_bytes(action, device)
    return None if peak is None else peak - before


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES},
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(results: Mapping[str, Any], out: Path | None) -> None:
    """Everything so far, as JSON; a run that is cut short leaves what it has found."""
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


def table(columns: list[str], rows: list[list[object]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """In three digits."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
