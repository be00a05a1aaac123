# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# torch is no dependency: this runs where it happens to be installed.
"""The arm of bench_step.py that is torch; prints a line of JSON last.

python scripts/bench_step_torch.py JOB

What a careful user of torch would run: torch.compile over the whole model and loss,
SDPA with cuDNN or flash attention, fused AdamW, bfloat16 autocast over float32
parameters, and selective checkpointing that keeps attention, as our arms do.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

WARMUP_STEPS = 3


class Block(nn.Module):
    """A layer of a Llama: attention and a gated MLP, each after an RMSNorm."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.model = model
        d, f, h = model["d_model"], model["d_ff"], model["head_dim"]
        n, k = model["num_heads"], model["num_kv_heads"]
        linear = functools.partial(nn.Linear, bias=False)
        self.norm1 = nn.RMSNorm(d, eps=model["norm_eps"])
        self.norm2 = nn.RMSNorm(d, eps=model["norm_eps"])
        self.query, self.key, self.value = (linear(d, m * h) for m in (n, k, k))
        self.out = linear(n * h, d)
        self.gate, self.up, self.down = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x, cos, sin):
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (-1, self.model["head_dim"])).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        x = x + self.out(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
    """Turns the halves of each head by its position's angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Llama(nn.Module):
    """The model and its loss."""

    def __init__(self, model: dict[str, Any], length: int):
        super().__init__()
        self.remat = model["remat"]
        self.embedding = nn.Embedding(model["vocab_size"], model["d_model"])
        self.blocks = nn.ModuleList(Block(model) for _ in range(model["num_layers"]))
        self.norm = nn.RMSNorm(model["d_model"], eps=model["norm_eps"])
        self.output = nn.Linear(model["d_model"], model["vocab_size"], bias=False)
        if model["tie_embeddings"]:
            self.output.weight = self.embedding.weight
        half = model["head_dim"] // 2
        speeds = model["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(length)[:, None] * speeds
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens).to(torch.bfloat16)
        for block in self.blocks:
            x = self.run_block(block, x)
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def run_block(self, block, x):
        if self.remat == "none":
            return block(x, self.cos, self.sin)
        return checkpoint.checkpoint(
            block,
            x,
            self.cos,
            self.sin,
            use_reentrant=False,
            context_fn=functools.partial(
                checkpoint.create_selective_checkpoint_contexts, keep_attention
            ),
        )


def keep_attention(context, operation, *arguments, **options):
    """Keeps what attention returns, and nothing else of a layer."""
    keep = "scaled_dot_product" in str(operation)
    policy = checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if keep else policy.PREFER_RECOMPUTE


def make_step(model: nn.Module, device: str):
    """Returns a function of a batch that updates the model and returns the loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    compiled = torch.compile(model) if device == "cuda" else model

    def step(tokens, targets):
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def flops_a_token(model: dict[str, Any], length: int) -> float:
    """Counts as jaxllm.plan.budget.flops_per_token does: pairs that the mask allows."""
    d, h = model["d_model"], model["head_dim"]
    heads = 2 * model["num_heads"] + 2 * model["num_kv_heads"]
    layer = d * h * heads + 3 * d * model["d_ff"]
    matmuls = model["num_layers"] * layer + model["vocab_size"] * d
    pairs = 12 * model["num_heads"] * h * (length + 1) / 2
    return 6.0 * matmuls + model["num_layers"] * pairs


def profile(run: Callable[[], Any]) -> str:
    """Returns the kernels of two more steps that take the most time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
    options = dict(sort_by="self_cuda_time_total", row_limit=25)
    return p.key_averages().table(**options, max_name_column_width=60)


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    model, on_gpu = job["model"], torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    length = 64 if job["tiny"] else 8192
    with torch.device(device):
        llama = Llama(model, length)
        rows = torch.randint(0, model["vocab_size"], (job["batch"], length + 1))
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    step = make_step(llama, device)
    began = time.perf_counter()
    losses = [step(tokens, targets).item() for _ in range(WARMUP_STEPS)]
    compile_s, seconds = time.perf_counter() - began, []
    for _ in range(job["readings"]):
        wait()
        began = time.perf_counter()
        done = [step(tokens, targets) for _ in range(job["steps"])]
        wait()
        seconds.append((time.perf_counter() - began) / job["steps"])
        losses.append(done[-1].item())
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "remat": model["remat"],
        "tokens_a_step": tokens.numel(),
        "flops_a_step": tokens.numel() * flops_a_token(model, length),
        "peak_flops": 989.4e12,
        "compile_s": compile_s,
        "step_s": seconds,
        "losses": [losses[0], losses[-1]],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    assert math.isfinite(losses[-1])
    if job["profile"] and on_gpu:
        print(json.dumps(found), flush=True)  # in case that profiling fails
        found["profile"] = profile(lambda: step(tokens, targets))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
