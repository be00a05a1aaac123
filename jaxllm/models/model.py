# SPDX-License-Identifier: Apache-2.0
"""A transformer split once into structure and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import KernelsConfig, ModelConfig
from jaxllm.models.transformer import Transformer

Params = dict[str, Any]


class Model:
    """The structure of a model, without its parameters.

    Attributes:
      config: what it was made from.
      abstract: the parameters as `jax.ShapeDtypeStruct`, nested dicts of string keys.
      letters: the letters of each parameter, by path ("blocks/0/attention/query").
    """

    def __init__(self, config: ModelConfig, kernels: KernelsConfig | None = None):
        self.config = config
        self._kernels = kernels or KernelsConfig()
        self._graphdef, self._state = nnx.split(
            nnx.eval_shape(lambda: self._make(jax.random.key(0)))
        )
        self.abstract: Params = nnx.to_pure_dict(self._state)
        self.letters: dict[str, str] = {
            "/".join(map(str, path)): variable.get_metadata("axes")
            for path, variable in nnx.to_flat_state(self._state)
        }

    def init(self, key: jax.Array) -> Params:
        """Returns new parameters; the same for a key on every mesh."""
        return nnx.to_pure_dict(nnx.split(self._make(key))[1])

    def bind(self, params: Params) -> Transformer:
        """Returns the module with these parameters, to be called inside a trace."""
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graphdef, state)

    def _make(self, key: jax.Array) -> Transformer:
        return Transformer(self.config, self._kernels, key)


def logits(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Returns float32 logits_BTV of whole rows, without a mesh.

    Args:
      config: of the model.
      params: its parameters, on one device.
      tokens_BT: int32; each row is one document, from its first token on, unless
        segments_BT says otherwise.
      segments_BT: int32; the tokens of a document have one number, in one piece, and
        those of padding, before or behind, have 0: a mask of 0 and 1 is one.
    """
    module = Model(config).bind(params)
    places_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = jnp.broadcast_to(places_T, tokens_BT.shape)
    if segments_BT is not None:
        before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        starts_BT = jnp.where(segments_BT != before_BT, positions_BT, 0)
        positions_BT = positions_BT - jax.lax.cummax(starts_BT, axis=1)
    return module.logits(module(tokens_BT, positions_BT, segments_BT)[0])
