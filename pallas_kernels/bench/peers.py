# SPDX-License-Identifier: Apache-2.0
"""The same calls through other libraries: the one file that imports any of them.

A library that is not installed is absent from the tables, which say so. Each peer is
built from `Case.call`; a call that a library does not offer has no entry.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.bench.timing import Entrant
from pallas_kernels.case import Case

NO_TARGET = -1  # of cross-entropy
LIBRARIES = ("torch", "tokamax", "liger_kernel")
Inputs = Sequence[tuple[jax.Array, ...]]


@functools.cache
def versions() -> dict[str, str]:
    """Returns the version of each library, or why it cannot be imported."""
    found = {}
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
            found[name] = importlib.metadata.version(name)
        except Exception as error:  # an extension that does not load raises anything
            found[name] = f"absent: {type(error).__name__}: {error}"[:200]
    return found


def jax_peers(case: Case) -> dict[str, Callable]:
    """Returns functions of the case's inputs that other libraries write in JAX."""
    if "absent" in versions()["tokamax"]:
        return {}
    tokamax = importlib.import_module("tokamax")
    call = dict(case.call)
    plain = not any(call.get(name) for name in ("packed", "sinks"))
    if case.operation == "attention" and plain and call:

        def forward(q_BTNH, k_BSKH, v_BSKH, *_):
            return tokamax.dot_product_attention(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                is_causal=call["causal"],
                logits_soft_cap=call.get("softcap"),
                local_window_size=_window(call),
                implementation="mosaic",
            )

        def forward_backward(q_BTNH, k_BSKH, v_BSKH, dout_BTNH):
            return jax.vjp(forward, q_BTNH, k_BSKH, v_BSKH)[1](dout_BTNH)

        is_forward = call["direction"] == "forward"
        return {"tokamax": forward if is_forward else forward_backward}
    if case.operation == "grouped_matmul" and case.name.startswith("product"):

        def multiply(x, w, group_sizes, *_):
            return tokamax.ragged_dot(x, w, group_sizes, implementation="mosaic")

        return {"tokamax": multiply}
    return {}


def torch_peers(case: Case, inputs: Inputs) -> dict[str, Callable[[], Entrant]]:
    """Returns what makes the entrants of torch and Liger, by their names."""
    found = versions()
    if "absent" in found["torch"]:
        return {}
    torch = importlib.import_module("torch")
    # A backward pass that is timed alone runs again and again from one forward pass.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    makers = {
        "attention": _attention,
        "norm": _norm,
        "cross_entropy": _cross_entropy,
        "grouped_matmul": _grouped_matmul,
    }
    if case.operation not in makers:
        return {}
    call = {"kind_of_case": case.name.partition("-")[0], **case.call}
    functions = makers[case.operation](torch, call)
    if "absent" in found["liger_kernel"]:
        functions = {n: f for n, f in functions.items() if not n.startswith("liger")}
    return {
        name: lambda prepare=prepare: _entrant(torch, prepare, inputs)
        for name, prepare in functions.items()
    }


def _entrant(torch: Any, prepare: Callable, inputs: Inputs) -> Entrant:
    calls = [prepare(*map(torch.from_dlpack, some)) for some in inputs]
    on_gpu = jax.default_backend() == "gpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    return Entrant(lambda i: calls[i % len(calls)](), lambda _: wait())


def _attention(torch: Any, call: dict[str, Any]) -> dict[str, Callable]:
    """SDPA knows causal masks and grouped heads, and nothing else of ours."""
    others = ("window", "softcap", "packed", "sinks")
    if any(call.get(name) for name in others) or "direction" not in call:
        return {}
    backends = importlib.import_module("torch.nn.attention")

    def prepare(backend, q_BTNH, k_BSKH, v_BSKH, *others):
        q, k, v = (x.detach().transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))

        def forward():
            with backends.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    is_causal=call["causal"],
                    enable_gqa=q.shape[1] != k.shape[1],
                )

        return _directed(torch, call["direction"], forward, (q, k, v))

    def on(backend):
        return lambda *arguments: prepare(backend, *arguments)

    kinds = backends.SDPBackend
    return {
        "torch-flash": on(kinds.FLASH_ATTENTION),
        "torch-cudnn": on(kinds.CUDNN_ATTENTION),
    }


def _norm(torch: Any, call: dict[str, Any]) -> dict[str, Callable]:
    found = {"torch-compile": functools.partial(_torch_norm, torch, call)}
    if call["kind"] == "rms" or not call["residual"]:
        found["liger"] = functools.partial(_liger_norm, torch, call)
    return found


