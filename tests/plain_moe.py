"""A zoo of small MoE language models in plain torch that keep their experts as a list of modules.

One for each way in which remote code and people's own models send tokens to such experts; and some that look alike
but cannot be measured, or have a list of MLPs that are no experts. Shapes: B sequences, T tokens (flattened, or of a
sequence), E experts, K experts of a token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import drawn

D, E, K = 24, 6, 2
CAPACITY = 2  # moduledict: tokens of a sequence that an expert takes at most
CHOICES = 4  # expert_choice: tokens of a sequence that an expert takes
SCALING = 2.5  # deepseek_v2


def wide(x: Tensor) -> Tensor:
    """As ``.float()`` in half precision; double precision stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def top_k(logits: Tensor, *, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    weight, idx = wide(logits).softmax(-1).topk(K, dim=-1)
    return idx, (weight / weight.sum(-1, keepdim=True) if renormalise else weight).to(logits.dtype)


def several(expert: Callable[[int, int], nn.Module], d: int, width: int, n: int = E) -> nn.ModuleList:
    return nn.ModuleList(expert(d, width) for _ in range(n))


class RMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide(x) * scale).to(x.dtype)


# Experts: (d, width) → a module from [..., d] to [..., d].


class GatedMLP(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NormedMLP(GatedMLP):
    def __init__(self, d: int, width: int) -> None:
        super().__init__(d, width)
        self.norm = RMSNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class MixtralMLP(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d, width, bias=False)
        self.w2 = nn.Linear(width, d, bias=False)
        self.w3 = nn.Linear(d, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ReluMLP(nn.Module):
    """No gate; many of its activations are zero."""

    def __init__(self, d: int, width: int, up: str = "fc_in", down: str = "fc_out") -> None:
        super().__init__()
        self.names = up, down
        self.add_module(up, nn.Linear(d, width, bias=False))
        self.add_module(down, nn.Linear(width, d, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (getattr(self, name) for name in self.names)
        return down(F.relu(up(x)).square())


class Conv1D(nn.Module):
    """As GPT-2's: a linear layer whose weight is ``[in, out]``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * n_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Conv1DMLP(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(d, width), Conv1D(width, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def sequential_mlp(d: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, d), nn.Dropout(0.1))


# Ways to dispatch: (experts, tokens [T, D], expert ids [T, K], weights [T, K]) → [T, D].


def by_mask(experts: Iterable[nn.Module], x: Tensor, idx: Tensor, weight: Tensor, *, all_run: bool = False) -> Tensor:
    """As Mixtral and its many descendants; with `all_run` an expert that nobody chose runs on no tokens."""
    out = torch.zeros_like(x)
    mask_EKT = F.one_hot(idx, E).permute(2, 1, 0)
    for expert, mask_KT in zip(experts, mask_EKT, strict=True):
        slot, token = torch.where(mask_KT)
        if all_run or token.numel() > 0:
            current = x[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, (expert(current) * weight[token, slot, None]).to(x.dtype))
    return out


def by_repeat(experts: Iterable[nn.Module], x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    copies, flat = x.repeat_interleave(K, dim=0), idx.view(-1)
    y = torch.empty_like(copies)
    for e, expert in enumerate(experts):
        y[flat == e] = expert(copies[flat == e])
    return (y.view(*idx.shape, -1) * weight.unsqueeze(-1)).sum(1)


def by_slot(experts: Iterable[nn.Module], x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Every expert runs once for each slot in which a token chose it."""
    out = torch.zeros_like(x)
    for k in range(K):
        for e, expert in enumerate(experts):
            mine = idx[:, k] == e
            if mine.any():
                out[mine] += weight[mine, k, None] * expert(x[mine])
    return out


@torch.no_grad()
def by_scatter(experts: nn.ModuleList, x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """As DeepSeek V1 outside training: expert outputs are weighted in place."""
    cache, flat_weight = torch.zeros_like(x), weight.view(-1, 1)
    order = idx.view(-1).argsort()
    ends = idx.view(-1).bincount().cpu().numpy().cumsum(0)
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        if start == end:
            continue
        token = order[start:end] // K
        expert_out = experts[e](x[token])
        expert_out.mul_(flat_weight[order[start:end]])
        cache.scatter_reduce_(0, token.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
    return cache


@torch.no_grad()
def by_sorting(experts: nn.ModuleList, x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """As DeepSeek V2 outside training: expert outputs are put together, brought back into order, and weighted."""
    counts = idx.new_zeros((idx.shape[0], len(experts)))
    counts.scatter_(1, idx, 1)
    order = idx.view(-1).argsort()
    sorted_tokens, outputs, start = x[order // K], [], 0
    for e, n in enumerate(counts.sum(0).cpu().numpy()):
        if n > 0:
            outputs.append(experts[e](sorted_tokens[start : start + n]))
            start += n
    outs = torch.cat(outputs, dim=0)
    new_x = torch.empty_like(outs)
    new_x[order] = outs
    weighted = new_x.view(*idx.shape, -1).type(weight.dtype).mul_(weight.unsqueeze(-1))
    return weighted.sum(1).type(new_x.dtype)


def by_einsum(experts: Iterable[nn.Module], x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """Every expert runs on every token, and most outputs are multiplied by zero."""
    combine_TE = weight.new_zeros(x.shape[0], E).scatter(1, idx, weight)
    return torch.einsum("te,ted->td", combine_TE, torch.stack([expert(x) for expert in experts], dim=1))


def by_input(experts: Iterable[nn.Module], x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    """As Llama 4: what is weighted is what goes into an expert."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(idx == e)
        out.index_add_(0, token, expert(x[token] * weight[token, slot, None]))
    return out


def by_token(experts: nn.ModuleList, x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for e, w in zip(idx[t].tolist(), weight[t], strict=True):
            out[t] += w * experts[e](x[t : t + 1])[0]
    return out


# Blocks.


class Block(nn.Module):
    """Experts, a linear gate and a way to dispatch."""

    def __init__(self, d: int, width: int, expert: Any = GatedMLP, dispatch: Callable[..., Tensor] = by_mask) -> None:
        super().__init__()
        self.gate = nn.Linear(d, E, bias=False)
        self.experts = several(expert, d, width)
        self.dispatch = dispatch

    def forward(self, x: Tensor) -> Any:
        flat = x.view(-1, x.shape[-1])
        return self.dispatch(self.experts, flat, *top_k(self.gate(flat))).view(x.shape)


class TupleBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.gate(x).view(-1, E)


class QwenBlock(Block):
    def __init__(self, d: int, width: int) -> None:
        super().__init__(d, width)
        self.shared_expert = GatedMLP(d, 2 * width)
        self.shared_expert_gate = nn.Linear(d, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        routed = self.dispatch(self.experts, flat, *top_k(self.gate(flat), renormalise=False))
        return (routed + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)).view(x.shape)


class Gate(nn.Module):
    """As in DeepSeek V2; if biased, as in V3: sigmoid scores, and a bias that has a say in the choice alone."""

    def __init__(self, d: int, scaling: float = 1.0, biased: bool = False) -> None:
        super().__init__()
        self.weight, self.scaling = nn.Parameter(torch.randn(E, d) * d**-0.5), scaling
        self.e_score_correction_bias = nn.Parameter(torch.zeros(E)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = F.linear(wide(x), wide(self.weight))
        idx, weight = top_k(logits, renormalise=False)
        if self.e_score_correction_bias is not None:
            idx = (logits.sigmoid() + self.e_score_correction_bias).topk(K, dim=-1, sorted=False)[1]
            weight = logits.sigmoid().gather(1, idx)
            weight = weight / weight.sum(-1, keepdim=True)
        return idx, (weight * self.scaling).to(x.dtype), weight.sum() if self.training else None


class DeepseekBlock(nn.Module):
    def __init__(self, d: int, width: int, n_shared: int, scaling: float, moe_infer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = several(GatedMLP, d, width)
        self.gate = Gate(d, scaling)
        self.shared_experts = GatedMLP(d, n_shared * width)
        self.moe_infer = moe_infer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        idx, weight, _aux = self.gate(flat)
        routed = (by_repeat if self.training else self.moe_infer)(self.experts, flat, idx, weight)
        return routed.view(x.shape) + self.shared_experts(x)


class SwitchExperts(nn.ModuleDict):
    def forward(self, x: Tensor, mask_BTE: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.values()):
            out[mask_BTE[..., e]] = expert(x[mask_BTE[..., e]])
        return out


class SwitchBlock(nn.Module):
    """Top 1. An expert takes the first tokens of a sequence that want it; the others get none."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(d, E, bias=False)
        self.experts = SwitchExperts({f"expert_{e}": ReluMLP(d, width, "wi", "wo") for e in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        probability, idx = wide(self.router(x)).softmax(-1).max(-1)
        wanted = F.one_hot(idx, E)
        kept = wanted * (wanted.cumsum(1) <= CAPACITY)
        return self.experts(x, kept.bool()) * probability.unsqueeze(-1).to(x.dtype)


class SequentialBlock(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(d, E) * d**-0.5)
        self.experts = several(sequential_mlp, d, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return by_repeat(self.experts, flat, *top_k(flat @ self.router)).view(x.shape)


class LatentBlock(Block):
    def __init__(self, d: int, width: int) -> None:
        super().__init__(d, width)
        self.experts = several(GatedMLP, d // 2, width)
        self.into_latent = nn.Linear(d, d // 2, bias=False)
        self.out_of_latent = nn.Linear(d // 2, d, bias=False)
        self.norm = RMSNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        latent = by_mask(self.experts, self.into_latent(flat), *top_k(self.gate(flat)))
        return self.norm(self.out_of_latent(latent)).view(x.shape)


class ListedExperts(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.mlps = several(GatedMLP, d, width)

    def forward(self, x: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
        return by_mask(self.mlps, x, idx, weight)


class RoutedPart(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.router, self.experts = Gate(d, biased=True), ListedExperts(d, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        idx, weight, _aux = self.router(flat)
        return self.experts(flat, idx, weight).view(x.shape)


class SharedListBlock(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.shared_experts, self.moe = several(GatedMLP, d, width, 2), RoutedPart(d, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x) + sum(expert(x) for expert in self.shared_experts)


class ExpertChoiceBlock(Block):
    """Each expert takes its best tokens of each sequence, ``[B, CHOICES, D]``; a token may get any number of them."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        logits_BTE, out = wide(self.gate(x)), torch.zeros_like(x)
        if mask is not None:
            logits_BTE = logits_BTE.masked_fill(mask.unsqueeze(-1) == 0, float("-inf"))
        weight_BEC, token_BEC = logits_BTE.softmax(1).transpose(1, 2).topk(min(CHOICES, x.shape[1]), dim=-1)
        for e, expert in enumerate(self.experts):
            where = token_BEC[:, e, :, None].expand(-1, -1, x.shape[-1])
            out.scatter_add_(1, where, expert(x.gather(1, where)) * weight_BEC[:, e, :, None].to(x.dtype))
        return out


# Not to be measured.


class SoftBlock(nn.Module):
    """Every expert works on mixtures of all tokens of a sequence."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, E * K, bias=False)
        self.experts = several(GatedMLP, d, width)

    def forward(self, x: Tensor) -> Tensor:
        logits_BTS = self.gate(x)
        mixtures = (logits_BTS.softmax(1).transpose(1, 2) @ x).split(K, dim=1)
        out_BSD = torch.cat([expert(mixed) for expert, mixed in zip(self.experts, mixtures, strict=True)], dim=1)
        return logits_BTS.softmax(-1) @ out_BSD


class NonlinearTailBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * super().forward(x))


class HiddenMLPBlock(Block):
    """Beside the experts runs an MLP of another form."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__(d, width)
        self.side = nn.Sequential(nn.Linear(d, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, d))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.side(x)


class Chain(nn.Module):
    """Equal MLPs in a list that run one after the other: no MoE."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.mlps = several(GatedMLP, d, width)

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(x)
        return x


# Language models.


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Layer(nn.Module):
    def __init__(self, block: nn.Module, name: str, d: int) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.norm = RMSNorm(d), Attention(d), RMSNorm(d)
        self.takes_mask, self.block_name = isinstance(block, ExpertChoiceBlock), name
        self.add_module(name, block)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        block, h = getattr(self, self.block_name), self.norm(x)
        out = block(h, mask) if self.takes_mask else block(h)
        return x + (out[0] if isinstance(out, tuple) else out)


class PlainLM(nn.Module):
    """A decoder whose layer n has the block ``block_factory(n)``; its forward returns a bare tensor."""

    def __init__(
        self,
        block_factory: Callable[[int], nn.Module],
        n_layers: int = 3,
        d: int = D,
        vocab: int = 384,
        block_name: str = "mlp",
    ) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(vocab, d), nn.Embedding(512, d)
        self.layers = nn.ModuleList(Layer(block_factory(n), block_name, d) for n in range(n_layers))
        self.norm = RMSNorm(d)
        self.lm_head = nn.Linear(d, vocab, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.lm_head(self.norm(x))


class DictLM(PlainLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": super().forward(input_ids, attention_mask)}


@dataclass(frozen=True)
class Facts:
    """What a model is made as, for comparison with what is found in it."""

    width: int  # neurons of a routed expert
    block: str = "mlp"  # name of the block in its layer; what it puts out is the output of the MoE layer
    experts: str = "experts"  # path of the container of the routed experts, in the block
    shared: tuple[int, ...] = ()  # neurons of each shared expert; a fused MLP of m routed widths is m of them
    layers: tuple[int, ...] = (0, 1, 2)  # numbers of the MoE layers; the others are dense
    n_routed: int = E


BlockFactory = Callable[[int, int], nn.Module]  # model width, expert width
_LATER = (1, 2)
_MODELS: dict[str, tuple[BlockFactory, Facts]] = {
    "deepseek_v1": (
        partial(DeepseekBlock, n_shared=2, scaling=1.0, moe_infer=by_scatter),
        Facts(16, shared=(16, 16), layers=_LATER),
    ),
    "deepseek_v2": (
        partial(DeepseekBlock, n_shared=1, scaling=SCALING, moe_infer=by_sorting),
        Facts(16, shared=(16,), layers=_LATER),
    ),
    "mixtral": (
        partial(Block, expert=MixtralMLP, dispatch=partial(by_mask, all_run=True)),
        Facts(16, "block_sparse_moe"),
    ),
    "qwen2": (QwenBlock, Facts(8, shared=(8, 8))),
    "repeat": (partial(Block, dispatch=by_repeat), Facts(16, "moe")),
    "slots": (partial(Block, expert=MixtralMLP, dispatch=by_slot), Facts(16, "feed_forward")),
    "dense_all": (partial(Block, dispatch=by_einsum), Facts(8, "moe")),
    "moduledict": (SwitchBlock, Facts(16, layers=(1,))),
    "sequential": (SequentialBlock, Facts(16, "ffn")),
    "gpt2": (partial(Block, expert=Conv1DMLP, dispatch=by_slot), Facts(16)),
    "latent": (LatentBlock, Facts(16, "mixer", layers=_LATER)),
    "input_weighted": (partial(Block, dispatch=by_input), Facts(16, "feed_forward")),
    "expert_norm": (partial(Block, expert=NormedMLP), Facts(16, layers=_LATER)),
    "shared_list": (SharedListBlock, Facts(8, "ffn", "moe.experts.mlps", shared=(8, 8), layers=_LATER)),
    "expert_choice": (ExpertChoiceBlock, Facts(16, "moe")),
    "square": (partial(Block, expert=ReluMLP), Facts(D)),
    "tuple_out": (TupleBlock, Facts(16, layers=(0, 2))),
    "per_token": (partial(Block, dispatch=by_token), Facts(8, "moe")),
    "soft_moe": (SoftBlock, Facts(16, "moe")),
    "nonlinear_tail": (NonlinearTailBlock, Facts(16)),
    "hidden_mlp": (HiddenMLPBlock, Facts(16)),
    "decoy": (partial(Block, expert=GatedMLP), Facts(16, layers=(1,))),
}


def _make(name: str) -> nn.Module:
    make, facts = _MODELS[name]
    dense = partial(Chain, D, 16) if name == "decoy" else partial(GatedMLP, D, 40)
    kind = DictLM if name == "tuple_out" else PlainLM
    return kind(lambda n: make(D, facts.width) if n in facts.layers else dense(), block_name=facts.block)


FACTS: dict[str, Facts] = {name: facts for name, (_, facts) in _MODELS.items()}
_ALL: dict[str, Callable[[], nn.Module]] = {name: partial(_make, name) for name in _MODELS}
NEGATIVE = {name: _ALL[name] for name in ("soft_moe", "nonlinear_tail", "hidden_mlp", "decoy")}
"""To be refused, or caught by a check; of the decoy only the MoE layer that it has is to be found."""
ZOO = {name: make for name, make in _ALL.items() if name not in NEGATIVE}


def build_plain(name: str, seed: int = 0) -> nn.Module:
    """A random float32 model in eval mode; every parameter, biases too, is drawn, so that none is idle."""
    torch.manual_seed(seed)
    return drawn(_ALL[name](), seed)
