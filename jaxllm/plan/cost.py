# SPDX-License-Identifier: Apache-2.0
"""The cost of a run, before it starts: `--dry_run` and the first log lines."""

import dataclasses

from jaxllm.plan import budget
from jaxllm.plan.kernels import choose_kernels
from jaxllm.plan.room import bytes_of_a_device
from jaxllm.step import Setup


def full_report(setup: Setup) -> str:
    """Returns the table of parameters, then bytes a device and FLOPs."""
    return f"{setup.plan.table()}\n\n{cost_report(setup)}\n{choices(setup)}"


def cost_report(setup: Setup) -> str:
    """Returns bytes a device at rest and FLOPs a token, as lines of text.

    Activations are not in it: they depend on what XLA fuses.
    """
    config = setup.config
    state = setup.abstract_state
    tokens = config.data.batch_size * config.data.sequence_length
    flops = budget.flops_per_token(config.model, config.data.sequence_length)
    counts = budget.num_parameters(config.model)
    active = budget.num_active_parameters(config.model)
    lines = {
        "parameters": _mib(bytes_of_a_device(state.params)),
        "optimizer state": _mib(bytes_of_a_device(state.opt_state)),
        "gradients": _mib(bytes_of_a_device(state.params)),
        "batch": _mib(bytes_of_a_device(setup.abstract_batch)),
        "tokens a step": f"{tokens:,}",
        "tokens in all": f"{tokens * config.steps:,}",
        **({"a token uses": f"{active:,} parameters"} if active < counts else {}),
        **_pipeline(setup),
        "FLOPs a token": f"{flops:.3e}",
        "FLOPs a step": f"{flops * tokens:.3e}",
    }
    return "\n".join(f"{name:<16} {value}" for name, value in lines.items())


def choices(setup: Setup) -> str:
    """Returns which implementation each operation uses, and why.

    Raises:
      InputError: the one that was named cannot do what was asked of it.
    """
    asked = dataclasses.asdict(setup.config.kernels)
    return "\n".join(
        f"{ask.label}: {choice.implementation} ({asked[ask.setting]}: {choice.reason})"
        for ask, choice in choose_kernels(setup.config, setup.mesh).items()
    )


def _pipeline(setup: Setup) -> dict[str, str]:
    if (schedule := setup.schedule) is None:
        return {}
    return {
        "pipeline bubble": f"{schedule.bubble:.1%} of {schedule.num_ticks} ticks: "
        f"{schedule.num_stages} stages, {schedule.num_rounds} round(s), "
        f"{schedule.num_microbatches} microbatches"
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB a device"
