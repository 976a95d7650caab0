"""The config.json of a model of accelerator.MODELS; imports nothing, as random_model.py is started by itself."""


def config_of(of):
    """As Hugging Face's Qwen3MoeForCausalLM wants it."""
    return dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=of["vocab"], hidden_size=of["hidden"], intermediate_size=of["ffn"],
        moe_intermediate_size=of["ffn"], num_hidden_layers=of["layers"], num_attention_heads=of["heads"], num_key_value_heads=of["kv_heads"],
        head_dim=of["head_dim"], num_experts=of["experts"], num_experts_per_tok=of["top_k"], decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
        tie_word_embeddings=True, torch_dtype="bfloat16")
