"""A tiny random model of every family in the installed transformers whose language model has MoE MLP layers.

The families are found by scanning transformers' own source, so that a new one is tried by itself with the generic
sizes below. What is right for each is stated by hand from its modelling file: nothing here asks our own finder.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
VOCAB, HIDDEN, DENSE, WIDTH, OWN, EXPERTS = 384, 32, 40, 12, 20, 8  # OWN: a shared expert's own width
EXPERT_CLASS = re.compile(r"^class \w+(?:Experts|MoE|Moe)\(", re.MULTILINE)
OWN_TYPE, PART_TYPE = re.compile(r'^    model_type = "(\w+)"', re.MULTILINE), re.compile(r'\bmodel_type="(\w+)"')

SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "d_model": HIDDEN, "max_position_embeddings": 128},
    **{"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8, "mlp_bias": True},
    **{"intermediate_size": DENSE},
    # experts and routers
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 1.5),
    **dict.fromkeys(("moe_routed_scaling_factor", "moe_router_scaling_factor"), 1.5),
    **{"moe_intermediate_size": WIDTH, "shared_intermediate_size": OWN, "shared_expert_intermediate_size": OWN},
    **{"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "num_nextn_predict_layers": 1},
    "swiglu_limit": 1.0,  # low enough to bite
    # the first layer dense
    **{"first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [0]},
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # attention of all kinds, hyper-connections
    **{"q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2},
    **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4, "rel_extent": 8},
    **{"linear_head_dim": 16, "linear_num_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8},
    # encoders of images and sound, never run
    **{"depth": 1, "num_heads": 2, "image_size": 32, "out_hidden_size": HIDDEN, "text_hidden_size": HIDDEN},
    **{"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": HIDDEN},
    **{"projection_intermediate_size": 16, "mlp_dim": 16, "output_channels": 8, "downsample_channels": [8, HIDDEN]},
    **{"max_img_size": 32, "vision_hidden_size": HIDDEN, "audio_hidden_size": HIDDEN},
    **{"projector_hidden_size": 16, "deepstack_visual_indexes": (0,), "downsample_hidden_size": 8},
}

LINEAR = ["linear_attention", "full_attention", "linear_attention"]
INDEXED = ["linear_attention", "indexed_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
MAMBA = ["linear_attention", "moe", "full_attention", "moe", "mlp"]
NEMOTRON = {"layers_block_type": MAMBA, "moe_latent_size": 28, "moe_shared_expert_intermediate_size": 2 * WIDTH}


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


# What differs from SIZES, as arguments of the family's config; a dict for a part changes that part.
CHANGES: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2, "mup_enabled": True},
    "bailing_hybrid": {"layer_types": LINEAR},
    "beam": {"layer_types": SLIDING},
    "cohere2_moe": {"prefix_dense_intermediate_size": DENSE, "logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "deepseek_v4": {
        **{"mlp_layer_types": ["hash_moe", "moe", "moe"], "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8},
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "doge": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4},
    "dots3_note": {
        **{"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 12, "swa_kv_lora_rank": 12},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12},
        "shared_experts_intermediate_size": 10,
    },
    "ernie4_5_moe": {"use_bias": True},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [WIDTH, 10], "use_bias": True, **_mrope(2, 2, 4)}},
    "gemma4": {
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16},
        **{"enable_moe_block": True, "attention_k_eq_v": True, "num_kv_shared_layers": 2},
        **{"final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    },
    "glm4v_moe": {"text_config": _mrope(2, 1, 1)},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_kpool": 2, "layer_types": INDEXED}},
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE,
    "granitemoehybrid": {
        **{**GRANITE, "shared_intermediate_size": 2 * WIDTH, "layer_types": LINEAR},
        **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    },
    "granitemoeshared": GRANITE,
    "inkling": {"local_layer_ids": [0, 2], "logits_mup_width_multiplier": 2.0},
    "inkling2": {
        **{"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "n_layers_per_attn_res_block": 2},
        "unpadded_vocab_size": VOCAB,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 3, "mamba_d_state": 8},
    "jetmoe": {"kv_channels": 8},
    "kimi_k25": {"vision_config": {"pos_emb_height": 2, "pos_emb_width": 2}},
    "kimi_linear": {"layer_types": LINEAR},
    "kolibri1": {"shared_expert_intermediate_size": 2 * WIDTH, "layer_types": SLIDING},
    "laguna": {"moe_router_logit_softcapping": 5.0, "layer_types": SLIDING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {
        **{"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": DENSE},
        **{"attention_chunk_size": 8, "no_rope_layer_interval": 2},
    },
    "longcat_flash": {"num_layers": 3, "head_dim": 8, "zero_expert_num": 4, "ffn_hidden_size": DENSE},
    "mellum": {"layer_types": SLIDING},
    "mimo_v2_flash": {"num_key_value_heads": 1, "head_dim": 24, "layer_types": SLIDING},
    "minimax": {
        **{"layer_types": LINEAR, "block_size": 8, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 0.75},
        **{"full_attn_alpha_factor": 1.5, "linear_attn_beta_factor": 0.75},
    },
    "minimax_m3_vl": {
        **{"dense_intermediate_size": DENSE, "shared_intermediate_size": 2 * WIDTH, "rotary_dim": 8},
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        **{"index_block_size": 4, "index_topk_blocks": 2},
    },
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 0, 2], "no_rope_layer_interval": 3}},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 28},
        "vision_config": {"pos_emb_height": 2, "pos_emb_width": 2},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8,) * 4, "depths": (1,) * 4},
    },
    "nemotron_h": NEMOTRON,
    "nemotron_h_omni": {"text_config": NEMOTRON},
    "nemotron3_5_transcribe": {"text_config": NEMOTRON, "word_timestamp_config": {"blank_token_id": 3}},
    "nllb_moe": {
        "decoder_start_token_id": 2,
        **{"decoder_layers": 4, "decoder_sparse_step": 2, "decoder_ffn_dim": WIDTH, "decoder_attention_heads": 2},
        **{"encoder_layers": 2, "encoder_sparse_step": 2, "encoder_ffn_dim": 10},
    },
    "phimoe": {"lm_head_bias": True},
    "qwen2_moe": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_5_moe": {"shared_expert_intermediate_size": 2 * WIDTH, "layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen3_omni_moe": {"vision_start_token_id": 3},
    "qwen4_exp": {
        **{"layer_types": INDEXED, "hc_count": 2, "hc_lowrank": 8},
        **{"ple_layer_ids": [1], "ple_embed_dim": 16, "heads_per_ngram": 2, "ngram_vocab_size_base": 50},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4},
        **{"indexer_compress_ratio": 2, "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8},
    },
    "step3p7": {
        "text_config": {
            **{"share_expert_dim": 2 * WIDTH, "layer_types": SLIDING},
            **{"swiglu_limits": [0.0, 1.0, 1.0], "swiglu_limits_shared": [0.0, 0.5, 0.5]},
        },
    },
    "switch_transformers": {
        "decoder_start_token_id": 0,
        **{"d_ff": WIDTH, "d_kv": 16, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_heads": 2},
        **{"num_decoder_layers": 4, "num_sparse_decoder_layers": 2},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12},
}


CANNOT_WORK = {
    "doge": "routes a token by the scores of other tokens of the batch; an expert is one neuron without a projection",
    "diffusion_gemma": "block diffusion: denoises a canvas after a prompt, no next-token logits of a text",
    "gemma4_assistant": "drafts tokens for Gemma 4 from its hidden states; the config refuses MoE layers",
    "openai_privacy_filter": "a token classifier, without a language model head",
    "vitpose": "pose estimation of images around vitpose_backbone",
    "vitpose_backbone": "a vision encoder",
}


@dataclass(frozen=True)
class Expected:
    """What a finder has to find in `build(name)`, read off the family's modelling and configuration files."""

    layers: tuple[int, ...] = (1, 2)  # the numbers, in the module paths, of the decoder layers with routed experts
    n_routed: int = EXPERTS
    width: int = WIDTH  # neurons of one routed expert: what its down projection takes in
    shared: tuple[int, ...] = ()  # widths; one fused MLP of m x width neurons is m experts
    top_k: int = 2
    note: str = ""


