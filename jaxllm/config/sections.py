# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, with its meaning, its default and its checks.

One frozen dataclass per consumer; model.py has the sections of the model. A class
checks its own fields when it is created; `Config` checks rules between sections. The
comment of a field is its text in `--help` and docs/settings.md: a phrase that stands
alone. Standard library only: a config is read and refused without importing JAX.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from jaxllm.config.checks import (
    LARGEST_FLOAT,
    LARGEST_INT,
    SMALLEST_FLOAT,
    check_at_most,
    check_not_negative,
    check_positive,
    neighbours,
)
from jaxllm.config.model import ModelConfig
from jaxllm.errors import InputError
from jaxllm.files import local_path

Packing = Literal["concat", "best_fit"]
RawDtype = Literal["auto", "uint16", "uint32"]
Kernel = Literal["auto", "mosaic", "xla"]
AttentionKernel = Literal["auto", "mosaic", "cudnn", "xla"]
Exchange = Literal["all_gather", "ring"]
Optimizer = Literal["adamw", "muon", "adafactor", "lion", "sgd"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Policy = Literal["stop", "skip", "rewind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out tokens, and how documents are packed into rows."""

    paths: tuple[str, ...]  # training data: folders of jaxllm.tokenize, or .bin files
    weights: tuple[float, ...] = ()  # share of rows from each path; (): by its size
    eval_paths: tuple[str, ...] = ()  # held-out data; (): the held-out part of paths
    sequence_length: int  # tokens per row, which is the context length
    batch_size: int  # rows per step (global batch): over all devices and microbatches
    packing: Packing = "concat"  # concat splits documents at row ends, best_fit pads
    cross_document_attention: bool = False  # attend to earlier documents of the row
    end_of_document: int | None = None  # token between documents, where .bin list none
    raw_dtype: RawDtype = "auto"  # numbers of .bin without header; auto: uint16
    shuffle: bool = True  # new order of the rows in each epoch; false: read in order
    prefetch: int = 4  # batches that a host thread puts on the devices ahead of time

    def __post_init__(self):
        check_positive(self, "data", "batch_size prefetch")
        if self.sequence_length < 2:
            raise InputError(
                f"config.data.sequence_length={self.sequence_length} must be at least "
                "2, because attention has nothing to attend to in a row of one token."
            )
        # RoPE turns by positions in float32, which has no odd numbers beyond.
        check_at_most(self, "data", sequence_length=2**24)
        if self.sequence_length * self.batch_size > LARGEST_INT:
            raise InputError(
                f"config.data.batch_size={self.batch_size} times "
                f"config.data.sequence_length={self.sequence_length} makes "
                f"{self.sequence_length * self.batch_size} tokens a step, of at most "
                f"{LARGEST_INT}, the largest int32; lower one of them."
            )
        if not self.paths:
            raise InputError(
                "config.data.paths=() names no training data; make a token "
                "folder with `python -m jaxllm.tokenize`, and give its path."
            )
        for name in ("paths", "eval_paths"):
            paths = getattr(self, name)
            for path in paths:
                local_path(f"config.data.{name}", path)
            if twice := [path for path in paths if paths.count(path) > 1]:
                raise InputError(
                    f"config.data.{name} names {twice[0]} more than once; name it "
                    "once: config.data.weights gives a path more weight in training."
                )
        if self.end_of_document is not None:
            check_not_negative(self, "data", "end_of_document")
        if self.weights and len(self.weights) != len(self.paths):
            raise InputError(
                f"config.data.weights={self.weights} must have one number for each of "
                f"the {len(self.paths)} config.data.paths, or be () for shares by size."
            )
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise InputError(
                f"config.data.weights={self.weights} must all be above 0; remove a "
                "path from config.data.paths to leave its data out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all remaining devices."""

    data: int = 1  # data parallelism: replicas of all parameters; shards of the batch
    fsdp: int = -1  # FSDP (ZeRO-3): shards of parameters, optimizer state and batch
    tensor: int = 1  # tensor and sequence parallelism: shards of heads, MLP, vocabulary
    expert: int = 1  # expert parallelism: shards of experts; like fsdp for all else
    context: int = 1  # context parallelism: shards of each row; see kernels.context
    stage: int = 1  # pipeline parallelism: stages of layers; needs microbatches
    stage_rounds: int = 1  # layer groups per stage; more: smaller bubble, more traffic

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis."""
        sizes = dataclasses.asdict(self)
        del sizes["stage_rounds"]
        return sizes

    def __post_init__(self):
        sizes = self.sizes
        for axis, size in sizes.items():
            if not 1 <= size <= LARGEST_INT and size != -1:
                raise InputError(
                    f"config.mesh.{axis}={size} must be a number of devices above 0, "
                    "or -1 for all devices that the other axes leave."
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
    """Implementation of each operation; auto takes the best that can compute it."""

    attention: AttentionKernel = "auto"  # implementation of attention; mosaic: Hopper
    norm: Kernel = "auto"  # implementation of RMSNorm and LayerNorm
    cross_entropy: Kernel = "auto"  # implementation of loss and output projection
    deterministic: bool = True  # deterministic attention gradients; false: faster
    self_check: bool = True  # compare each kernel with plain JAX before training starts
    grouped_matmul: Kernel = "auto"  # implementation of the experts' grouped matmul
    context: Exchange = "all_gather"  # how context parallelism exchanges keys, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Next-token cross-entropy, averaged over the tokens of the whole batch."""

    z_loss: float = 0.0  # weight of the squared log of the softmax denominator
    chunk_tokens: int = 1024  # tokens per device whose logits are in memory at once

    def __post_init__(self):
        check_positive(self, "loss", "chunk_tokens")
        check_not_negative(self, "loss", "z_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update rule, learning-rate schedule and gradient accumulation."""

    name: Optimizer = "adamw"  # update rule
    lr: float  # peak learning rate
    schedule: Schedule = "cosine"  # learning rate after warm-up; wsd: flat, then decay
    warmup_steps: int = 0  # steps of linear warm-up; the first has lr / warmup_steps
    decay_fraction: float = 0.2  # wsd only: last share of the steps, in which lr decays
    final_lr_fraction: float = 0.1  # last learning rate, as a fraction of lr
    weight_decay: float = 0.0  # decoupled decay of matrices, embeddings; no others
    b1: float = 0.9  # decay of the first moment; momentum of muon, sgd; not adafactor
    b2: float = 0.95  # decay of the second moment; not adafactor, sgd, muon's matrices
    eps: float = 1e-8  # added to the root of the second moment; not in lion, sgd
    clip_norm: float | None = 1.0  # global norm that gradients are clipped to, or None
    microbatches: int = 1  # gradient accumulation: parts of a batch, one update

    def __post_init__(self):
        check_positive(self, "optimizer", "lr eps clip_norm microbatches")
        check_not_negative(self, "optimizer", "warmup_steps weight_decay")
        check_at_most(self, "optimizer", microbatches=2**16)
        for name in ("b1", "b2"):
            # From 1 - 2**-25 on it is 1 as float32, and nothing new would count.
            if not 0 <= getattr(self, name) < 1 - 2**-25:
                raise InputError(
                    f"config.optimizer.{name}={getattr(self, name)} must be at least 0 "
                    "and, as float32, below 1, usually 0.9 to 0.999."
                )
        if self.name == "adafactor" and self.eps**2 < SMALLEST_FLOAT:
            raise InputError(
                f"config.optimizer.eps={self.eps} must be at least "
                f"{SMALLEST_FLOAT**0.5:.3g} with config.optimizer.name=adafactor, "
                "which adds its square: anything smaller is 0 as float32."
            )
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"config.optimizer.{name}={getattr(self, name)} must be from 0 to "
                    "1."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation: how often, and on how much held-out data."""

    every: int = 500  # steps between evaluations; 0: none, not even at the end
    batches: int = 16  # batches per evaluation, always the same ones; 0: all of them

    def __post_init__(self):
        check_not_negative(self, "eval", "every batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints: how often, and which are kept; the last step always is."""

    every: int = 500  # steps between checkpoints; the last step always has one
    keep_latest: int = 2  # number of newest checkpoints to keep
    keep_every: int = 0  # also keep checkpoints at multiples of this step; 0: none
    keep_best: bool = False  # save where the evaluation loss is the lowest; keep that

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
    """Reaction to a non-finite loss or gradient, or to a spike of one."""

    policy: Policy = "stop"  # stop the run, skip the update, or rewind past the batch
    budget: int = 10  # anomalies handled per 1000 steps; one more stops the run
    spike_factor: float | None = None  # loss spike: multiple of the median; None: off

    def __post_init__(self):
        check_positive(self, "anomaly", "budget")
        if self.spike_factor is not None and not 1 < self.spike_factor <= LARGEST_FLOAT:
            raise InputError(
                f"config.anomaly.spike_factor={self.spike_factor} must be above 1, "
                "usually 2 to 10, or None."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Time limits of a run with several processes, and of its watchdog."""

    start_timeout_s: int = 300  # seconds to wait for all processes to start
    heartbeat_timeout_s: int = 60  # seconds of silence until a process counts as dead
    stall_timeout_s: int = 300  # least time limit of any phase, in seconds; 0: none

    def __post_init__(self):
        check_not_negative(self, "distributed", "stall_timeout_s")
        check_positive(self, "distributed", "start_timeout_s heartbeat_timeout_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """How often metrics are logged, and where besides metrics.jsonl."""

    every: int = 10  # steps between logged steps
    tensorboard: bool = True  # also write the metrics to <workdir>/tensorboard
    wandb_project: str | None = None  # Weights & Biases project; needs jaxllm[wandb]

    def __post_init__(self):
        check_positive(self, "logging", "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A complete run: its length, its seed and all sections."""

    steps: int  # training steps: updates of the parameters
    seed: int = 0  # seed of the initial parameters and of the data order
    init_from: str | None = None  # model to start from: a transformers folder, or a run
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
        if not 1 <= self.steps <= LARGEST_INT:
            raise InputError(
                f"config.steps={self.steps} must be from 1 to {LARGEST_INT}, the "
                "largest int32."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"config.seed={self.seed} must be from 0 to 2**32 - 1.")
        self._check_weights()
        self._check_chunks()
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
        if self.checkpoint.keep_best and not self.eval.every:
            raise InputError(
                "config.checkpoint.keep_best=True needs evaluations, but "
                "config.eval.every=0; set it, or config.checkpoint.keep_best=False."
            )
        if self.mesh.expert != 1 and not self.model.moe.num_experts:
            raise InputError(
                f"config.mesh.expert={self.mesh.expert} needs experts, but "
                "config.model.moe.num_experts=0; use config.mesh.fsdp, which shards "
                "the batch and the weights in the same way."
            )
        if self.mesh.context != 1 and self.model.moe.capacity_factor is not None:
            raise InputError(
                f"config.mesh.context={self.mesh.context} shards rows, whose tokens "
                "config.model.moe.capacity_factor="
                f"{self.model.moe.capacity_factor} counts; use "
                "config.model.moe.capacity_factor=None, or config.mesh.context=1."
            )

    def _check_chunks(self):
        chunk = self.model.variant.attention_chunk
        if chunk and self.data.cross_document_attention:
            raise InputError(
                f"config.model.variant.attention_chunk={chunk} begins with each "
                "document, which config.data.cross_document_attention=True does not "
                "tell apart; use config.data.cross_document_attention=False."
            )

    def _check_weights(self):
        """Refuses shares of which some path gives no row in the whole run."""
        rows = self.steps * self.data.batch_size
        shares = [Fraction(weight) for weight in self.data.weights]
        for path, share in zip(self.data.paths, shares, strict=False):
            if share * rows < sum(shares):
                raise InputError(
                    f"config.data.weights={self.data.weights} leaves no row of {path} "
                    f"among the {rows} of the run; raise its weight, or remove it from "
                    "config.data.paths."
                )
