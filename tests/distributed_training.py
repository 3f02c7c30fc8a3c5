"""What each process of a distributed run does in the tests, and how they are started: over gloo, with a deadline."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from mui_callback import MemorySink, MUICallback, MUIMonitor, MUIProbe, MUIReport, ProbeSet
from mui_callback.errors import MUIError
from mui_callback.metrics.catalogue import OVERHEAD, key
from mui_callback.monitoring import run_monitor
from mui_callback.parallel.processes import Processes
from mui_callback.probe.samples import TokenSample
from mui_callback.sinks.base import ProbePoint
from mui_callback.trainers.base import Training
from tiny import VOCAB, build, qwen2_moe
from tiny_samples import make_samples
from training import STEPS, Trained, rows

DEADLINE = 120.0
"""Seconds after which a launch is over, whatever its processes do."""
TOO_MUCH = 2**50
"""Bytes that no machine has."""

Sabotage = Callable[[int, int], None]
"""Called in each forward pass of a probe with the step and the number of tokens; may raise."""


@dataclass
class Seen:
    """What one process saw of its training."""

    error: str | None = None
    """The exception that ended it."""
    points: list[ProbePoint] = field(default_factory=list)
    """What its own sink got."""
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step, what it measured itself, written or not; durations left out."""
    passes: list[tuple[int, int]] = field(default_factory=list)
    """The step and the number of tokens of each forward pass of a probe."""
    warnings: list[str] = field(default_factory=list)
    trained: Trained | None = None
    """What is left when training ends well."""


# Starting them


def launch(directory: Path, work: Callable[..., Any], *, size: int = 2, **options: Any) -> list[Any]:
    """What ``work(rank, directory, **options)`` gives in each of so many processes.

    They are forked from a process that has imported what takes long and done nothing else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    processes = [
        context.Process(target=_process, args=(rank, size, directory, work, options), daemon=True)
        for rank in range(size)
    ]
    end = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    assert not hanging, f"processes {hanging} were not done after {DEADLINE:g} s"
    assert [process.exitcode for process in processes] == [0] * size, "a process died; standard error says of what"
    return [torch.load(result(directory, rank), weights_only=False) for rank in range(size)]


def result(directory: Path, rank: int) -> Path:
    """Where a process leaves what its work gave."""
    return directory / f"result-{rank}.pt"


def output_dir(directory: Path, rank: int) -> Path:
    """Each process has its own, so that it shows which of them write."""
    return directory / f"output-{rank}"


def record(directory: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir(directory, rank) / "mui.jsonl").read_text().splitlines()]


def _process(rank: int, size: int, directory: Path, work: Callable[..., Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    on_gpus = options.get("device") == "cuda"
    if on_gpus:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(rank)
    if size > 1:
        store = f"file://{directory / 'store'}"
        distributed.init_process_group("nccl" if on_gpus else "gloo", init_method=store, rank=rank, world_size=size)
        distributed.barrier()  # whoever has nothing to do must not be gone before the other one has met it
    torch.save(work(rank, directory, **options), result(directory, rank))


# What they probe


def moe_model() -> nn.Module:
    return build(qwen2_moe(attention_dropout=0.2))


def dense_model() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))


def probe_set() -> ProbeSet:
    return ProbeSet({"a": make_samples(7), "b": make_samples(8)})


def unfit_probe_set() -> ProbeSet:
    """One with token ids that the model does not have."""
    sample = make_samples(7)[0]
    return ProbeSet({"a": [TokenSample("0", sample.input_ids + VOCAB, sample.scored)]})


# What they do


def train(
    rank: int,
    directory: Path,
    *,
    is_monitored: bool = True,
    start_step: int = 0,
    n_steps: int = STEPS,
    sabotage: Mapping[int, Sabotage] = {},
    leaves_out: Mapping[int, int] = {},
    crashes_at: Mapping[int, int] = {},
    wait: float | None = None,
    device: str = "cpu",
    **options: Any,
) -> Seen:
    """Train as in a loop of a user's, with DDP.

    Args:
        rank: this process.
        directory: of the launch.
        is_monitored: whether there is a monitor.
        start_step: where the monitor begins; the model is a new one in any case.
        n_steps: optimizer steps, `start_step` among them.
        sabotage: by rank, what its probes suffer.
        leaves_out: by rank, a step that the monitor is not told of.
        crashes_at: by rank, a step in which the loop itself fails.
        wait: seconds that processes wait for each other.
        device: ``"cuda"`` for a GPU each.
        options: of the monitor.
    """
    _wait_for(wait)
    seen = Seen()
    model = DistributedDataParallel(moe_model().to(device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = torch.stack([row["input_ids"] for row in rows(4 * STEPS, seed=rank)]).split(4)
    losses: list[float] = []
    step = start_step

    def watch_pass(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not module.training:  # in a probe, that is
            seen.passes.append((step, len(args[0])))
            if rank in sabotage:
                sabotage[rank](*seen.passes[-1])

    model.module.model.layers[1].mlp.experts.register_forward_pre_hook(watch_pass)
    torch.manual_seed(rank)
    with noted(seen):
        monitor = _monitored(rank, directory, model, seen, start_step, options) if is_monitored else _unmonitored()
        with monitor as tell:
            for step in range(start_step + 1, n_steps + 1):
                if crashes_at.get(rank) == step:
                    raise ArithmeticError("a bug in the loop")
                batch = batches[step % len(batches)].to(device)
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if leaves_out.get(rank) != step:
                    tell(step)
    if seen.error is None:
        state = optimizer.state_dict()["state"].values()
        seen.trained = Trained(
            weights={name: parameter.detach().cpu() for name, parameter in model.module.named_parameters()},
            optimizer=[value.cpu() for entry in state for value in entry.values()],
            losses=losses,
            random=torch.get_rng_state(),
        )
    return seen


def make_monitor(
    rank: int,
    directory: Path,
    *,
    ranks: tuple[int, ...] = (0, 1),
    models: Mapping[int, Callable[[], nn.Module]] = {},
    probe_sets: Mapping[int, Callable[[], ProbeSet]] = {},
    wait: float | None = None,
    **options: Any,
) -> Seen:
    """Make a monitor in some of the processes, by rank of what model and with what probe set, and do no more."""
    _wait_for(wait)
    seen = Seen()
    with noted(seen):
        if rank in ranks:
            model, probed = models.get(rank, moe_model)(), probe_sets.get(rank, probe_set)()
            MUIMonitor(model, probed, output_dir=output_dir(directory, rank), **options)
    return seen


def read_eval_data(rank: int, directory: Path, *, fails_in: int | None = None) -> str:
    """The samples of a callback in a trainer whose eval data are other ones in each process, or what it raises."""

    def read(max_samples: int) -> ProbeSet:
        if rank == fails_in:
            raise OSError("the data are gone")
        return ProbeSet({"eval": make_samples(rank)})

    training = Training(moe_model(), 0, directory, [], tokenizer=None, eval_data=read, state=None)
    try:
        return MUICallback()._make_probe(training).probe_set.fingerprint
    except (OSError, MUIError) as error:
        return f"{type(error).__name__}: {error}"


def agree_alone(rank: int, directory: Path, *, ranks: tuple[int, ...], seconds: float) -> list[str]:
    """What those of these ranks are told who wait for others that do not come."""
    if rank not in ranks:
        return []
    processes = Processes(timedelta(seconds=seconds))
    seen = Seen()
    with noted(seen):
        processes.gather_failures(None)
    told = [str(seen.error)]
    if not processes.is_main:
        with noted(seen):
            processes.from_main(lambda: None)
        told.append(str(seen.error))
    return told


def probe(rank: int, directory: Path, *, trained: Path) -> list[MUIReport]:
    """Reports of the untrained model, and of the one that a process has trained."""
    model = moe_model()
    reports = [MUIProbe(model, probe_set()).measure()]
    weights = torch.load(trained, weights_only=False).trained.weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return [*reports, MUIProbe(model, probe_set()).measure()]


def _wait_for(seconds: float | None) -> None:
    """How long monitors that are made from now on wait for the other processes."""
    if seconds is not None:
        run_monitor.Processes = partial(Processes, timedelta(seconds=seconds))


class Noted(Protocol):
    """What a process says of its end."""

    error: str | None
    warnings: list[str]


@contextmanager
def noted(seen: Noted) -> Iterator[None]:
    """The exception that ends this goes no further, and is noted with what was said about probes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            seen.error = f"{type(error).__name__}: {error}"
    messages = [str(warning.message) for warning in caught]
    seen.warnings += [message for message in messages if "MUI" in message or "Sink" in message]


