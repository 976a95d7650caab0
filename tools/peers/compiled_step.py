"""Peer: a Qwen3-MoE written by hand for torch.compile: fused projections, cuDNN attention, torch's grouped matrix products with offsets on
the device, routing weights folded into SwiGLU, the head in chunks that are computed again for backward; parameters, gradients and moments
in bf16. What one gets out of PyTorch without writing kernels. See peer.py."""
import torch
import torch.nn.functional as F
from peer import Peer, Step, fused_adamw, main
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

EPS = 1e-6
LOSS_CHUNKS = 8


def matrix(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


def rotate(x, cos, sin):
    """[batch, position, head, width], half-split, in fp32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, step: Step):
        super().__init__()
        self.step = step
        ones = lambda width: nn.Parameter(torch.ones(width))   # noqa: E731
        self.attention_norm, self.experts_norm = ones(step.hidden), ones(step.hidden)
        self.q_norm, self.k_norm = ones(step.head_dim), ones(step.head_dim)
        self.qkv = matrix((step.heads + 2 * step.kv_heads) * step.head_dim, step.hidden)
        self.out = matrix(step.hidden, step.heads * step.head_dim)
        self.router = matrix(step.experts, step.hidden)
        self.gate_up = matrix(step.experts, 2 * step.ffn, step.hidden)
        self.down = matrix(step.experts, step.hidden, step.ffn)

    def attention(self, x, cos, sin):
        step, (batch, length, _) = self.step, x.shape
        qkv = F.linear(F.rms_norm(x, (step.hidden,), self.attention_norm, EPS), self.qkv)
        q, k, v = qkv.view(batch, length, -1, step.head_dim).split([step.heads, step.kv_heads, step.kv_heads], 2)
        q = rotate(F.rms_norm(q, (step.head_dim,), self.q_norm, EPS), cos, sin)
        k = rotate(F.rms_norm(k, (step.head_dim,), self.k_norm, EPS), cos, sin)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return F.linear(attended.transpose(1, 2).reshape(batch, length, -1), self.out)

    def experts(self, x):
        step = self.step
        rows = F.rms_norm(x, (step.hidden,), self.experts_norm, EPS).view(-1, step.hidden)
        probabilities = F.softmax(F.linear(rows.float(), self.router.float()), -1)
        weight, expert = probabilities.topk(step.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        # Choices sorted by expert, and where each expert's end.
        choice = expert.view(-1)
        order = torch.argsort(choice, stable=True)
        count = torch.zeros(step.experts, device=x.device, dtype=torch.int32).scatter_add_(0, choice, torch.ones_like(choice, dtype=torch.int32))
        end = count.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(rows[order // step.top_k], self.gate_up.transpose(1, 2), offs=end).chunk(2, -1)
        product = (F.silu(gate.float()) * up.float() * weight.view(-1)[order][:, None]).to(x.dtype)
        result = torch._grouped_mm(product, self.down.transpose(1, 2), offs=end)
        home = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        return result[home].view(-1, step.top_k, step.hidden).float().sum(1).to(x.dtype).view(x.shape)

    def forward(self, x, cos, sin):
        x = x + self.attention(x, cos, sin)
        return x + self.experts(x)


def summed_loss(x, head, labels):
    return F.cross_entropy(F.linear(x, head).float(), labels, reduction="sum")


class Model(nn.Module):
    def __init__(self, step: Step):
        super().__init__()
        self.step = step
        self.embedding = matrix(step.vocab, step.hidden)   # the head, too
        self.layers = nn.ModuleList(Layer(step) for _ in range(step.layers))
        self.norm = nn.Parameter(torch.ones(step.hidden))
        self.layer = torch.compile(lambda layer, x, cos, sin: layer(x, cos, sin), fullgraph=True, backend=step.backend)
        self.loss = torch.compile(summed_loss, backend=step.backend)

    def forward(self, inputs, labels, cos, sin):
        x = F.embedding(inputs, self.embedding)
        for layer in self.layers:
            x = self.layer(layer, x, cos, sin)
        x, labels = F.rms_norm(x, (self.step.hidden,), self.norm, EPS).view(-1, self.step.hidden), labels.view(-1)
        losses = [checkpoint(self.loss, part, self.embedding, of_part, use_reentrant=False)
                  for part, of_part in zip(x.chunk(LOSS_CHUNKS), labels.chunk(LOSS_CHUNKS))]
        return sum(losses) / labels.numel()


def build(step: Step):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(step.device):
        model = Model(step)
    torch.set_default_dtype(torch.float32)
    half = step.head_dim // 2
    frequency = 1.0 / (1e6 ** (torch.arange(half, device=step.device).float() / half))
    angle = torch.arange(step.sequence, device=step.device).float()[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    # On a CPU torch has no cuDNN: any kernel will do.
    kernels = [SDPBackend.CUDNN_ATTENTION] if step.device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def forward_backward(inputs, labels):
        with sdpa_kernel(kernels):
            loss = model(inputs, labels, cos, sin)
            loss.backward()
        return loss

    parameters = list(model.parameters())
    return Peer(parameters, forward_backward, fused_adamw(parameters, step))


if __name__ == "__main__":
    main(build)
