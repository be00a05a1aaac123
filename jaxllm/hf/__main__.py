# SPDX-License-Identifier: Apache-2.0
"""Imports and exports models of Hugging Face's transformers.

python -m jaxllm.hf import FOLDER --workdir runs/x
python -m jaxllm.hf export --workdir runs/x --to FOLDER [--step best] [--dtype bfloat16]
python -m jaxllm.hf verify FOLDER [FOLDER ...] [--python PYTHON]
"""

from pathlib import Path
from typing import Literal

import jax
from absl import flags as absl_flags

import sharding
from jaxllm import flags
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.hf.carried import read_carried
from jaxllm.hf.export import export
from jaxllm.hf.folder import DTYPES
from jaxllm.hf.importing import import_folder
from jaxllm.hf.verify import verify
from jaxllm.models import Model

USAGE = "say `import FOLDER`, `export` or `verify FOLDER`; --help shows all of them."


def main(argv: list[str]) -> int:
    command, folders = argv[1:2], [Path(each) for each in argv[2:]]
    if command == ["import"] and len(folders) == 1:
        workdir = flags.workdir_from_flags()
        config, kind = import_folder(folders[0], workdir, {"fsdp": 1})
        print(f"{workdir}: {kind}, {config.model.num_layers} layers, step 0")
    elif command == ["export"] and not folders:
        print("\n".join(_export()))
    elif command == ["verify"] and folders:
        for folder in folders:
            print("\n".join(verify(folder, absl_flags.FLAGS.python)))
    else:
        raise InputError(USAGE)
    return flags.FINISHED


def _export() -> list[str]:
    values, workdir = absl_flags.FLAGS, flags.workdir_from_flags()
    if values.to is None:
        raise InputError("--to is missing; give a new folder for the model.")
    config = read_config(workdir)
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        step = checkpoints.named(_read_step(values.step))
        model = Model(config.model)
        mesh = sharding.make_mesh({"fsdp": 1}, jax.local_devices()[:1])
        plan = sharding.plan(model.abstract, model.letters, mesh)
        target = jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place),
            model.abstract,
            plan.shardings(model.abstract),
        )
        params = checkpoints.restore_params(step, target)
    files = export(
        config.model,
        params,
        Path(values.to),
        carried=read_carried(workdir),
        dtype=values.dtype,
        length=config.data.sequence_length,
    )
    return [f"{values.to}: step {step} of {workdir}", *(f"  {file}" for file in files)]


def _read_step(text: str) -> int | Literal["latest", "best"]:
    if text == "latest" or text == "best":
        return text
    if not text.isdecimal():
        raise InputError(f"--step={text} must be a number, latest or best.")
    return int(text)


def define_flags() -> None:
    """Defines the flags of the command."""
    absl_flags.DEFINE_string("workdir", None, "directory of the run")
    absl_flags.DEFINE_string("to", None, "new folder of the exported model")
    absl_flags.DEFINE_string(
        "step", "latest", "checkpoint to export: a step, latest or best"
    )
    absl_flags.DEFINE_string(
        "python",
        None,
        "a Python with torch and transformers, whose logits are compared with ours",
    )
    absl_flags.DEFINE_enum(
        "dtype",
        None,
        sorted(DTYPES.values()),
        "dtype of all tensors; by default as imported, or float32",
    )


if __name__ == "__main__":
    define_flags()
    flags.run(main, positionals=True)
