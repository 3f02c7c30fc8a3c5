"""A hand-written MoE language model in plain torch, and a training loop that is watched by `MUIMonitor`.

Runs on a laptop CPU in less than a minute:

    python examples/plain_loop.py

Afterwards ``mui-example/mui.jsonl`` holds a line for each probe; an active W&B run would have the same values.

The routed experts, a list of equal MLPs beside a router, are found by their structure. The branch that every token
passes through is a chain of three linear maps, which structure does not tell from other things a block may hold, so an
adapter names the down projections. Without the adapter the probe refuses: the contributions it finds would not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mui_callback import MemorySink, MoEBlock, MUIMonitor, ProbeSet, register_adapter

N_EXPERTS, TOP_K, WIDTH, N_LAYERS, CONTEXT = 8, 2, 96, 2, 128


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.into(x)))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, N_EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(N_EXPERTS))
        self.common = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(TOP_K)
        out = self.common(rows)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, weights[token, slot, None] * expert(rows.index_select(0, token)))
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.moe = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.moe(self.norms[1](x))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(N_LAYERS))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        # Samples are padded on the right, where a causal model does not look.
        x = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@register_adapter
def mixture(module: nn.Module) -> MoEBlock | None:
    if not isinstance(module, Mixture):
        return None
    return MoEBlock(routed=[expert.out for expert in module.experts], shared=[module.common[-1]])


def main(output_dir: str = "mui-example", steps: int = 400, every: int = 80) -> None:
    """Train, and show what each probe found."""
    torch.manual_seed(0)
    model = Model()
    probe_set, memory = ProbeSet.builtin(), MemorySink()
    # For a quick look it learns the very text that it is probed with; hold yours out.
    text = "\n".join(sample.prompt + sample.response for samples in probe_set.tasks.values() for sample in samples)
    data = torch.tensor(list(text.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with MUIMonitor(
        model,
        probe_set,
        tokenizer=lambda text: list(text.encode()),
        output_dir=output_dir,
        sinks=[memory],
        every=every,
        rules="top_fraction=0.01",  # of the 576 neurons of a layer
    ) as monitor:
        for step in range(1, steps + 1):
            start = torch.randint(0, len(data) - CONTEXT, (16, 1))
            rows = data[start + torch.arange(CONTEXT)]
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    print("step  loss   MUI %  shared %  effective experts")
    for point in memory.points:
        if point.error is not None:
            print(f"{point.step:4} {point.error}")
            continue
        seen = point.scalars
        shared, experts = 100 * seen["mui/shared_share"], seen["mui/effective_experts"]
        print(f"{point.step:4} {seen['mui/loss']:5.2f} {100 * seen['mui/mui']:7.1f} {shared:9.1f} {experts:18.1f}")


if __name__ == "__main__":
    main()
