"""The example and the configurations for DeepSpeed run as they are, in two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from backends import deepspeed_on_cpu
from distributed_training import DEADLINE, launch, output_dir, probe_set
from mui_callback import MemorySink, MUICallback, MUIMonitor
from mui_callback.sinks.base import ProbePoint
from test_examples import EXAMPLES, read
from tiny import VOCAB, build
from training import rows

CONFIGS = EXAMPLES.parent / "configs"
STEPS, EVERY = 5, 2
PROBED = [0, 2, 4, 5]


def assert_recorded(directory: Path, *, n_routed: int) -> None:
    """One run, whose probes saw the experts of all processes."""
    run, points = read(directory)
    assert {layer["n_routed"] for layer in run["layers"]} == {n_routed}
    assert [point["step"] for point in points] == PROBED
    for point in points:
        assert "error" not in point
        assert point["scalars"]["mui/comm_bytes"] > 0


def torchrun(script: Path, *options: object) -> list[str]:
    """The lines that a script prints in two processes, started as a user does it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [str(word) for word in (*launcher, script, *options)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.terminate()  # if it is not over; it ends those that it has started
    assert process.returncode == 0
    return printed.splitlines()


def test_the_example(tmp_path: Path) -> None:
    printed = torchrun(EXAMPLES / "deepspeed_moe.py", "--output-dir", tmp_path, "--steps", STEPS, "--every", EVERY)
    assert [int(row.split()[0]) for row in printed[-len(PROBED) :]] == PROBED
    assert sum("dropped tokens" in line for line in printed) == 1
    assert_recorded(tmp_path, n_routed=8)


def train_with_zero3(rank: int, directory: Path, *, checkpoint: Path) -> list[ProbePoint]:
    # On the CPU transformers leaves this to others, and ZeRO would take each process for one that is alone.
    deepspeed_on_cpu().init_distributed("gloo")
    args = TrainingArguments(
        deepspeed=str(CONFIGS / "zero3.json"),
        use_cpu=True,
        output_dir=str(output_dir(directory, rank)),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    sink = MemorySink()
    callbacks = [MUICallback(probe_set(), every=EVERY, sinks=[sink])]
    Trainer(model, args, train_dataset=rows(4 * STEPS), callbacks=callbacks).train()
    assert any(parameter.numel() < parameter.ds_numel for parameter in model.parameters())
    return sink.points


def train_with_autoep(rank: int, directory: Path) -> list[ProbePoint]:
    model = build("deepseek_v3")
    engine, *_ = deepspeed_on_cpu().initialize(
        model=model, model_parameters=model.parameters(), config=str(CONFIGS / "autoep.json")
    )
    torch.manual_seed(rank)
    sink = MemorySink()
    with MUIMonitor(engine, probe_set(), output_dir=output_dir(directory, rank), every=EVERY, sinks=[sink]) as monitor:
        for step in range(1, STEPS + 1):
            input_ids = torch.randint(VOCAB, (1, 16))
            logits = engine(input_ids).logits
            engine.backward(F.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:]))
            engine.step()
            monitor.step(step)
    return sink.points


def assert_main_writes(directory: Path, points: Sequence[list[ProbePoint]]) -> None:
    assert [point.step for point in points[0]] == PROBED
    assert points[1] == []
    assert not (output_dir(directory, 1) / "mui.jsonl").exists()


def test_zero3_in_the_trainer(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    build("qwen2_moe").save_pretrained(checkpoint)
    points = launch(tmp_path, train_with_zero3, checkpoint=checkpoint)
    assert_main_writes(tmp_path, points)
    assert_recorded(output_dir(tmp_path, 0), n_routed=6)


def test_autoep_in_a_loop(tmp_path: Path) -> None:
    points = launch(tmp_path, train_with_autoep)
    assert_main_writes(tmp_path, points)
    assert_recorded(output_dir(tmp_path, 0), n_routed=8)
