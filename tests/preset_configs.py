"""The fields of config.json that the presets have on Hugging Face, and tiny models with them."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN_MATH = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "vocab_size": 49152,
}
LLAMA_2 = {
    **LLAMA,
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "transformers_version": "4.31.0.dev0",
}
LLAMA_3 = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "vocab_size": 128256,
}
DEEPSEEK = {
    **LLAMA,
    "attention_bias": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "vocab_size": 102400,
}
CONFIGS = {  # preset (support/hugging_face.py) -> config.json
    "llama-7b": {**LLAMA, "max_sequence_length": 2048, "pad_token_id": 0},
    "llama-2-7b": LLAMA_2,
    "llama-3.1-8b": LLAMA_3,
    "deepseekmath-7b": DEEPSEEK,
    "qwen2.5-math-1.5b": QWEN_MATH,
    "qwen2.5-math-7b": {
        **QWEN_MATH,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "smollm2-135m": SMOLLM,
    "smollm2-360m": {
        **SMOLLM,
        "hidden_size": 960,
        "initializer_range": 0.02,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
    },
}


def tiny_fields(preset: str, vocab_size: int) -> dict:
    """A preset's config.json with small sizes; every other field is the real one.

    Of 4 query heads, as many share a key/value head as in the real model, or all if it has more.
    Token ids past the vocabulary become its last.
    """
    fields = dict(CONFIGS[preset])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in fields:
            fields[key] = min(fields[key], vocab_size - 1)
    if "num_key_value_heads" in fields:
        shared = fields["num_attention_heads"] // fields["num_key_value_heads"]
        fields["num_key_value_heads"] = max(1, 4 // shared)
    return {
        **fields,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