TWO = (WIDTH, WIDTH)
EVERY, ODD = (0, 1, 2), (1, 3)
LATENT = "no gate, relu2; biased projections to a latent width before and after the experts; layers of one mixer each"

EXPECTED: dict[str, Expected] = {
    "afmoe": Expected(shared=TWO, note="norm after the block"),
    "aria": Expected(EVERY, shared=TWO, note="transposed; biased shared MLP"),
    "axk1": Expected(shared=TWO, note="the block ends in a norm of routed + shared"),
    "axk2": Expected(shared=TWO, note="norms with a small MLP inside"),
    "bailing_hybrid": Expected(shared=TWO, note="linear attention"),
    "beam": Expected(note="routed scaling after the experts; norm and depth scale after the block; soft-capped logits"),
    "cohere2_moe": Expected(shared=TWO, note="(routed + shared) / 2; block beside the attention; scaled logits"),
    "dbrx": Expected(EVERY, note="experts stacked in two dimensions, in experts.mlp: w1, v1, w2; w2 transposed"),
    "deepseek_ocr2": Expected(shared=TWO, note="group-limited softmax; biased shared MLP"),
    "deepseek_v2": Expected(shared=TWO, note="group-limited softmax; biased shared MLP"),
    "deepseek_v3": Expected(shared=TWO, note="group-limited sigmoid with a correction bias; routed scaling"),
    "deepseek_v32": Expected(shared=TWO, note="indexed attention"),
    "deepseek_v4": Expected(EVERY, shared=(WIDTH,), note="clamped; layer 0 routed by token id; hyper-connections"),
    "dots1": Expected(shared=TWO),
    "dots3_note": Expected(shared=(OWN,), note="two fused shared experts of their own width; indexed attention"),
    "ernie4_5_moe": Expected(shared=TWO, note="biased shared MLP; tied, biased head"),
    "ernie4_5_vl_moe": Expected(shared=TWO, note="text_moe and vision_moe (width 10) beside shared_experts"),
    "exaone_moe": Expected(shared=TWO),
    "flex_olmo": Expected(EVERY, note="norm after the block"),
    "flint": Expected(shared=(OWN,)),
    "gemma4": Expected((0, 1, 2, 3), shared=(DENSE,), note="experts in the layer itself; norms after experts and MLP"),
    "glm4_moe": Expected(shared=TWO),
    "glm4_moe_lite": Expected(shared=TWO),
    "glm4v_moe": Expected(shared=TWO),
    "glm5_next": Expected(shared=TWO, note="clamped; hyper-connections; linear and indexed attention"),
    "glm_moe_dsa": Expected(shared=TWO, note="indexed attention"),
    "gpt_oss": Expected(EVERY, note="clamped, gate and up interleaved, biases, transposed; block returns a tuple"),
    "granitemoe": Expected(EVERY, note="block_sparse_moe; scaled residual, embeddings and logits"),
    "granitemoe_swa": Expected(EVERY, shared=(OWN,), note="shared_mlp in the layer, beside block_sparse_moe"),
    "granitemoehybrid": Expected(EVERY, shared=TWO, note="shared_mlp in the layer, beside block_sparse_moe; Mamba"),
    "granitemoeshared": Expected(EVERY, shared=(OWN,), note="shared_mlp in the layer, beside block_sparse_moe"),
    "hunyuan_v1_moe": Expected(EVERY, shared=(WIDTH,), note="mlp.shared_mlp"),
    "hy_v3": Expected(shared=TWO, note="biased shared MLP"),
    "hy_v4": Expected(shared=TWO, note="clamped experts, unclamped shared MLP; hyper-connections"),
    "inkling": Expected(shared=TWO, note="stacked shared experts, weighted by the router; convolution after the block"),
    "inkling2": Expected(EVERY, note="soft-capped activation; convolution after the block; attention over blocks"),
    "jamba": Expected(ODD, note="feed_forward; dense MLPs as wide as the experts; Mamba"),
    "jetmoe": Expected(EVERY, note="stacked in two modules; bias of the block; the attention has experts as well"),
    "kimi_k25": Expected(shared=TWO, note="DeepSeek V3 in a vision-language model"),
    "kimi_linear": Expected(shared=TWO, note="linear attention"),
    "kolibri1": Expected(EVERY, shared=TWO, note="norm after the block"),
    "laguna": Expected(shared=(OWN,), note="routed scaling after the experts; soft-capped router"),
    "lfm2_moe": Expected(note="feed_forward; w1, w2, w3 in the dense MLP; convolutions; expert_bias of the block"),
    "llama4": Expected(ODD, shared=(WIDTH,), note="routing weight on the input of every expert; transposed; a tuple"),
    "longcat_flash": Expected(EVERY, note="4 identity experts, gate_up_proj has rows for them; dense mlps beside mlp"),
    "mellum": Expected(),
    "mimo_v2_flash": Expected(),
    "minimax": Expected(EVERY, note="scaled residual and block; linear attention"),
    "minimax_m2": Expected(EVERY),
    "minimax_m3_vl": Expected(shared=TWO, note="clamped, up + 1; routed scaling after the experts; sparse attention"),
    "mistral4": Expected(shared=TWO),
    "mistral_large4": Expected(shared=TWO, note="key-values shared between layers; soft-capped logits"),
    "mixtral": Expected(EVERY),
    "muse_spark": Expected(note="norm after each expert; projections to a latent width before and after the experts"),
    "nemotron3_5_transcribe": Expected(ODD, shared=TWO, note=LATENT),
    "nemotron_h": Expected(ODD, shared=TWO, note=LATENT),
    "nemotron_h_omni": Expected(ODD, shared=TWO, note=LATENT),
    "nllb_moe": Expected(ODD, note="encoder-decoder; a ModuleDict of biased MLPs, no gate; only experts 0 and 1 run"),
    "olmoe": Expected(EVERY),
    "phimoe": Expected(EVERY, note="sparsemixer router; biased head"),
    "qwen2_moe": Expected(ODD, shared=(OWN,), note="gated shared expert"),
    "qwen3_5_moe": Expected(EVERY, shared=TWO, note="gated shared expert; linear attention"),
    "qwen3_moe": Expected(),
    "qwen3_next": Expected(shared=(OWN,), note="gated shared expert; linear attention"),
    "qwen3_omni_moe": Expected(note="the thinker"),
    "qwen3_vl_moe": Expected(),
    "qwen4_exp": Expected(EVERY, shared=(OWN,), note="gated shared expert; hyper-connections; n-gram embeddings"),
    "solar_open": Expected(EVERY, shared=TWO),
    "step3p7": Expected(shared=TWO, note="clamped after the activation; routed scaling after the experts"),
    "switch_transformers": Expected(ODD, top_k=1, note="encoder-decoder; a ModuleDict of MLPs, no gate"),
    "unlimited_ocr": Expected(shared=TWO, note="group-limited softmax; biased shared MLP"),
    "zaya": Expected(EVERY, top_k=1, note="a router class that skips: expert 0 with weight 0; a router's down_proj"),
}


