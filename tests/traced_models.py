"""Models that the tests of traces share, small enough to run and large enough to measure."""

from transformers import AutoConfig

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 704,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
MODELS = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 4096}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 256}),
    "gemma3": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 256}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 256},
    ),
}


def model_config(name: str):
    model_type, numbers = MODELS[name]
    return AutoConfig.for_model(model_type, **SIZES, **numbers)
