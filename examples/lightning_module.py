"""One line in a Lightning Trainer: a tiny MoE with shared experts learns to add, and is watched while it does.

Runs on a laptop CPU in well under a minute:

    python examples/lightning_module.py

Every logger of the Trainer gets the values, on the x axis of the loss (here a CSV file, which
``logger=WandbLogger(project=...)`` would make a W&B run), and ``mui-example/mui.jsonl`` a line for each probe. What is
probed are the validation data.
"""

from __future__ import annotations

import random
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling, Qwen2MoeConfig, Qwen2MoeForCausalLM

from mui_callback import MUICallback


class Adder(lightning.LightningModule):
    """A language model of transformers; its attribute may have any name."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                vocab_size=vocab_size,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=64,
            )
        )

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(output_dir: str = "mui-example", steps: int = 300) -> None:
    """Train."""
    lightning.seed_everything(0, verbose=False)
    tokenizer = ByT5Tokenizer()  # bytes: needs no download
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.shuffle(problems)
    rows: list[Any] = [{"input_ids": tokenizer(f"{a}+{b}={a + b}").input_ids} for a, b in problems]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = lightning.Trainer(
        max_steps=steps,
        val_check_interval=100,
        limit_val_batches=10,
        accelerator="cpu",
        default_root_dir=output_dir,
        logger=CSVLogger(output_dir),
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[MUICallback(every=100)],
    )
    trainer.fit(
        Adder(len(tokenizer)),
        DataLoader(rows[1000:], batch_size=32, shuffle=True, collate_fn=collate),
        DataLoader(rows[:1000], batch_size=32, collate_fn=collate),
    )
    print(f"MUI and more at every 100 steps: {output_dir}/mui.jsonl, and in {trainer.logger.log_dir}/metrics.csv,")
    print("where Lightning counts steps from 0.")


if __name__ == "__main__":
    main()