def _source(name: str, kind: str) -> str:
    path = MODELS / name / f"{kind}_{name}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@cache
def family_names() -> list[str]:
    """The folders of transformers' models that define experts, and those that wrap the text model of such a folder."""
    folders = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
    own = {name for name in folders if EXPERT_CLASS.search(_source(name, "modeling"))}
    types = {kind for name in own for kind in OWN_TYPE.findall(_source(name, "configuration"))}
    types = {kind for kind in types if not re.search("vision|audio|encoder", kind)}
    return [name for name in folders if name in own or types & set(PART_TYPE.findall(_source(name, "configuration")))]


def model_class(name: str) -> type[PreTrainedModel]:
    """The family's causal language model, or else the first of its models that generate."""
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    models = [kind for kind in own if issubclass(kind, PreTrainedModel) and issubclass(kind, GenerationMixin)]
    if not models:
        raise LookupError(f"{name} has no model that generates text")
    return next((kind for kind in models if kind.__name__.endswith("ForCausalLM")), models[0])


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in fields(kind)} | set(kind.attribute_map)
    values = {name: value for name, value in SIZES.items() if name in names}
    same = kind.attribute_map.get("intermediate_size") == "moe_intermediate_size"
    if "intermediate_size" in names and (same or "moe_intermediate_size" not in names):
        values["intermediate_size"] = WIDTH
    parts = {}
    for part, spec in kind.sub_configs_defaults.items():
        if not spec.optional:
            of_part = CONFIG_MAPPING[spec.model_type] if spec.config_class is AutoConfig else spec.config_class
            kept = {name: value for name, value in spec.init_kwargs.items() if name not in SIZES}
            parts[part] = _shrunk(of_part, {**kept, **changes.get(part, {})})
    return kind(**{**deepcopy({**values, **changes}), **parts})  # a config may change its lists


def config_of(name: str) -> PreTrainedConfig:
    return _shrunk(model_class(name).config_class, CHANGES.get(name, {}))


def _draw(name: str, tensor: torch.Tensor) -> None:
    """In place, so that nothing is idle: matrices anew, vectors from where they start, a router's bias small."""
    if name.endswith("tid2eid"):  # the experts of each token, fixed by its id
        tensor.copy_(torch.rand(tensor.shape[0], EXPERTS).argsort(-1)[:, : tensor.shape[1]])
    elif re.search("correction_bias|expert_bias|balancing_biases", name):
        tensor.normal_(0, 0.02)
    elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
        tensor.normal_(0, 0.5 if "embed_tokens" in name else tensor.shape[-1] ** -0.5)
    elif isinstance(tensor, nn.Parameter) or name.endswith("layer_scalar"):
        tensor.add_(torch.randn_like(tensor), alpha=0.1)


def build(name: str, seed: int = 0) -> nn.Module:
    """Float32, in eval mode; equal weights for equal seeds."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(name)(config_of(name))
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _draw(key, tensor)
    return model.eval()