@contextmanager
def _monitored(
    rank: int, directory: Path, model: nn.Module, seen: Seen, start_step: int, options: dict[str, Any]
) -> Iterator[Callable[[int], None]]:
    sink = MemorySink()
    seen.points = sink.points
    defaults = {"every": 2, "sinks": [sink], "start_step": start_step, "output_dir": output_dir(directory, rank)}
    monitor = MUIMonitor(model, probe_set(), **{**defaults, **options})
    try:
        with monitor:
            yield monitor.step
    finally:
        seen.measured = {
            step: {name: value for name, value in scalars.items() if name not in (OVERHEAD, key("seconds"))}
            for step, scalars in monitor.state_dict()["history"]["points"]
        }


@contextmanager
def _unmonitored() -> Iterator[Callable[[int], None]]:
    yield lambda step: None


# What probes suffer


def fail_at(*steps: int) -> Sabotage:
    """Raises in the probes at these steps."""
    return partial(_fail_at, steps)


def run_out_of_memory_above(n_tokens: int) -> Sabotage:
    """Asks for more memory than there is where a batch is larger."""
    return partial(_run_out_of_memory_above, n_tokens)


class HastyClock:
    """Lets the clock of its process go ahead by a second in every probe."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self, step: int, n_tokens: int) -> None:
        if not self.ahead:
            right = time.perf_counter
            time.perf_counter = lambda: right() + self.ahead
        self.ahead += 1.0


def _fail_at(steps: tuple[int, ...], step: int, n_tokens: int) -> None:
    if step in steps:
        raise RuntimeError("injected")


def _run_out_of_memory_above(most: int, step: int, n_tokens: int) -> None:
    if n_tokens > most:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
