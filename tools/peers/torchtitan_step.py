"""Peer: torchtitan 0.3's Qwen3-MoE: its model classes, its compilation of each block, its loss in chunks, its AdamW and clipping. `way`:
bf16 (parameters, gradients and moments in bf16, no FSDP: training.dtype = "bfloat16") or fp32 (fp32 parameters under its FSDP over this one
GPU, computing in bf16). Needs the wheels torchtitan 0.3.0, spmd_types 0.2.3 and torch_checkpointing. See peer.py.

On torch 2.11 it lacks one name, which it uses in annotations only, and its own attention class that goes through cuDNN is chosen instead of
its default, FlexAttention, which is slower here."""
import os
import sys
import types

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")   # as its run_train.sh
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from peer import Peer, Step, main, version_of


def stand_ins():
    if not hasattr(torch.distributed.fsdp, "DataParallelMeshDims"):
        torch.distributed.fsdp.DataParallelMeshDims = type("DataParallelMeshDims", (), {})
    try:
        import datasets   # noqa: F401
    except ImportError:   # for its data loaders, which are not used
        datasets, distributed = types.ModuleType("datasets"), types.ModuleType("datasets.distributed")
        datasets.Dataset, datasets.load_dataset, datasets.distributed = object, None, distributed
        distributed.split_dataset_by_node = None
        sys.modules["datasets"], sys.modules["datasets.distributed"] = datasets, distributed


def mesh_of_one(device):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1)
    return dist.device_mesh.init_device_mesh(device, (1,), mesh_dim_names=("fsdp",))


def build_model(step: Step, qwen3, dtype):
    import torchtitan.models.common.token_dispatcher as token_dispatcher
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.ops.scatter_add import deterministic_scatter_add
    token_dispatcher.deterministic_scatter_add = deterministic_scatter_add
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=step.layers, dim=step.hidden, n_heads=step.heads, n_kv_heads=step.kv_heads, head_dim=step.head_dim, moe_hidden_dim=step.ffn,
        num_experts=step.experts, top_k=step.top_k, fuse_qkv=True, attn_backend="flex", moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=step.head_dim, max_seq_len=step.sequence, theta=1e6))
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    tied = dtype == torch.bfloat16   # its FSDP does not know tied weights; its own MoE flavours are not tied
    config = qwen3.Qwen3Model.Config(
        vocab_size=step.vocab, dim=step.hidden, norm=qwen3._qwen3_norm(step.hidden), enable_weight_tying=tied, layers=layers,
        tok_embeddings=Embedding.Config(num_embeddings=step.vocab, embedding_dim=step.hidden,
                                        param_init=qwen3._EMBEDDING_SKIP_INIT if tied else qwen3._EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=step.hidden, out_features=step.vocab, param_init=qwen3._LINEAR_INIT))
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        model = config.build()
    torch.set_default_dtype(torch.float32)
    return model, tied


def build(step: Step):
    stand_ins()
    import torchtitan.models.qwen3 as qwen3
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import utils
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    model, tied = build_model(step, qwen3, torch.float32 if step.way == "fp32" else torch.bfloat16)
    compile_config = CompileConfig(enable=True, backend=step.backend)
    apply_compile(model, compile_config=compile_config, parallel_dims=types.SimpleNamespace(tp_enabled=False))
    if step.way == "fp32":
        apply_fsdp_to_decoder(model, mesh_of_one(step.device), param_dtype=torch.bfloat16, reduce_dtype=torch.float32, pp_enabled=False)
    model.to_empty(device=step.device)
    with torch.no_grad():
        model.init_states(buffer_device=None)
    model.train()
    loss_of = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=step.vocab)).build(compile_config=compile_config)
    loss_of.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    adamw = default_adamw(lr=step.lr)
    if step.device != "cuda":
        adamw.implementation = "foreach"
    optimizer = adamw.build(model_parts=[model])
    tokens = torch.tensor(float(step.micro_batch * step.sequence), device=step.device)

    def forward_backward(inputs, labels):
        loss, _ = loss_of(model(inputs, None, None), labels, tokens)
        loss.backward()
        return loss

    def update():
        optimizer.step()
        optimizer.zero_grad()

    parameters = list(model.parameters())
    return Peer(parameters, forward_backward, update, {"version": version_of("torchtitan"), "tied": tied},
                clip=lambda: utils.clip_grad_norm_(parameters, 1.0, foreach=True))


if __name__ == "__main__":
    main(build)
