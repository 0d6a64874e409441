"""A tiny config of any architecture of transformers: its own default config with every size made
small.

Every list with an entry for each layer keeps one entry of each kind of layer, so that hybrids keep
their mixture.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 160  # special tokens take the numbers from 128 on
BLOCKS = 3

DEPTH = (
    "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers depth"
)
SIZES = {
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim "
    "attention_hidden_size "
    "input_embedding_size output_embedding_size lru_width input_size backbone_hidden_size "
    "mamba_d_ssm linear_attn_dim "
    "out_hidden_size hidden_size_global dim_model_base ple_embed_dim output_dim "
    "projection_dim qk_nope_dim",
    16: "head_dim global_head_dim swa_head_dim d_kv d_head dim_head kv_channels "
    "attention_head_size linear_head_dim "
    "linear_key_head_dim linear_value_head_dim qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim index_head_dim "
    "kv_lora_rank mamba_d_state state_size ssm_state_size mamba_headdim mamba_d_head "
    "mamba_head_dim "
    "hidden_size_per_layer_input o_lora_rank laurel_rank "
    "time_step_rank mamba_dt_rank adapter_rank rotary_dim query_pre_attn_scalar rel_extent "
    "hc_lowrank router_hidden_size pronunciation_embed_dim shape_embed_dim "
    "position_bias_num_buckets "
    "moe_latent_size d_rel",
    32: "qk_head_dim q_lora_rank moe_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_experts_intermediate_size prompt_mid_dim",
    96: "intermediate_size n_inner ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "d_ff d_inner dff dim_ff "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim",
    256: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "context_length model_max_length "
    "max_source_positions original_max_position_embeddings",
    8: "mamba_n_heads mamba_num_heads "
    "sliding_window sliding_window_size window_size attention_chunk_size "
    "attention_window_size attention_window "
    "mamba_chunk_size chunk_size block_size local_attn_chunk_length lsh_attn_chunk_length "
    "num_embeds_ada_norm "
    "keep_window_size index_block_size segment_size local_attention",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
    "decoder_attention_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts linear_num_heads "
    "linear_num_value_heads linear_num_key_heads "
    "index_n_heads swa_num_attention_heads prompt_length index_topk zero_expert_num num_codebooks "
    "encoder_hash_byte_group_nb_functions n_shared_query_heads cross_attention_k",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups "
    "num_experts_per_tok moe_k top_k "
    "num_experts_per_token moe_topk moe_top_k n_group topk_group num_global_key_value_heads",
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size "
    "vocab_size_per_layer_input unpadded_vocab_size "
    "audio_vocab_size pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    128: "codebook_size",
    1024: "ngram_vocab_size_base",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}

ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
# what the table of sizes does not say; keys of a sub-config are written `text_config.key`
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
HALF = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
FOUR = {"mrope_section": [2, 2, 2, 2]}
MROPE_IN_TEXT = (
    "glm4v glm46v glm_ocr glmga glm_image qwen2_vl qwen2_5_vl qwen2_5_omni_thinker paddleocr_vl"
)
MROPE_TEXT = "glm4v_text glm_ocr_text glm_image_text qwen2_vl_text qwen2_5_vl_text"
COMPASS = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + n for n in range(8)],
    "original_max_position_embeddings": 24,
    "rope_theta": 10000.0,
}
LONGROPE = {"rope_parameters": ROPE, "original_max_position_embeddings": 24}

# two seconds of sound, as their processors are told to pad clips in the sweep
WHISPER_LIKE = (
    "audioflamingo3_encoder moss_transcribe_diarize_audio qwen2_audio_encoder "
    "voxtral_encoder whisper"
)

SAM = {"vision_config.image_size": 256, "vision_config.output_channels": 256}
SAM |= {
    f"prompt_encoder_config.{name}": n for name, n in (("image_size", 256), ("hidden_size", 256))
}
SAM |= {"prompt_encoder_config.image_embedding_size": 16, "mask_decoder_config.hidden_size": 256}
SPECIAL: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config.image_size": 64,
        "vision_config.hidden_dim": 640,
        "vision_config.width_coefficient": 0.5,
        "vision_config.depth_coefficient": 0.5,
    },
    **{name: {"text_config.rope_parameters": MROPE} for name in MROPE_IN_TEXT.split()},
    **{name: {"rope_parameters": MROPE} for name in MROPE_TEXT.split()},
    "glm4v_moe": {"text_config.rope_parameters": MROPE | HALF},
    "glm4v_moe_text": {"rope_parameters": MROPE | HALF},
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "clvp": {"text_config.num_attention_heads": 2},
    "cohere_compass": {"text_config.rope_parameters": COMPASS},
    "cohere_compass_text": {"rope_parameters": COMPASS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 3,  # its code runs each by itself
            "moe_top_k": 2,
        },
    },
    "deepseek_v4": {"hc_sinkhorn_iters": 3},  # of 20, in each of its blocks twice
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "doge": {"keep_window_size": 256},  # by default it is the context, too
    "dots3_note": {
        "text_config.head_dim": 32,
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
    },
    "dots3_note_text": {"head_dim": 32},
    # as few patches as its windows take in three poolings, and not as many up as across
    "hiera": {"image_size": [64, 96], "embed_dim": 32, "depths": [1, 2, 1, 1]},
    "hrm_text": {"num_layers_per_stack": 2, "L_cycles": 2, "num_hidden_layers": 12},
    "efficientnet": {
        "image_size": 64,
        "hidden_dim": 640,
        "width_coefficient": 0.5,
        "depth_coefficient": 0.5,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
        }
    },
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "exaone4_5_vision": {"window_size": 112},
    "glm5_next": {"text_config.index_kpool": 4},
    "glm5_next_text": {"index_kpool": 4},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": MROPE | FOUR},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": MROPE | FOUR},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lilt": {"hidden_size": 96},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2},  # each has two attentions, and experts that run one by one
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    **{name: {"text_config.max_position_embeddings": 64} for name in ("owlvit", "owlv2", "sam3")},
    "nemotron": {"num_key_value_heads": 2},
    # frequencies that change within the lengths of the sweep
    "phi3": LONGROPE,
    "phimoe": {**LONGROPE, "rope_parameters": {**ROPE, "short_mscale": 1.1, "long_mscale": 1.4}},
    "qwen2_5_vl_vision": {"window_size": 112},
    "qwen4_exp": {f"text_config.{key}": value for key, value in QWEN4.items()},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh", "local"],
        "hash_seed": 0,  # by default rows of its LSH attention are by chance
    },
    # maps that are not as wide as they are high and long
    "mistral4": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 1.0,
        }
    },
    "step3p7": {"text_config.sliding_window": 8},
    "sam": SAM,
    "sam_hq": SAM | {"mask_decoder_config.vit_dim": 64},
    "sam_vision_model": {"image_size": 256},
    "sam_hq_vision_model": {"image_size": 256},
    **{name: {"max_source_positions": 100} for name in WHISPER_LIKE.split()},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA
    | {
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
    },
    "xlstm": {"qk_dim_factor": 1.0},  # its own cache wants keys whose width is a multiple of 64
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of an architecture with all its sizes made small."""
    kind = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    plain = kind().to_dict()
    _shrink(plain, special)
    plain.pop("model_type", None)
    plain.pop("transformers_version", None)
    if "stage_names" in plain:  # they follow from the depth
        for name in ("stage_names", "out_features", "out_indices"):
            plain.pop(name, None)
    return kind(**plain)


