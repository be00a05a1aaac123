# SPDX-License-Identifier: Apache-2.0
"""The settings of a mixture of experts, with their checks. Standard library only."""

import dataclasses
from typing import Literal

from jaxllm.config.checks import (
    MAX_COUNT,
    MAX_WIDTH,
    check_at_most,
    check_not_negative,
    check_positive,
    divisors,
)
from jaxllm.errors import InputError

Balance = Literal["none", "loss", "bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEVariantConfig:
    """Parts of published mixtures beyond the plain one."""

    first_dense: int = 0  # leading layers that have an MLP of width d_ff, no experts
    layers: tuple[bool, ...] = (True,)  # whether each layer has experts, cyclic
    d_ff_shared: int = 0  # hidden width of a shared expert; 0: that of an expert
    shared_gate: bool = False  # multiply shared experts by a sigmoid gate of the token
    share_of: Literal["output", "input"] = "output"  # side of experts that scores scale
    route_scale: float = 1.0  # multiplies the scores of a token's experts
    groups: int = 1  # groups of experts, some of which each token chooses from
    groups_per_token: int = 1  # groups with the best experts, for each token
    group_best: int = 2  # experts of a group whose scores, added up, rank it
    choice_bias: bool = False  # bias of scores for the choice, from a file, not trained

    def __post_init__(self):
        check_positive(
            self, "model.moe.variant", "route_scale groups groups_per_token group_best"
        )
        check_not_negative(self, "model.moe.variant", "first_dense d_ff_shared")
        check_at_most(self, "model.moe.variant", d_ff_shared=MAX_WIDTH)
        if not any(self.layers):
            raise InputError(
                f"config.model.moe.variant.layers={self.layers} gives no layer "
                "experts; use (True,) for all layers, or "
                "config.model.moe.num_experts=0."
            )
        if self.groups_per_token > self.groups:
            raise InputError(
                f"config.model.moe.variant.groups_per_token={self.groups_per_token} "
                f"must not be above config.model.moe.variant.groups={self.groups}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of every layer's MLP, if num_experts is above 0."""

    num_experts: int = 0  # experts per layer, instead of one MLP; 0: a dense model
    experts_per_token: int = 1  # top-k: experts that each token is routed to
    d_ff_expert: int = 0  # hidden width of an expert; 0: the same as d_ff
    num_shared_experts: int = 0  # further experts that every token passes through
    router: Literal["softmax", "sigmoid"] = "softmax"  # turns router logits into scores
    renormalize: bool = False  # divide the scores of a token's experts by their sum
    balance: Balance = "none"  # load balancing: an auxiliary loss, or router biases
    balance_weight: float = 0.01  # weight of the balance loss; step size of the biases
    router_z_loss: float = 0.0  # weight of the squared log of the router's denominator
    capacity_factor: float | None = None  # expert capacity / even load; None: dropless
    variant: MoEVariantConfig = dataclasses.field(
        default_factory=MoEVariantConfig
    )  # parts of published mixtures of experts

    def __post_init__(self):
        check_positive(self, "model.moe", "experts_per_token capacity_factor")
        check_not_negative(
            self,
            "model.moe",
            "num_experts d_ff_expert num_shared_experts balance_weight router_z_loss",
        )
        check_at_most(
            self,
            "model.moe",
            num_experts=MAX_COUNT,
            num_shared_experts=MAX_COUNT,
            d_ff_expert=MAX_WIDTH,
        )
        if not self.num_experts:
            self._check_dense()
            return
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"config.model.moe.experts_per_token={self.experts_per_token} must not "
                f"be above config.model.moe.num_experts={self.num_experts}."
            )
        if self.renormalize and self.experts_per_token == 1:
            raise InputError(
                "config.model.moe.renormalize=True makes every score 1 with "
                "config.model.moe.experts_per_token=1, and the router would learn "
                "nothing; use config.model.moe.renormalize=False or more experts."
            )
        if self.router_z_loss and self.router == "sigmoid":
            raise InputError(
                f"config.model.moe.router_z_loss={self.router_z_loss} needs the "
                "denominator of a softmax; use config.model.moe.router=softmax or 0."
            )
        for name in ("d_ff_shared", "shared_gate"):
            if (value := getattr(self.variant, name)) and not self.num_shared_experts:
                raise InputError(
                    f"config.model.moe.variant.{name}={value} needs shared experts, "
                    "but config.model.moe.num_shared_experts=0; set it."
                )
        if self.variant.groups > 1:
            self._check_groups()

    def _check_groups(self):
        variant, name = self.variant, "config.model.moe.variant"
        if self.num_experts % variant.groups:
            raise InputError(
                f"{name}.groups={variant.groups} must divide "
                f"config.model.moe.num_experts={self.num_experts}; use one of "
                f"{divisors(self.num_experts)}."
            )
        size = self.num_experts // variant.groups
        if variant.group_best > size:
            raise InputError(
                f"{name}.group_best={variant.group_best} must not be above the {size} "
                "experts of a group."
            )
        if self.experts_per_token > variant.groups_per_token * size:
            raise InputError(
                f"config.model.moe.experts_per_token={self.experts_per_token} must not "
                f"be above the {variant.groups_per_token * size} experts of "
                f"{name}.groups_per_token={variant.groups_per_token}."
            )

    @property
    def has_choice_bias(self) -> bool:
        """Whether routers have biases for the choice of experts, trained or not."""
        return self.variant.choice_bias or self.balance == "bias"

    def _check_dense(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            unset = MoEVariantConfig() if field.name == "variant" else field.default
            if value != unset:
                raise InputError(
                    f"config.model.moe.{field.name}={value} needs experts, but "
                    "config.model.moe.num_experts=0 makes every layer dense; set it."
                )
