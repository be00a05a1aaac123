# SPDX-License-Identifier: Apache-2.0
"""What travels with a model: tokenizer, config.json, and the layout of its files."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.hf.folder import CONFIG, INDEX, Folder, check, read_header
from jaxllm.hf.settings import load_json
from jaxllm.hf.tensors import pieces

FOLDER = "hf"  # in the directory of a run
LAYOUT = "layout.json"
GENERATION = "generation_config.json"
# Carried byte for byte.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json", GENERATION),
)
TEMPLATES = "additional_chat_templates"


@dataclasses.dataclass(frozen=True)
class Carried:
    """What came with an imported model; nothing for a model of our own.

    Attributes:
      folder: with the files; None without any.
      config_text: the imported config.json.
      layout: the header of each safetensors file.
    """

    folder: Path | None = None
    config_text: str = ""
    layout: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The imported config.json, or {}."""
        return json.loads(self.config_text) if self.config_text else {}

    @property
    def model_type(self) -> str | None:
        """The imported family."""
        return self.config.get("model_type")

    @property
    def vocab_size(self) -> int | None:
        """The rows of the imported embedding."""
        return self.config.get("vocab_size")

    @property
    def dtype(self) -> str | None:
        """The dtype that the imported config.json names."""
        return self.config.get("dtype") or self.config.get("torch_dtype")

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text, of generation_config.json or config.json."""
        found = None
        if self.folder and (self.folder / GENERATION).exists():
            path = self.folder / GENERATION
            found = load_json(path).get("eos_token_id")
        found = self.config.get("eos_token_id") if found is None else found
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list) else (found,)

    def copy_to(self, folder: Path) -> None:
        """Copies the files, byte for byte, into a folder of transformers."""
        if self.folder is None:
            return
        copy_files(self.folder, folder)
        if (self.folder / INDEX).exists() and not (folder / INDEX).exists():
            shutil.copyfile(self.folder / INDEX, folder / INDEX)


def carry(source: Folder, workdir: Path) -> None:
    """Keeps in a run's directory what an export will need of a folder."""
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(source.path, folder)
    files = sorted(set(source.names.values()))
    layout = {file: read_header(source.path / file)[0] for file in files}
    if source.wrapper:
        # An export is of the text half alone, under its own names.
        (folder / CONFIG).write_text(json.dumps(source.content), encoding="utf-8")
        layout = _text_layout(source, layout)
    else:
        shutil.copyfile(source.path / CONFIG, folder / CONFIG)
        if (source.path / INDEX).exists():
            shutil.copyfile(source.path / INDEX, folder / INDEX)
    (folder / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")


def _text_layout(
    source: Folder, layout: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns headers without the other half's tensors, under the family's names."""
    model, rename = check(source)
    paths, found = model.letters, {}
    names = {p.name for path in paths for p in pieces(model, source.family, path)}
    for file, header in layout.items():
        kept, used = {}, 0
        for name in sorted(names):
            if entry := header.get(rename(name)):
                start, stop = entry["data_offsets"]
                place = [used, used + stop - start]
                kept[name] = {**entry, "data_offsets": place}
                used = place[1]
        if kept:
            kept["__metadata__"] = header.get("__metadata__", {"format": "pt"})
            found[file] = kept
    return found


def copy_carried(source: Path, workdir: Path) -> None:
    """Copies what a run carries into the directory of another."""
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, workdir / FOLDER, dirs_exist_ok=True)


def read_carried(workdir: Path) -> Carried:
    """Returns what a run carries since its import."""
    folder = workdir / FOLDER
    if not (folder / CONFIG).exists():
        return Carried()
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return Carried(folder, text, load_json(folder / LAYOUT))


def copy_files(source: Path, folder: Path) -> None:
    """Copies the tokenizer and the generation's settings; links are not followed."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / TEMPLATES).is_dir():
        for path in sorted((source / TEMPLATES).glob("*.jinja")):
            (folder / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / TEMPLATES / path.name)