def _shrink(plain: dict[str, Any], special: dict[str, Any]) -> None:
    depth = next((plain[n] for n in DEPTH.split() if isinstance(plain.get(n), int)), 0)
    requested = special.get("num_hidden_layers")
    lists = {k: v for k, v in plain.items() if isinstance(v, list | tuple) and len(v) == depth > 3}
    rows = list(zip(*map(_hashable, lists.values()), strict=True)) or [()] * depth
    kept = [rows.index(row) for row in dict.fromkeys(rows)] or list(range(BLOCKS))
    kept += [i for i in range(len(rows)) if i not in kept][
        : max(0, (requested or BLOCKS) - len(kept))
    ]
    kept.sort()
    for key, value in list(plain.items()):
        if key == "per_layer_config" and isinstance(value, dict):
            plain[key] = {kept.index(int(i)): v for i, v in value.items() if int(i) in kept}
            for layer in plain[key].values():
                layer.update({k: SIZE.get(k, v) for k, v in layer.items()})
                if "kv_lora_rank" in layer:
                    layer["num_key_value_heads"] = layer["num_attention_heads"]
        elif isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            _shrink(
                value,
                {k.partition(".")[2]: v for k, v in special.items() if k.startswith(f"{key}.")},
            )
        elif key in lists:
            plain[key] = [value[i] for i in kept]
        elif key == "depths" and isinstance(value, list | tuple):
            plain[key] = [min(count, 2) for count in value]
        elif key in DEPTH.split() and isinstance(value, int):
            plain[key] = len(kept)
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 128:
            plain[key] = 128 + sum(map(ord, key)) % 32
        elif (
            key in SIZE
            and isinstance(value, int)
            and not isinstance(value, bool)
            and value > SIZE[key]
        ):
            plain[key] = SIZE[key]
        elif key in ("num_key_value_heads", "num_kv_heads") and isinstance(value, int):
            plain[key] = min(value, 2)
    if "kv_lora_rank" in plain and plain.get("num_key_value_heads"):
        plain["num_key_value_heads"] = plain[
            "num_attention_heads"
        ]  # latent attention has keys for every head
    rope = plain.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        width = plain.get("head_dim") or plain["hidden_size"] // plain["num_attention_heads"]
        angles = int(width * rope.get("partial_rotary_factor", 1)) // 2
        part = angles * 3 // 8
        plain["rope_parameters"] = rope | {"mrope_section": [angles - 2 * part, part, part]}
    plain |= {k: v for k, v in special.items() if "." not in k}


def _hashable(values: list[Any]) -> list[Any]:
    return [tuple(v) if isinstance(v, list) else v for v in values]
