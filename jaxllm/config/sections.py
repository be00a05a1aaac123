# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, with its meaning, its default and its checks.

One frozen dataclass a consumer; those of the model are in model.py. A class
checks its own fields when it is made; `Config` checks what holds between sections.
Standard library only: a config can be read, written and refused without importing JAX.
"""

import dataclasses
import math
from typing import Literal

from jaxllm.config.checks import check_not_negative, check_positive, neighbours
from jaxllm.config.model import ModelConfig
from jaxllm.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are read, and how they become rows of a batch."""

    paths: tuple[str, ...]  # token folders (jaxllm.tokenize) or .bin files of others
    weights: tuple[float, ...] = ()  # share of rows drawn from each path; () is by size
    eval_paths: tuple[str, ...] = ()  # held-out tokens; () is that part of paths
    sequence_length: int  # tokens a row
    batch_size: int  # rows a step, over all devices and microbatches
    packing: Literal["concat", "best_fit"] = "concat"  # cut documents or fit them
    cross_document_attention: bool = False  # see earlier documents of the row
    shuffle: bool = True  # a new order of rows each epoch; false reads in order
    prefetch: int = 4  # batches made and placed ahead, by a thread on the host

    def __post_init__(self):
        check_positive(self, "data", "sequence_length batch_size prefetch")
        if not self.paths:
            raise InputError(
                "config.data.paths=() names no tokens; make some with "
                "`python -m jaxllm.tokenize` and give their folder."
            )
        if self.weights and len(self.weights) != len(self.paths):
            raise InputError(
                f"config.data.weights={self.weights} must have one number for each of "
                f"the {len(self.paths)} config.data.paths, or be () to draw by size."
            )
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise InputError(
                f"config.data.weights={self.weights} must all be above 0; leave a path "
                "out of config.data.paths to not draw from it."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, for all the others."""

    data: int = 1  # replicas: each has all parameters and its part of the batch
    fsdp: int = -1  # shards of parameters, optimizer state and batch
    tensor: int = 1  # shards of heads, MLP width, vocabulary; between them of rows
    expert: int = 1  # shards of experts, and of all else as fsdp
    context: int = 1  # parts of a row; its attention as config.kernels.context says
    stage: int = 1  # groups of layers; a pipeline for the microbatches of a step
    stage_rounds: int = 1  # groups a stage has; more wait less and exchange layers

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis."""
        sizes = dataclasses.asdict(self)
        del sizes["stage_rounds"]
        return sizes

    def __post_init__(self):
        sizes = self.sizes
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise InputError(
                    f"config.mesh.{axis}={size} must be a number of devices above 0, "
                    "or -1 for all that the other axes leave."
                )
        if list(sizes.values()).count(-1) > 1:
            raise InputError(
                f"config.mesh={sizes} may have -1 on one axis only; give the others "
                "their number of devices."
            )
        check_positive(self, "mesh", "stage_rounds")
        if self.stage == 1 and self.stage_rounds != 1:
            raise InputError(
                f"config.mesh.stage_rounds={self.stage_rounds} needs stages, but "
                "config.mesh.stage=1; use config.mesh.stage_rounds=1, or more stages."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation each operation uses; auto is the best that can do it."""

    attention: Literal["auto", "mosaic", "cudnn", "xla"] = "auto"  # mosaic: Hopper GPUs
    norm: Literal["auto", "mosaic", "xla"] = "auto"  # of every norm in the model
    cross_entropy: Literal["auto", "mosaic", "xla"] = "auto"  # with output projection
    deterministic: bool = True  # attention's gradients have the same bits every time
    self_check: bool = True  # compare kernels with plain JAX before training
    grouped_matmul: Literal["auto", "mosaic", "xla"] = "auto"  # of experts
    context: Literal["all_gather", "ring"] = "all_gather"  # how keys reach all queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Next-token cross-entropy."""

    z_loss: float = 0.0  # times the squared log of the softmax's denominator
    chunk_tokens: int = 1024  # tokens a device whose logits exist at one time

    def __post_init__(self):
        check_positive(self, "loss", "chunk_tokens")
        check_not_negative(self, "loss", "z_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and its learning rate over time."""

    name: Literal["adamw", "muon", "adafactor", "lion", "sgd"] = "adamw"  # update rule
    lr: float  # peak learning rate
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # after warm-up
    warmup_steps: int = 0  # steps of linear rise to lr; the first has lr / warmup_steps
    decay_fraction: float = 0.2  # wsd: the last part of all steps, in which lr falls
    final_lr_fraction: float = 0.1  # lr at the end, as a part of the peak
    weight_decay: float = 0.0  # decoupled; on matrices, never norms and biases
    b1: float = 0.9  # first moment; momentum of muon and sgd; not adafactor
    b2: float = 0.95  # second moment; not adafactor, sgd, muon's matrices
    eps: float = 1e-8  # added to the root of the second moment; not lion, sgd
    clip_norm: float | None = 1.0  # largest global norm of the gradient
    microbatches: int = 1  # parts of a batch whose gradients are added before an update

    def __post_init__(self):
        check_positive(self, "optimizer", "lr eps clip_norm microbatches")
        check_not_negative(self, "optimizer", "warmup_steps weight_decay")
        for name, top in dict(b1=1.0, b2=1.0).items():
            if not 0 <= getattr(self, name) < top:
                raise InputError(
                    f"config.optimizer.{name}={getattr(self, name)} must be at least 0 "
                    "and below 1, usually 0.9 to 0.999."
                )
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"config.optimizer.{name}={getattr(self, name)} must be from 0 to "
                    "1."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on how much held-out data the loss is measured."""

    every: int = 500  # steps between evaluations; 0 is never, not even at the end
    batches: int = 16  # batches an evaluation, always the same ones; 0 is all

    def __post_init__(self):
        check_not_negative(self, "eval", "every batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved and which saves are kept; the last step always is."""

    every: int = 500  # steps between saves
    keep_latest: int = 2  # newest saves kept
    keep_every: int = 0  # also keep the saves at multiples of this step; 0 is none
    keep_best: bool = False  # also keep the save with the lowest eval loss

    def __post_init__(self):
        check_positive(self, "checkpoint", "every keep_latest")
        check_not_negative(self, "checkpoint", "keep_every")
        if self.keep_every % self.every:
            raise InputError(
                f"config.checkpoint.keep_every={self.keep_every} must be a multiple of "
                f"config.checkpoint.every={self.every}, or 0; use "
                f"{neighbours(self.keep_every, self.every)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """What happens at a loss or gradient that is not finite, or far above the usual."""

    policy: Literal["stop", "skip", "rewind"] = "stop"  # or leave update or batch out
    budget: int = 10  # left out in any 1000 steps; one more stops the run
    spike_factor: float | None = None  # times the running median is too much; or none

    def __post_init__(self):
        check_positive(self, "anomaly", "budget")
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise InputError(
                f"config.anomaly.spike_factor={self.spike_factor} must be above 1, "
                "usually 2 to 10, or None."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How long the processes of a run wait for each other."""

    start_timeout_s: int = 300  # until all have started
    heartbeat_timeout_s: int = 60  # without a sign of life, until a process is dead
    stall_timeout_s: int = 300  # limit of a step that is usually faster; 0 is none

    def __post_init__(self):
        check_not_negative(self, "distributed", "stall_timeout_s")
        check_positive(self, "distributed", "start_timeout_s heartbeat_timeout_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    every: int = 10  # steps between logged steps
    tensorboard: bool = True  # the same scalars under <workdir>/tensorboard
    wandb_project: str | None = None  # Weights & Biases project; needs jaxllm[wandb]

    def __post_init__(self):
        check_positive(self, "logging", "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A complete run."""

    steps: int  # updates of the parameters
    seed: int = 0  # of the initial parameters and of the order of the data
    model: ModelConfig
    data: DataConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    kernels: KernelsConfig = dataclasses.field(default_factory=KernelsConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    anomaly: AnomalyConfig = dataclasses.field(default_factory=AnomalyConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    distributed: DistributedConfig = dataclasses.field(
        default_factory=DistributedConfig
    )

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"config.steps={self.steps} must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"config.seed={self.seed} must be from 0 to 2**32 - 1.")
        if self.optimizer.warmup_steps > self.steps:
            raise InputError(
                f"config.optimizer.warmup_steps={self.optimizer.warmup_steps} must not "
                f"be above config.steps={self.steps}."
            )
        decay_steps = round(self.optimizer.decay_fraction * self.steps)
        if (
            self.optimizer.schedule == "wsd"
            and self.optimizer.warmup_steps + decay_steps > self.steps
        ):
            raise InputError(
                f"config.optimizer.warmup_steps={self.optimizer.warmup_steps} and the "
                f"{decay_steps} steps of config.optimizer.decay_fraction="
                f"{self.optimizer.decay_fraction} must fit into config.steps="
                f"{self.steps}; lower one of them."
            )
        batch, parts = self.data.batch_size, self.optimizer.microbatches
        if batch % parts:
            raise InputError(
                f"config.data.batch_size={batch} must be a multiple of "
                f"config.optimizer.microbatches={parts}; use "
                f"{neighbours(batch, parts)}."
            )
        if self.mesh.expert != 1 and not self.model.moe.num_experts:
            raise InputError(
                f"config.mesh.expert={self.mesh.expert} needs experts, but "
                "config.model.moe.num_experts=0; use config.mesh.fsdp, which cuts the "
                "batch and the weights in the same way."
            )
        if self.mesh.context != 1 and self.model.moe.capacity_factor is not None:
            raise InputError(
                f"config.mesh.context={self.mesh.context} cuts rows, whose tokens "
                "config.model.moe.capacity_factor="
                f"{self.model.moe.capacity_factor} counts; use "
                "config.model.moe.capacity_factor=None, or config.mesh.context=1."
            )
