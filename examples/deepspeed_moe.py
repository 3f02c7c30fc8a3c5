"""A language model with DeepSpeed's own MoE layers, whose experts are spread over processes, learns to add.

Runs on two cores of a CPU in half a minute, and unchanged on GPUs (one process for each: 1, 2, 4 or 8):

    torchrun --standalone --nproc-per-node 2 examples/deepspeed_moe.py

Each of the two processes trains half of the experts on its own batches, with ZeRO-1. Each makes the same `MUIMonitor`
and tells it each step; the main one shows what was found and writes ``mui-example/mui.jsonl``, a line for each probe.
"""

from __future__ import annotations

import argparse
import random

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from mui_callback import MemorySink, MUIMonitor, ProbeSet

N_EXPERTS, TOP_K, WIDTH, EXPERT_WIDTH, N_LAYERS = 8, 2, 96, 64, 2
PROMPT, LENGTH = 6, 9  # of "27+94=121"


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, EXPERT_WIDTH), nn.GELU(), nn.Linear(EXPERT_WIDTH, WIDTH))


class Layer(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        # With `use_residual`, one more expert takes part in every token.
        self.moe = MoE(WIDTH, Expert(), N_EXPERTS, ep_size, k=TOP_K, capacity_factor=1.0, use_residual=True)
        for part in self.moe.deepspeed_moe.experts.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()  # DeepSpeed makes copies of one expert

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.moe(self.norms[1](x))[0]


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer(ep_size) for _ in range(N_LAYERS))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        # Samples are padded on the right, where a causal model does not look.
        x = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def balance_loss(self) -> Tensor:
        """How unevenly the routers spread the tokens of the last forward."""
        return sum((layer.moe.deepspeed_moe.l_aux for layer in self.layers), torch.zeros(()))


def main(output_dir: str = "mui-example", steps: int = 400, every: int = 50) -> None:
    """Train, and show what each probe found."""
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:  # otherwise DeepSpeed first compiles an operator for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    rank, size = distributed.get_rank(), distributed.get_world_size()

    problems = [{"prompt": f"{a:02}+{b:02}=", "response": f"{a + b:03}"} for a in range(100) for b in range(100)]
    random.Random(0).shuffle(problems)
    held_out = ProbeSet.from_dataset(problems[:500], task="addition")
    data = torch.tensor([list("".join(problem.values()).encode()) for problem in problems[500:]])

    torch.manual_seed(rank)  # of experts and batches; everything else is made equal by DeepSpeed
    model = Model(ep_size=size)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": [*model.parameters()], "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": 64,
        "bf16": {"enabled": not on_cpu},
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=2e-3), config=config)

    memory = MemorySink()
    with MUIMonitor(
        engine,
        held_out,
        tokenizer=lambda text: list(text.encode()),
        output_dir=output_dir,
        sinks=[memory],
        every=every,
        rules="top_fraction=0.02",  # of the 576 neurons of a layer
    ) as monitor:
        for step in range(1, steps + 1):
            rows = data[torch.randint(len(data), (64,))].to(engine.device)
            answers = engine(rows[:, :-1])[:, PROMPT - 1 :].float()
            loss = F.cross_entropy(answers.flatten(0, 1), rows[:, PROMPT:].flatten())
            engine.backward(loss + 0.01 * model.balance_loss())
            engine.step()
            monitor.step(step)
    if rank == 0:
        print("step  loss   MUI %  key experts %  dropped tokens %  sent KiB")
    for point in memory.points:  # in the main process only
        if point.error is not None:
            print(f"{point.step:4} {point.error}")
            continue
        seen = {name.removeprefix("mui/"): value for name, value in point.scalars.items()}
        key, dropped, sent = seen["key_expert_proportion"], seen["dropped_tokens"], seen["comm_bytes"]
        print(
            f"{point.step:4} {seen['loss']:5.2f} {100 * seen['mui']:7.1f} {100 * key:14.0f} {100 * dropped:17.1f}"
            f" {sent / 1024:9.1f}"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="mui-example")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50, help="steps between probes")
    main(**vars(parser.parse_args()))
