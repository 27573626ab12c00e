"""Every text architecture of mlx-lm, small and with random weights. Imports mlx; used by `benchmarks.architectures`.

A config is derived from the fields of the architecture's own `ModelArgs`: a small value for every field whose name is
known here, its default or a plain value of its type for every other. `OVERRIDES` says what that misses.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

VOCAB = 128
WINDOW = 16
"""Tokens that a sliding window sees, few, so that rotating caches rotate within a short test."""

_LAYERS = 4
_ALTERNATING = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
_LINEAR_MIX = ["linear_attention", "full_attention"] * (_LAYERS // 2)

_SMALL: dict[str, Any] = {
    # Sizes.
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "hidden_dim", "model_dim", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), _LAYERS),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("ff_intermediate_size", "shared_intermediate_size", "block_dim", "block_ff_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"), 512),
    # Attention.
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_groups", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "kv_channels", "hidden_size_per_head"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("index_n_heads", "o_groups"), 2),
    **dict.fromkeys(("index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    "loop_window_size": WINDOW,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16.0,
    "layer_types": _ALTERNATING,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    # Experts.
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("decoder_sparse_step", "first_k_dense_replace", "num_shared_expert", "num_dense_layers"), 1),
    # Recurrent layers.
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel", "conv1d_width", "conv_window"), 4),
    **dict.fromkeys(("conv_L_cache", "short_conv_kernel_size"), 3),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "group_norm_size"), 1),
    **dict.fromkeys(("full_attention_interval", "layer_group_size", "attn_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "expert_layer_period": 2,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "time_step_limit": (0.001, 100.0),
    "time_step_rank": 4,
    # Numbers that a plain 1.0 would not do for.
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

_KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 3,
}
_YARN = {"type": "default", "rope_type": "default", "rope_theta": 10000.0}
_LLAMA4_SCALED = {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
_ROPE_BY_LAYER = {"sliding_attention": _YARN, "full_attention": _YARN}

OVERRIDES: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3n": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "glm_moe_dsa": {"rope_parameters": _YARN, "n_shared_experts": 1, "n_routed_experts": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {"cla_share_factor": 2, "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0}},
    "kimi_k3": {"linear_attn_config": _KDA},
    "kimi_linear": {"linear_attn_config": _KDA},
    "laguna": {"rope_parameters": _ROPE_BY_LAYER},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"attention_chunk_size": WINDOW, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "llama4_text": {"no_rope_layers": [1, 0] * 2},
    "longcat_flash": {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mellum": {"rope_parameters": _ROPE_BY_LAYER},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0, 1, 0], "moe_layer_freq": [0, 1, 1, 1]},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 4,
            "short_factor": [1.0] * 4,
            "original_max_position_embeddings": 512,
        }
    },
    "ministral3": {"rope_parameters": _LLAMA4_SCALED},
    "mistral4": {"rope_parameters": _LLAMA4_SCALED},
    "muse_spark": {
        "num_shared_experts": 0,
        "rope_parameters": _YARN,
        "moe_hidden_size": 32,
        "layer_rope_theta": [10000.0] * _LAYERS,
        "final_logit_softcapping": 20.0,
    },
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 3
        + [{"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}}]
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "M", "E"],
        "layer_types": None,
        "layers_block_type": None,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "moe_latent_size": None,
    },
    "olmo_hybrid": {"layer_types": _LINEAR_MIX},
    "openelm": {
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
        "ffn_dim_divisor": 16,
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "blocksparse_block_size": 32,
        "gegelu_limit": 20.0,
        "vocab_size": 100352,
    },  # it hides tokens by their ids
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "long_mscale": 1.0,
            "short_mscale": 1.0,
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
        }
    },
    "plamo": {"n_shared_head": 2},
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {"num_experts": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
    "spark2_5": {"rope_parameters": _ROPE_BY_LAYER},
    "step3p5": {"moe_layers_enum": "1,2,3"},
}
"""By module: fields that the general way gets wrong."""

WRAPPED: dict[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "lfm2-vl": "lfm2",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
"""Modules whose language model is another module's: their `text_config` is that module's config."""

_ARGS_CLASSES = ("TextArgs", "TextConfig", "TextModelArgs", "ModelArgs")


def names() -> list[str]:
    """Return the modules of mlx-lm's model folder that define a model, by their text and not by importing them."""
    folder = Path(mlx_lm.models.__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if "\nclass Model(" in path.read_text())


def _plain(kind: str) -> Any:
    for start, value in (("list", []), ("dict", {}), ("bool", False), ("int", 1), ("float", 1.0), ("str", "")):
        if start in kind.lower():
            return value
    return None


def _derive(args_class: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for field in dataclasses.fields(args_class):
        if field.name in overrides:
            continue
        if field.name in _SMALL:
            config[field.name] = _SMALL[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            config[field.name] = _plain(str(field.type))
    return config | overrides


def small_config(name: str) -> dict[str, Any]:
    """Return the config of a small model of this architecture."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    overrides = {"model_type": name, **OVERRIDES.get(name, {})}
    fields = {field.name for field in dataclasses.fields(module.ModelArgs)}
    if "text_config" not in fields:
        return _derive(module.ModelArgs, overrides)
    if name in WRAPPED:
        inner = small_config(WRAPPED[name])
        text = inner.get("text_config", inner) | OVERRIDES.get(name, {})
    else:
        text = _derive(next(getattr(module, c) for c in _ARGS_CLASSES if hasattr(module, c)), overrides)
    return {"model_type": name, "vocab_size": VOCAB, "text_config": text}


def build(name: str) -> nn.Module:
    """Return a small model of this architecture with random float32 weights."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict(small_config(name)))
    model.update(tree_unflatten([(path, _weight(path, value)) for path, value in tree_flatten(model.parameters())]))
    model.eval()
    mx.eval(model.parameters())
    return model


def _weight(path: str, value: mx.array) -> mx.array:
    """Return a weight large enough, and never zero, that each logit depends on the whole context."""
    if not mx.issubdtype(value.dtype, mx.floating) or "A_log" in path or path.endswith(("dt_bias", ".D")):
        return value
    value = value.astype(mx.float32)
    if value.ndim >= 2:
        return mx.random.normal(value.shape) * (3.0 / value.shape[-1] ** 0.5)
    return value + 0.1 * mx.random.normal(value.shape)
