"""`mui-callback demo`: a small MoE learns English, code and arithmetic in about three minutes on a CPU."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator
from transformers.utils import logging as transformers_logging

from mui_callback.callback import MUICallback
from mui_callback.demo.checkpoints import Checkpoints
from mui_callback.demo.console import LEGEND, Screen
from mui_callback.demo.corpus import Corpus, load_corpus
from mui_callback.demo.model import build_model, build_tokenizer
from mui_callback.demo.packing import Row, pack
from mui_callback.demo.picture import save_picture
from mui_callback.demo.tracking import command_line, wandb_run
from mui_callback.monitoring.run_monitor import RECORD_NAME
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.writers import sample_row, write_rows
from mui_callback.sinks.memory import MemorySink

DEFAULT_OUTPUT = Path("mui-demo")
DEFAULT_STEPS = 720
PICTURE_NAME = "mui.png"
MODEL_NAME = "model"
CHECKPOINTS_NAME = "checkpoints"
HELD_OUT_NAME = "held-out"

_PROBES = 12
_CHECKPOINTS = 6
"""And the random model."""
_TOP_FRACTION = 0.01
"""Ten times the usual share: 0.1 % of the 1152 neurons of a layer would be one."""
_SHARES = {"english": 0.3, "code": 0.3, "arithmetic": 0.4}
_TRAJECTORY = "configs/tiny.yaml"
"""A study of the checkpoints in `DEFAULT_OUTPUT`; in the source tree only."""
_ROWS_A_STEP = 8
_ROW_LENGTH = 256


def run_demo(
    output_dir: Path = DEFAULT_OUTPUT, *, steps: int = DEFAULT_STEPS, every: int | None = None, seed: int = 0
) -> Path:
    """Train the model with `MUICallback` watching, show it in the terminal, and draw it.

    Args:
        output_dir: Where the picture, the record, the W&B run, the model, its checkpoints and the held-out samples go;
            made if it is not there.
        steps: Optimizer steps.
        every: Optimizer steps between probes; by default a twelfth of all.
        seed: Of the weights and the data.

    Returns:
        The picture's path.

    Raises:
        MUIError: This Python comes without its documentation or its sources.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # With steps this small, threads wait for each other: one other busy process makes two of them ten times slower.
    torch.set_num_threads(1)
    console = Console(highlight=False)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    title = f"A Qwen2-MoE of {model.num_parameters() / 1e6:.1f} M parameters learns English, code and arithmetic"
    console.print(f"{title}\nfrom this Python's documentation, its library and generated sums.\n")
    console.print(LEGEND, style="dim")
    corpus = load_corpus(seed)
    rows = pack(corpus.training, _SHARES, tokenizer, n_rows=steps * _ROWS_A_STEP, row_length=_ROW_LENGTH, seed=seed)
    memory = MemorySink()
    with wandb_run(output_dir) as run, Screen(console) as screen:
        watch = MUICallback(
            ProbeSet(corpus.held_out),
            every=every or ceil(steps / _PROBES),
            sinks=[memory, screen],
            rules=f"top_fraction={_TOP_FRACTION}",
        )
        checkpoints = Checkpoints(output_dir / CHECKPOINTS_NAME, tokenizer, every=ceil(steps / _CHECKPOINTS))
        callbacks = [screen, watch, checkpoints]
        _train(model, tokenizer, rows, output_dir, steps=steps, seed=seed, callbacks=callbacks, track=bool(run))
    picture = save_picture(memory.points, output_dir / PICTURE_NAME, title)
    _save(model, tokenizer, corpus, output_dir)
    _say_what_next(console, picture, run)
    return picture


def _save(model: Any, tokenizer: Any, corpus: Corpus, output_dir: Path) -> None:
    """Keep what the studies of the command line take."""
    for part in (model, tokenizer):
        part.save_pretrained(output_dir / MODEL_NAME)
    (output_dir / HELD_OUT_NAME).mkdir(exist_ok=True)
    for task, samples in corpus.held_out.items():
        write_rows(output_dir / HELD_OUT_NAME / f"{task}.jsonl", map(sample_row, samples), replace=True)


def _train(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    output_dir: Path,
    *,
    steps: int,
    seed: int,
    callbacks: list[Any],
    track: bool,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=_ROWS_A_STEP,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 4),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=10,
        save_strategy="no",
        report_to=["wandb"] if track else "none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
    )
    trainer = Trainer(
        model,
        arguments,
        # The tokenizer's own collator adds an attention mask, with which samples of a row attend to each other.
        data_collator=default_data_collator,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _say_what_next(console: Console, picture: Path, run: Any) -> None:
    lines = [f"picture           {picture}", f"record            {picture.with_name(RECORD_NAME)}"]
    if run is None:
        lines += ["W&B               is not installed, so it has nothing of this run: pip install wandb"]
    elif run.offline:
        folder, wandb = Path(run.dir).parent, command_line("wandb")
        lines += [f"W&B, in terminal  {wandb} leet {folder}", f"W&B, to upload    {wandb} sync {folder}"]
    elif run.url:
        lines += [f"W&B               {run.url}"]
    model, samples = (picture.with_name(name) for name in (MODEL_NAME, HELD_OUT_NAME))
    study = f"{model} --rules top_fraction={_TOP_FRACTION}"
    command = command_line("mui-callback")
    lines += [
        f"all at a glance   {command} watch {picture.parent} --once",
        f"key, or not       {command} ablate {study} --probe {samples}/*.jsonl",
        f"coverage          {command} diversity {study} --data {samples}/*.jsonl",
    ]
    if picture.parent == DEFAULT_OUTPUT and Path(_TRAJECTORY).is_file():
        lines += [f"trajectory        {command} trajectory {_TRAJECTORY}"]
    console.print("", *lines, sep="\n", soft_wrap=True, markup=False)
