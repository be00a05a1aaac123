# SPDX-License-Identifier: Apache-2.0
"""An imported model as the directory of a run, which the other commands read."""

import json
from pathlib import Path
from typing import Any

import jax

import sharding
from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import CheckpointConfig, Config, DataConfig, OptimizerConfig
from jaxllm.config.saved import write_config
from jaxllm.data.manifest import TOKENIZER as TOKENIZER_FILE
from jaxllm.errors import InputError
from jaxllm.hf.carried import carry, read_carried
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.loading import read_params
from jaxllm.text.tokenizers import HFTokenizer, load_tokenizer

TOKENIZER = "tokenizer"  # in the directory of a run
IMPORTED = "imported"  # key of a checkpoint's data: the family
STARTS = "starts"  # another: tokens that its tokenizer begins a text with
_ROW = 4096  # tokens of a row, at most, until a config says otherwise


def import_folder(
    source: Path, workdir: Path, mesh_sizes: dict[str, int]
) -> tuple[Config, str]:
    """Writes a model of transformers as step 0 of a run.

    Args:
      source: its folder.
      workdir: a directory that does not exist, or is empty.
      mesh_sizes: devices by axis, over which the parameters are sharded meanwhile.

    Returns:
      the config that is written: of the model, with a minimum of the rest; and which
      model it is.

    Raises:
      InputError: the folder is not whole, or cannot be honoured; nothing is written.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} is not empty; give a new directory.")
    with Folder(source) as folder:
        model, _ = check(folder)
        mesh = sharding.make_mesh(mesh_sizes)
        plan = sharding.plan(model.abstract, model.letters, mesh)
        target = jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place),
            model.abstract,
            plan.shardings(model.abstract),
        )
        config = _config(folder)
        params = read_params(folder, target)
        workdir.mkdir(parents=True, exist_ok=True)
        carry(folder, workdir)
        starts = _keep_tokenizer(folder, workdir)
    with Checkpoints(workdir / CHECKPOINTS, CheckpointConfig()) as checkpoints:
        data = {IMPORTED: folder.model_type, STARTS: starts}
        checkpoints.save(0, {"params": params}, data)
    write_config(workdir, config)
    return config, folder.describe()


def _config(folder: Folder) -> Config:
    length = folder.content.get("max_position_embeddings") or _ROW
    return Config(
        steps=1,
        model=folder.config,
        data=DataConfig(
            paths=("tokens",), sequence_length=min(length, _ROW), batch_size=1
        ),
        optimizer=OptimizerConfig(lr=1e-5),
    )


def _keep_tokenizer(folder: Folder, workdir: Path) -> list[int]:
    """Keeps tokenizer.json where the commands look for the tokenizer of a run.

    Returns:
      the token that it begins a text with, if any.
    """
    source = folder.path / TOKENIZER_FILE
    if not source.is_file():
        return []
    tokenizer = load_tokenizer(str(source))
    assert isinstance(tokenizer, HFTokenizer), "a file is one"
    (workdir / TOKENIZER).mkdir()
    (workdir / TOKENIZER / TOKENIZER_FILE).write_bytes(source.read_bytes())
    ends = read_carried(workdir).end_tokens
    facts: dict[str, Any] = {"kind": "hf", "end_of_document": ends[0] if ends else None}
    (workdir / TOKENIZER / "facts.json").write_text(json.dumps(facts))
    return tokenizer.backend.encode("", add_special_tokens=True).ids[:1]
