"""A training run that logs to an offline W&B run; in a process of its own, since W&B keeps its settings."""

import sys
from pathlib import Path

from mui_callback import MUICallback, ProbeSet
from tiny_samples import make_samples
from training import make_trainer

output_dir, reporter = Path(sys.argv[1]), sys.argv[2]
if reporter == "mine":  # a run that the user started, and no reporter of the Trainer's
    import wandb

    wandb.init(project="mine", dir=output_dir)
callbacks = [] if reporter == "plain" else [MUICallback(ProbeSet({"a": make_samples(7)}), every=3)]
report_to = "none" if reporter == "mine" else ["wandb"]
make_trainer(output_dir, callbacks, report_to=report_to, logging_steps=2).train()
