# SPDX-License-Identifier: Apache-2.0
"""Which kernels a run uses on its mesh, and whether they work on its devices.

`ASKS` is all that a config asks of a kernel: a new operation is a line more.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxllm.config import Config, ModelConfig
from jaxllm.errors import InputError
from jaxllm.models.moe.experts import ROWS_MULTIPLE
from pallas_kernels import self_check
from pallas_kernels.choice import Choice

Mesh = jax.sharding.Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a config asks of one operation, in one kind of call."""

    setting: str  # field of config.kernels, which names the implementation
    label: str  # of the calls, for a log
    choose: Callable[[Config, Mesh], Choice]  # under the mesh
    check: Callable[[str, Config, Mesh], None]  # an implementation, on one device
    is_asked: Callable[[ModelConfig], bool] = lambda model: True


def choose_kernels(config: Config, mesh: Mesh) -> dict[Ask, Choice]:
    """Returns the implementation of each operation of a config, and the reason.

    Raises:
      InputError: the one that was named cannot do what was asked of it.
    """
    chosen = {}
    for ask in ASKS:
        if ask.is_asked(config.model):
            with jax.set_mesh(mesh), _named(config, ask.setting):
                chosen[ask] = ask.choose(config, mesh)
    return chosen


def check_kernels(config: Config, mesh: Mesh) -> None:
    """Compares each kernel that a run will use with plain JAX, on one device.

    Raises:
      KernelMismatch: the first that differs.
    """
    with jax.default_device(mesh.local_devices[0]):
        for ask, choice in choose_kernels(config, mesh).items():
            if choice.implementation != "xla":
                ask.check(choice.implementation, config, mesh)


def _choose_attention(config: Config, mesh: Mesh) -> Choice:
    model = config.model
    # Where rows are cut, sinks are added to what the kernels give.
    sinks = model.variant.attention_sinks and mesh.shape["context"] == 1
    length = config.data.sequence_length // mesh.shape["context"]
    integers_BT = _shape(1, length, dtype="int32")
    return pallas_kernels.choose_attention(
        _shape(1, length, model.num_heads, model.head_dim, dtype=model.dtype),
        _shape(1, length, model.num_kv_heads, model.head_dim, dtype=model.dtype),
        segments_BT=None if config.data.cross_document_attention else integers_BT,
        start_BT=integers_BT if mesh.shape["context"] > 1 else None,
        window=max(model.windows),
        softcap=model.attention_softcap,
        sinks_N=_shape(model.num_heads, dtype="float32") if sinks else None,
        deterministic=config.kernels.deterministic,
        implementation=config.kernels.attention,
    )


def _check_attention(implementation: str, config: Config, mesh: Mesh) -> None:
    model = config.model
    self_check.check_attention(
        implementation,
        model.dtype,
        num_groups=model.num_heads // model.num_kv_heads,
        head_dim=model.head_dim,
        packed=not config.data.cross_document_attention,
        window=max(model.windows),
        softcap=model.attention_softcap,
        deterministic=config.kernels.deterministic,
    )


def _choose_norm(config: Config, mesh: Mesh) -> Choice:
    row_D = _shape(config.model.d_model, dtype=config.model.dtype)
    return pallas_kernels.choose_norm(
        row_D, residual=row_D, implementation=config.kernels.norm
    )


def _check_norm(implementation: str, config: Config, mesh: Mesh) -> None:
    model = config.model
    self_check.check_norm(
        implementation, model.dtype, kind=model.norm, width=model.d_model
    )


def _choose_head_norm(config: Config, mesh: Mesh) -> Choice:
    row_H = _shape(config.model.head_dim, dtype=config.model.dtype)
    return pallas_kernels.choose_norm(row_H, implementation=config.kernels.norm)


def _check_head_norm(implementation: str, config: Config, mesh: Mesh) -> None:
    model = config.model
    self_check.check_norm(
        implementation, model.dtype, kind="rmsnorm", width=model.head_dim
    )


def _choose_cross_entropy(config: Config, mesh: Mesh) -> Choice:
    model = config.model
    sizes = {"D": model.d_model, "V": _words_of_a_device(config, mesh)}
    letters = _output_letters(model)
    return pallas_kernels.choose_cross_entropy(
        _shape(config.loss.chunk_tokens, model.d_model, dtype=model.dtype),
        _shape(*(sizes[letter] for letter in letters), dtype=model.dtype),
        letters=letters,
        implementation=config.kernels.cross_entropy,
    )


def _check_cross_entropy(implementation: str, config: Config, mesh: Mesh) -> None:
    model = config.model
    self_check.check_cross_entropy(
        implementation,
        model.dtype,
        width=model.d_model,
        num_words=_words_of_a_device(config, mesh),
        letters=_output_letters(model),
        softcap=model.logit_softcap,
        z_loss=config.loss.z_loss,
    )


def _choose_grouped_matmul(config: Config, mesh: Mesh) -> Choice:
    model = config.model
    num_experts = model.moe.num_experts // mesh.shape["expert"]
    num_columns = model.d_ff_expert // mesh.shape["tensor"]
    return pallas_kernels.choose_grouped_matmul(
        _shape(ROWS_MULTIPLE, model.d_model, dtype=model.dtype),
        _shape(num_experts, model.d_model, num_columns, dtype=model.dtype),
        implementation=config.kernels.grouped_matmul,
    )


def _check_grouped_matmul(implementation: str, config: Config, mesh: Mesh) -> None:
    model = config.model
    self_check.check_grouped_matmul(
        implementation,
        model.dtype,
        width=model.d_model,
        num_columns=model.d_ff_expert // mesh.shape["tensor"],
    )


ASKS = (
    Ask(
        setting="attention",
        label="attention",
        choose=_choose_attention,
        check=_check_attention,
    ),
    Ask(
        setting="norm",
        label="norm",
        choose=_choose_norm,
        check=_check_norm,
    ),
    Ask(
        setting="norm",
        label="norm of heads",
        choose=_choose_head_norm,
        check=_check_head_norm,
        is_asked=lambda model: (
            model.qk_norm and model.variant.qk_norm in ("heads", "rotated")
        ),
    ),
    Ask(
        setting="cross_entropy",
        label="cross_entropy",
        choose=_choose_cross_entropy,
        check=_check_cross_entropy,
    ),
    Ask(
        setting="grouped_matmul",
        label="grouped_matmul of experts",
        choose=_choose_grouped_matmul,
        check=_check_grouped_matmul,
        is_asked=lambda model: model.moe.num_experts > 0,
    ),
)


def _shape(*shape: int, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _output_letters(model: ModelConfig) -> str:
    return "VD" if model.tie_embeddings else "DV"


def _words_of_a_device(config: Config, mesh: Mesh) -> int:
    return config.model.vocab_size // (mesh.shape["tensor"] * mesh.shape["stage"])


@contextlib.contextmanager
def _named(config: Config, setting: str) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        asked = getattr(config.kernels, setting)
        raise InputError(f"config.kernels.{setting}={asked}: {error}") from error
