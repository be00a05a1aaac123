# SPDX-License-Identifier: Apache-2.0
"""What is wrong in a folder is named by `verify`, whatever it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf.cases import write_folder
from hf.faults import INDEX, SHARDS, WEIGHTS, put, settings, write, write_shards
from hf.test_commands import add_tokenizer
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jaxllm.errors import InputError
from jaxllm.hf.sums import SUMS, write_sums
from jaxllm.hf.verify import verify

FIRST, SECOND = SHARDS
NORM = "model.norm.weight"
UP, GATE = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of two shards with a tokenizer, and the hashes of all files."""
    folder = write_shards("llama_plain", tmp_path_factory.mktemp("whole") / "llama")
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ x }}")
    write_sums(folder, {})
    return folder


def shard_of(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit(name, action):
    """Changes a tensor in its shard; None removes it."""

    def change(folder: Path):
        path = folder / shard_of(folder, name)
        arrays = {n: x.copy() for n, x in load_file(path).items()}
        changed = action(arrays.pop(name))
        added = {} if changed is None else {name: changed}
        save_file({**arrays, **added}, path, metadata={"format": "pt"})

    return change


def fill(value):
    def action(tensor):
        tensor.flat[3] = value
        return tensor

    return action


def add(folder: Path):
    path = folder / FIRST
    save_file({**load_file(path), "extra": np.ones(2, np.float32)}, path)


def truncate(folder: Path):
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[: len(content) // 2])


def swap_shards(folder: Path):
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def swap_tensors(folder: Path):
    found = {n: load_file(folder / shard_of(folder, n))[n] for n in (UP, GATE)}
    edit(UP, lambda _: found[GATE])(folder)
    edit(GATE, lambda _: found[UP])(folder)


def index(name, file):
    def change(folder: Path):
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(content))

    return change


def name_twice(folder: Path):
    """The same tensor in both shards."""
    other = SECOND if shard_of(folder, NORM) == FIRST else FIRST
    arrays = load_file(folder / other)
    save_file({**arrays, NORM: np.ones(20, np.float32)}, folder / other)


def name_twice_in_one(folder: Path):
    """Two entries of a header have one name: JSON readers take the last."""
    path = folder / shard_of(folder, UP)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    entry = json.dumps({UP: header[UP]})[1:-1]
    text = content[8 : 8 + size].decode().rstrip().removesuffix("}") + f",{entry}}}"
    text += " " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text.encode()
    path.write_bytes(begin + content[8 + size :])


def remove(name):
    return lambda folder: (folder / name).unlink()


def add_token(folder: Path):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["new"] = 37
    path.write_text(json.dumps(content))


def drop_end(folder: Path):
    """Ends with an id that no token has."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"][" "]  # 3
    path.write_text(json.dumps(content))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')


FAULTS = {
    "a missing tensor": (edit(NORM, lambda _: None), f"{NORM} is in model-0"),
    "a surplus tensor": (add, "extra is not a parameter"),
    "a wrong shape": (
        edit(NORM, lambda _: np.ones(3, np.float32)),
        f"{NORM} has the shape [3]",
    ),
    "a transposed tensor": (
        edit(UP, lambda x: np.ascontiguousarray(x.T)),
        f"{UP} has the shape [20, 28]",
    ),
    "a dtype of no weight": (edit(UP, lambda x: x.astype(np.int8)), f"{UP} is I8"),
    "one NaN": (edit(UP, fill(np.nan)), f"not finite, first {UP}"),
    "one infinity": (edit(NORM, fill(np.inf)), f"not finite, first {NORM}"),
    "half a shard": (truncate, f"{SECOND} is not a safetensors file"),
    "no shard": (remove(FIRST), f"{FIRST} cannot be read"),
    "a page in place of a shard": (
        write(FIRST, b"<html>Not found</html>"),
        f"{FIRST} is not a safetensors file",
    ),
    "exchanged shards": (swap_shards, "is in model-0"),
    "an index with another shard": (index(NORM, "x.safetensors"), "x.safetensors"),
    "an index of a tensor that is not": (index("extra", FIRST), "extra is in"),
    "a tensor in both shards": (name_twice, f"both have {NORM}"),
    "a tensor twice in one shard": (name_twice_in_one, f"{UP} twice"),
    "a layer less in the settings": (settings(num_hidden_layers=2), "layers.2."),
    "a layer more in the settings": (settings(num_hidden_layers=4), "layers.3."),
    "more rows in the settings": (settings(vocab_size=48), "ask for [48, 20]"),
    "fewer heads in the settings": (settings(num_key_value_heads=1), "ask for [6, 20]"),
    "a token without a row": (add_token, "the token 'new' is 37"),
    "an end that is no token": (drop_end, "eos_token_id=3 is not among tokenizer"),
    "an end without a row": (settings(eos_token_id=99), "eos_token_id=99 is not among"),
    "a broken tokenizer": (write("tokenizer.json", b"{"), "tokenizer.json"),
    "broken settings of generation": (
        write("generation_config.json", b"{"),
        "generation_config.json is not JSON",
    ),
    "an edited tensor": (edit(UP, fill(0.5)), "has changed since"),
    "two exchanged tensors": (swap_tensors, "has changed since"),
    "an edited setting": (settings(rms_norm_eps=1e-4), "config.json has changed"),
    "an edited template": (
        write("chat_template.jinja", b"{{ y }}"),
        "chat_template.jinja has changed",
    ),
    "a lost template": (remove("chat_template.jinja"), "jinja is not there"),
    "hashes that are none": (write(SUMS, b"abc  config.json\n"), "is no hash"),
    "a hash of a file elsewhere": (
        write(SUMS, b"0" * 64 + b"  ../config.json\n"),
        "is not a file of this folder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault, whole, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(whole, folder)
    plant, said = FAULTS[fault]
    plant(folder)
    with pytest.raises(InputError) as error:
        verify(folder)
    assert said in str(error.value)
    assert str(folder) in str(error.value)


def test_a_whole_folder_is_verified_with_its_hashes(whole):
    (said,) = verify(whole)
    assert said.endswith("all finite; 7 files as in SHA256SUMS")


def test_an_added_token_without_a_row_is_said_and_is_no_fault(whole, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(whole, folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(
        [*(f"<{number}>" for number in range(31, 37)), "<image>"]
    )
    tokenizer.save(str(path))
    write_sums(folder, {})
    (said,) = verify(folder)
    assert "; no row for the added tokens <image>;" in said


def test_a_tied_head_that_differs_is_found(tmp_path):
    folder = write_folder("qwen3_yarn", tmp_path / "tied")
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    put("lm_head.weight", embedding * 2)(folder)
    with pytest.raises(InputError, match=r"lm_head\.weight is not model"):
        verify(folder)
