# SPDX-License-Identifier: Apache-2.0
"""Which kernels a run uses on its mesh, and whether they work on its devices."""

import contextlib
from collections.abc import Iterator

import jax

import pallas_kernels
from jaxllm.config import Config
from jaxllm.errors import InputError
from jaxllm.models.moe.experts import ROWS_MULTIPLE
from pallas_kernels import self_check
from pallas_kernels.choice import Choice
from pallas_kernels.grouped_matmul import choose_grouped_matmul
from pallas_kernels.target import current_target


def choose_kernels(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Choice]:
    """Returns the implementation of each operation, and the reason, by its name.

    The first word of a name is that of the setting in config.kernels.

    Raises:
      InputError: the one that was named cannot do what was asked of it.
    """
    model, kernels = config.model, config.kernels
    chosen = {}
    with jax.set_mesh(mesh):
        target = current_target()
    with _named("attention", kernels.attention):
        chosen["attention"] = pallas_kernels.choose_attention(
            kernels.attention,
            target=target,
            dtype=model.dtype,
            head_dim=model.head_dim,
            packed=not config.data.cross_document_attention,
            ranged=mesh.shape["context"] > 1,
            window=max(model.windows),
            softcap=model.attention_softcap,
            deterministic=kernels.deterministic,
        )
    with _named("norm", kernels.norm), jax.set_mesh(mesh):
        widths = {"norm": model.d_model}
        if model.qk_norm:
            widths["norm of heads"] = model.head_dim
        for name, width in widths.items():
            row = jax.ShapeDtypeStruct((1, width), model.dtype)
            chosen[name] = pallas_kernels.choose_norm(
                row, kernels.norm, has_residual=name == "norm"
            )
    with _named("cross_entropy", kernels.cross_entropy):
        chosen["cross_entropy"] = pallas_kernels.choose_cross_entropy(
            kernels.cross_entropy,
            target,
            dtype=model.dtype,
            num_words=_words_of_a_device(config, mesh),
        )
    if model.moe.num_experts:
        with _named("grouped_matmul", kernels.grouped_matmul), jax.set_mesh(mesh):
            num_experts = model.moe.num_experts // mesh.shape["expert"]
            width = model.d_ff_expert // mesh.shape["tensor"]
            shape = (num_experts, model.d_model, width)
            chosen["grouped_matmul of experts"] = choose_grouped_matmul(
                jax.ShapeDtypeStruct((ROWS_MULTIPLE, model.d_model), model.dtype),
                jax.ShapeDtypeStruct(shape, model.dtype),
                kernels.grouped_matmul,
            )
    return chosen


def check_kernels(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Compares each kernel that a run will use with plain JAX, on one device.

    Raises:
      KernelMismatch: the first that differs.
    """
    model = config.model
    choices = choose_kernels(config, mesh)
    chosen = {name: choice.implementation for name, choice in choices.items()}
    with jax.default_device(mesh.local_devices[0]):
        if chosen["attention"] != "xla":
            self_check.check_attention(
                chosen["attention"],
                model.dtype,
                num_groups=model.num_heads // model.num_kv_heads,
                head_dim=model.head_dim,
                packed=not config.data.cross_document_attention,
                window=max(model.windows),
                softcap=model.attention_softcap,
                deterministic=config.kernels.deterministic,
            )
        if chosen["norm"] != "xla":
            self_check.check_norm(
                chosen["norm"], model.dtype, kind=model.norm, width=model.d_model
            )
        if chosen["cross_entropy"] != "xla":
            self_check.check_cross_entropy(
                chosen["cross_entropy"],
                model.dtype,
                width=model.d_model,
                num_words=_words_of_a_device(config, mesh),
                letters="VD" if model.tie_embeddings else "DV",
                softcap=model.logit_softcap,
                z_loss=config.loss.z_loss,
            )
        if chosen.get("grouped_matmul of experts", "xla") != "xla":
            self_check.check_grouped_matmul(
                chosen["grouped_matmul of experts"],
                model.dtype,
                width=model.d_model,
                num_columns=model.d_ff_expert // mesh.shape["tensor"],
            )


def _words_of_a_device(config: Config, mesh: jax.sharding.Mesh) -> int:
    return config.model.vocab_size // (mesh.shape["tensor"] * mesh.shape["stage"])


@contextlib.contextmanager
def _named(setting: str, asked: str) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise InputError(f"config.kernels.{setting}={asked}: {error}") from error