def _torch_norm(torch: Any, call: dict[str, Any], x, scale, *others):
    """Inputs start with x and scale, whatever comes after."""
    x, scale = x.detach(), scale.detach().to(x.dtype)
    functions = torch.nn.functional
    function = functions.rms_norm if call["kind"] == "rms" else functions.layer_norm
    options = dict(normalized_shape=x.shape[-1:], weight=scale, eps=call["eps"])

    @torch.compile
    def forward():
        if not call["residual"]:
            return function(x, **options)
        total = x + residual
        return function(total, **options), total

    residual = torch.randn_like(x)
    return _directed(torch, call["direction"], forward, (x, scale))


def _liger_norm(torch: Any, call: dict[str, Any], x, scale, *others):
    x, scale = x.detach(), scale.detach().to(x.dtype)
    ops = importlib.import_module("liger_kernel.ops")
    residual, bias = torch.randn_like(x), torch.zeros_like(scale)

    def forward():
        # Float32 inside, as "gemma" casts; gradients into memory of their own.
        settings = (call["eps"], 0.0, "gemma", False)
        if call["residual"]:
            return ops.LigerFusedAddRMSNormFunction.apply(x, residual, scale, *settings)
        if call["kind"] == "rms":
            return ops.LigerRMSNormFunction.apply(x, scale, *settings)
        return ops.LigerLayerNormFunction.apply(x, scale, bias, call["eps"])

    return _directed(torch, call["direction"], forward, (x, scale))


def _cross_entropy(torch: Any, call: dict[str, Any]) -> dict[str, Callable]:
    """Loss and gradients together, as our operation makes them."""
    if call.get("direction") == "between":
        return {}  # kernels alone, which nobody else has

    def leaves(x_TD, w, targets_T, *others):
        w_VD = w if w.shape[1] == x_TD.shape[1] else w.t().contiguous()
        x_TD, w_VD = (x.detach().requires_grad_() for x in (x_TD, w_VD))
        return x_TD, w_VD, targets_T.long()

    def with_torch(*arguments):
        x_TD, w_VD, targets_T = leaves(*arguments)

        @torch.compile
        def loss():
            logits_TV = torch.nn.functional.linear(x_TD, w_VD).float()
            return torch.nn.functional.cross_entropy(
                logits_TV, targets_T, reduction="sum", ignore_index=NO_TARGET
            )

        return lambda: torch.autograd.grad(loss(), (x_TD, w_VD))

    def with_liger(*arguments):
        x_TD, w_VD, targets_T = leaves(*arguments)
        ops = importlib.import_module("liger_kernel.ops")
        function = ops.LigerFusedLinearCrossEntropyFunction

        def loss_and_gradients():
            loss = function.apply(
                x_TD,
                w_VD,
                targets_T,
                None,
                None,
                NO_TARGET,
                call.get("z_loss", 0.0),
                0.0,
                "sum",
                call.get("softcap"),
            )
            loss = loss[0] if isinstance(loss, tuple) else loss
            return torch.autograd.grad(loss, (x_TD, w_VD))

        return loss_and_gradients

    plain = not call.get("z_loss") and not call.get("softcap")
    return ({"torch-compile": with_torch} if plain else {}) | {"liger": with_liger}


def _grouped_matmul(torch: Any, call: dict[str, Any]) -> dict[str, Callable]:
    if call["kind_of_case"] != "product":
        return {}

    def prepare(x, w, group_sizes, *others):
        ends = group_sizes.cumsum(0).to(torch.int32)
        return lambda: torch.nn.functional.grouped_mm(x, w, offs=ends)

    return {"torch-grouped": prepare}


def _directed(torch: Any, direction: str, forward: Callable, leaves: tuple):
    """Returns the forward pass, the backward pass alone, or both."""
    if direction == "forward":

        def without_gradients():
            with torch.no_grad():
                return forward()

        return without_gradients
    for leaf in leaves:
        leaf.requires_grad_()
    outs = forward()
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [torch.randn_like(out) for out in outs]

    def both():
        outs = forward()
        outs = outs if isinstance(outs, tuple) else (outs,)
        return torch.autograd.grad(outs, leaves, cotangents)

    if direction == "both":
        return both
    return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)


def _window(call: dict[str, Any]) -> tuple[int, int] | None:
    window = call.get("window")
    return (window - 1, 0) if window else None
