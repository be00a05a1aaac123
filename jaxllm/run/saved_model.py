# SPDX-License-Identifier: Apache-2.0
"""The parameters and the tokenizer of a run, read from its directory."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxllm.checkpoint import Checkpoints
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.config import Config
from jaxllm.config.saved import read_values
from jaxllm.data.manifest import MANIFEST
from jaxllm.errors import CheckpointError, DamagedError, InputError
from jaxllm.files import local_path, parse_json, write_whole
from jaxllm.hf.importing import STARTS
from jaxllm.run.saves import describe_other_model
from jaxllm.run.workdir import TOKENIZER
from jaxllm.text.tokenizers import HFTokenizer, Tokenizer, load_tokenizer

Which = int | Literal["latest", "best"]


def load_params(
    workdir: Path, config: Config, which: Which, abstract_params: Any
) -> tuple[int, Any]:
    """Returns a saved step and its parameters, placed as abstract_params says.

    Raises:
      InputError: the run has no such step.
    """
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        step = checkpoints.named(which)
        values, data = read_values(workdir), checkpoints.data(step)
        if values and (change := describe_other_model(data, values)):
            raise InputError(
                f"{workdir}/config.json is not of the run that saved step {step}: "
                f"{change}. Put it back from a copy."
            )
        try:
            return step, checkpoints.restore_params(step, abstract_params)
        except DamagedError as error:
            others = [other for other in checkpoints.steps() if other != step]
            advice = f"Give --step, one of {others}." if others else "No other is left."
            raise CheckpointError(f"{error} {advice}") from error


def document_starts(workdir: Path, config: Config, which: Which) -> frozenset[int]:
    """Returns the tokens after which the first token of a document was trained.

    None where an earlier version trained the run, or its data has no such token.

    Raises:
      InputError: the run has no such step.
    """
    with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
        saved = checkpoints.data(checkpoints.named(which))
    if STARTS in saved:  # an imported model
        return frozenset(saved[STARTS])
    batches = saved.get("batches", {})
    if batches.get("order_version", 1) < 2:
        return frozenset()
    ends = batches.get("config.data.end_of_document", [])
    return frozenset(end for end in ends if end is not None)


def read_step(text: str) -> Which:
    """Returns what --step names: a number, `latest` or `best`."""
    if text == "latest" or text == "best":
        return text
    if not text.isdecimal():
        raise InputError(f"--step={text} must be a number, latest or best.")
    return int(text)


def save_tokenizer(paths: Sequence[str], workdir: Path):
    """Copies the tokenizer of the first token folder among paths into the run.

    A run is then whole without its data. Files of other tools have no tokenizer.
    """
    folder = next((p for p in paths if (Path(p) / MANIFEST).exists()), None)
    if folder is None:
        return
    tokenizer = load_tokenizer(folder)
    (workdir / TOKENIZER).mkdir(exist_ok=True)
    if isinstance(tokenizer, HFTokenizer):
        write_whole(workdir / TOKENIZER / "tokenizer.json", tokenizer.json)
    facts = {"kind": tokenizer.kind, "end_of_document": tokenizer.end_of_document}
    write_whole(workdir / TOKENIZER / "facts.json", json.dumps(facts).encode())


def has_tokenizer(workdir: Path) -> bool:
    """Returns whether a run knows the tokenizer of its data."""
    return (workdir / TOKENIZER / "facts.json").is_file()


def load_run_tokenizer(workdir: Path, given: str | None) -> Tokenizer:
    """Returns the tokenizer of a run's data, or the one given instead.

    Raises:
      InputError: neither is there.
    """
    if given is not None:
        return load_tokenizer(str(local_path("--tokenizer", given)))
    folder = workdir / TOKENIZER
    if not has_tokenizer(workdir):
        raise InputError(
            f"{workdir} has no tokenizer, because its data did not say which one made "
            "it; give --tokenizer, a tokenizer.json or `bytes`."
        )
    try:
        facts = parse_json((folder / "facts.json").read_bytes())
        kind, end_of_document = facts["kind"], facts["end_of_document"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'facts.json'} is damaged ({error}); give --tokenizer, a "
            "tokenizer.json or `bytes`, or start the run's training again."
        ) from error
    if kind == "bytes":
        return load_tokenizer("bytes")
    if not (folder / "tokenizer.json").is_file():  # a pipe would be waited for
        raise InputError(
            f"{folder / 'tokenizer.json'} is missing; give --tokenizer, a "
            "tokenizer.json, or start the run's training again."
        )
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    return dataclasses.replace(tokenizer, end_of_document=end_of_document)
