"""Peer: Hugging Face transformers' Qwen3-MoE with torch.optim's AdamW; parameters, gradients and moments in bf16. `way`: eager or compiled.
See peer.py."""
import torch
from peer import Peer, Step, fused_adamw, main, version_of


def build(step: Step):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config = Qwen3MoeConfig(vocab_size=step.vocab, hidden_size=step.hidden, intermediate_size=step.ffn, moe_intermediate_size=step.ffn,
                            num_hidden_layers=step.layers, num_attention_heads=step.heads, num_key_value_heads=step.kv_heads,
                            head_dim=step.head_dim, num_experts=step.experts, num_experts_per_tok=step.top_k, decoder_sparse_step=1,
                            norm_topk_prob=True, max_position_embeddings=max(step.sequence, 4096), tie_word_embeddings=True,
                            rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, output_router_logits=False, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(step.device):
        model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.train()
    forward = torch.compile(model, backend=step.backend) if step.way == "compiled" else model

    def forward_backward(inputs, labels):
        # Its own loss shifts labels by one: the last token's is left out, one in `sequence`.
        loss = forward(input_ids=inputs, labels=inputs).loss
        loss.backward()
        return loss

    parameters = list(model.parameters())
    return Peer(parameters, forward_backward, fused_adamw(parameters, step), {"version": version_of("transformers")})


if __name__ == "__main__":
    main(build)
