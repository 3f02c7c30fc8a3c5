"""One line in a Hugging Face Trainer: a tiny MoE with shared experts learns to add, and is watched while it does.

Runs on a laptop CPU in well under a minute:

    python examples/hf_trainer.py

Afterwards ``mui-example/mui.jsonl`` holds a line for each probe. With ``report_to=["wandb"]`` the same values are in
W&B, on the x axis of the loss.
"""

import random

from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mui_callback import MUICallback


def main(output_dir: str = "mui-example", steps: int = 300) -> None:
    """Train, and print what the last probe found."""
    set_seed(0)
    tokenizer = ByT5Tokenizer()  # bytes: needs no download
    rng = random.Random(0)
    problems = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(problems)
    rows = [{"input_ids": tokenizer(f"{a}+{b}={a + b}").input_ids} for a, b in problems]

    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=len(tokenizer),
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
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            use_cpu=True,
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows[1000:],
        eval_dataset={"addition": rows[:1000]},
        processing_class=tokenizer,
        callbacks=[MUICallback(every=100)],
    )
    trainer.train()
    print(f"MUI and more at every 100 steps: {output_dir}/mui.jsonl")


if __name__ == "__main__":
    main()
