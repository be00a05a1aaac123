# SPDX-License-Identifier: Apache-2.0
"""Which experts each token is sent to, and what evens out their loads.

Everything is float32, and every mean is over the tokens of the whole microbatch: it is
the same on every mesh.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import sharding
from jaxllm.config import MoEConfig

Stats = dict[str, jax.Array]  # float32 [], of a layer or their mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """Where tokens go, best expert first."""

    choice_BTA: jax.Array  # int32: an expert, or num_experts for what is no token
    share_BTA: jax.Array  # float32: what that expert's output is multiplied by


def route(
    logits_BTR: jax.Array,
    bias_R: jax.Array | None,
    is_token_BT: jax.Array,
    config: MoEConfig,
    capacity: int | None,
) -> tuple[Routes, Stats]:
    """Picks the experts with the highest scores; of equal ones, the first.

    Args:
      logits_BTR: float32.
      bias_R: added to the scores for the choice alone: Wang et al., "Auxiliary-Loss-
        Free Load Balancing" (arXiv:2408.15664). With `balance="bias"` its gradient is
        not one of the loss: it is how much the load of each expert is above their mean.
        Otherwise it has none, and no update changes it.
      is_token_BT: false for padding, which has no experts and counts nowhere.
      config: the settings.
      capacity: tokens of a row that an expert takes; for the statistics.

    Returns:
      The routes, and statistics: `penalty` is to be added to the mean loss of the
      tokens. `router_balance_loss` and `router_load`, the largest load over the mean
      one, are 1 where all loads are equal; `router_entropy` is from 0 to 1;
      `router_dropped`, with a capacity, is a share of all pairs of token and expert.
    """
    is_softmax = config.router == "softmax"
    # Of scores that are 0 in float32 the logarithms are not: whatever divides scores by
    # their sum takes a softmax of these instead.
    log_BTR = logits_BTR if is_softmax else jax.nn.log_sigmoid(logits_BTR)
    part_BTR = jax.nn.softmax(log_BTR)
    scores_BTR = part_BTR if is_softmax else jax.nn.sigmoid(logits_BTR)
    rank_BTR = scores_BTR if config.variant.groups > 1 else logits_BTR
    if bias_R is not None:
        rank_BTR = scores_BTR + bias_R[None, None]
    choice_BTA = _choose(rank_BTR, config)
    if config.renormalize:
        share_BTA = jax.nn.softmax(_read(log_BTR, choice_BTA))
    else:
        share_BTA = _read(scores_BTR, choice_BTA)
    if config.variant.route_scale != 1.0:
        share_BTA = share_BTA * config.variant.route_scale
    is_token_BT1 = is_token_BT[:, :, None]
    choice_BTA = jnp.where(is_token_BT1, choice_BTA, config.num_experts)
    share_BTA = jnp.where(is_token_BT1, share_BTA, 0.0)
    count_BR = _count(choice_BTA, config.num_experts)
    if bias_R is not None and config.balance == "bias":
        # Of this replica's tokens if `along` parts them: gradients are added up later.
        count_R = count_BR.sum(0)
        share_BTA = _pass_error_to(bias_R, count_R - count_R.mean(), share_BTA)
    stats = _statistics(logits_BTR, part_BTR, count_BR, is_token_BT, config, capacity)
    return Routes(choice_BTA, share_BTA), stats


def _choose(rank_BTR, config):
    def pick(rank_BTR):
        if config.variant.groups > 1:
            rank_BTR = _in_best_groups(rank_BTR, config)
        return jax.lax.top_k(rank_BTR, config.experts_per_token)[1]

    # Each device its own tokens: XLA would sort those of all of them.
    pick = sharding.local(pick, ("BTR",), "BTA")
    return pick(jax.lax.stop_gradient(rank_BTR))


def _in_best_groups(rank_BTR, config):
    """Returns -inf for experts outside of a token's best groups.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437), 2.1.2.
    """
    grouped = rank_BTR.reshape(*rank_BTR.shape[:2], config.variant.groups, -1)
    best = jax.lax.top_k(grouped, config.variant.group_best)[0].sum(-1)
    chosen = jax.lax.top_k(best, config.variant.groups_per_token)[1]
    is_chosen = jax.nn.one_hot(chosen, config.variant.groups, dtype=bool).any(-2)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(rank_BTR.shape)


def _read(values_BTR, choice_BTA):
    def read(values_BTR, choice_BTA):
        return jnp.take_along_axis(values_BTR, choice_BTA, -1)

    return sharding.local(read, ("BTR", "BTA"), "BTA")(values_BTR, choice_BTA)


def _count(choice_BTA, num_experts):
    """Returns how many tokens of each row chose each expert, float32 and exact."""

    def count(choice_BTA):
        rows_B11 = jnp.arange(choice_BTA.shape[0])[:, None, None]
        zeros = jnp.zeros((choice_BTA.shape[0], num_experts), jnp.int32)
        count_BR = zeros.at[rows_B11, choice_BTA].add(1, mode="drop")
        axes = sharding.axes_of("T")
        return jax.lax.psum(count_BR, axes) if axes else count_BR

    return sharding.local(count, ("BTA",), "BR")(choice_BTA).astype(jnp.float32)


def _statistics(logits_BTR, part_BTR, count_BR, is_token_BT, config, capacity):
    def total(x):
        return sharding.add_along("B", x)

    num_tokens = jnp.maximum(total(is_token_BT.sum().astype(jnp.float32)), 1.0)

    def mean(x):
        is_token = is_token_BT.reshape(is_token_BT.shape + (1,) * (x.ndim - 2))
        return total(jnp.where(is_token, x, 0.0).sum((0, 1))) / num_tokens

    num_pairs = num_tokens * config.experts_per_token
    load_R = total(count_BR.sum(0)) * (config.num_experts / num_pairs)
    # Fedus et al., "Switch Transformers" (arXiv:2101.03961), equation 4, for any number
    # of experts a token.
    balance_loss = (load_R * mean(part_BTR)).sum()
    penalty = jnp.zeros((), jnp.float32)
    if config.balance == "loss":
        penalty += config.balance_weight * balance_loss
    if config.router_z_loss:
        # Zoph et al., "ST-MoE" (arXiv:2202.08906), equation 5.
        z_loss = mean(jax.nn.logsumexp(logits_BTR, -1) ** 2)
        penalty += config.router_z_loss * z_loss
    even = math.log(config.num_experts) or 1.0  # the entropy of one expert is 0
    stats = {
        "router_balance_loss": balance_loss,
        "router_load": load_R.max(),
        "router_entropy": mean(jax.scipy.special.entr(part_BTR).sum(-1)) / even,
    }
    if capacity is not None:
        dropped = total(jnp.maximum(count_BR - capacity, 0.0).sum())
        stats["router_dropped"] = dropped / num_pairs
    return {"penalty": penalty, **jax.lax.stop_gradient(stats)}


@jax.custom_vjp
def _pass_error_to(bias_R, error_R, x):
    """Returns x; error_R goes to bias_R in the place of a gradient."""
    del bias_R, error_R
    return x


def _forward(bias_R, error_R, x):
    del bias_R
    return x, error_R


def _backward(error_R, dx):
    return error_R, jnp.zeros_like(error_R), dx


_pass_error_to.defvjp(_forward, _backward)
