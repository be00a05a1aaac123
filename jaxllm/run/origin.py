# SPDX-License-Identifier: Apache-2.0
"""The model that a run starts from: none, a folder of transformers, another run."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import Config
from jaxllm.config.saved import FILE, read_config, read_values
from jaxllm.errors import InputError
from jaxllm.hf.carried import carry, copy_carried
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.loading import read_params
from jaxllm.hf.writing import differences
from jaxllm.step import Setup, TrainState, init_state, state_of


def check_origin(config: Config) -> None:
    """Checks that config.init_from is a model with the settings of this one.

    Raises:
      InputError: it cannot be read, or has other settings.
    """
    if config.init_from is None:
        return
    path = Path(config.init_from)
    if _is_run(path):
        found = read_config(path).model
    else:
        with Folder(path) as folder:
            check(folder)
            found = folder.config
    wanted = config.model
    if not _is_run(path) and wanted.vocab_size > found.vocab_size:
        # More rows, for a mesh to divide: they are zero, and cut off by an export.
        found = dataclasses.replace(found, vocab_size=wanted.vocab_size)
    if different := differences(wanted, found):
        raise InputError(
            f"config.init_from={path} is a model of other settings: "
            f"{'; '.join(different)}; take them from it by "
            "jaxllm.hf.model_config in the config file."
        )


def first_state(setup: Setup) -> TrainState:
    """Returns the state of step 0: random, or with the parameters of config.init_from.

    The optimizer's state is new.
    """
    config = setup.config
    if config.init_from is None:
        return init_state(setup)
    path, target = Path(config.init_from), setup.abstract_state.params
    if not _is_run(path):
        with Folder(path) as folder:
            return state_of(setup, read_params(folder, target))
    return state_of(setup, _params_of_run(path, read_config(path), target))


def keep_origin(config: Config, workdir: Path) -> None:
    """Keeps in a run's directory what an export will need of its origin."""
    if config.init_from is None:
        return
    path = Path(config.init_from)
    if _is_run(path):
        copy_carried(path, workdir)
        return
    with Folder(path) as folder:
        carry(folder, workdir)


def _params_of_run(workdir: Path, config: Config, target: Any) -> Any:
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        return checkpoints.restore_params(checkpoints.named("latest"), target)


def _is_run(path: Path) -> bool:
    if not (path / FILE).exists():
        return False
    return "steps" in (read_values(path) or {})
