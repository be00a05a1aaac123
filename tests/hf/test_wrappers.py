# SPDX-License-Identifier: Apache-2.0
"""The text half of a multimodal model is read, named, and written as itself."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hf.cases import HERE, draw
from safetensors.numpy import load_file, save_file

from jaxllm.errors import InputError
from jaxllm.hf import load, model_config
from jaxllm.hf.carried import carry, read_carried
from jaxllm.hf.export import export
from jaxllm.hf.folder import Folder
from jaxllm.hf.verify import verify
from jaxllm.hf.wrappers import WRAPPERS
from jaxllm.models import logits

WEIGHTS = "model.safetensors"
CASES = json.loads((HERE / "wrappers.json").read_text())["cases"]
TOLERANCE = 24 * float(np.finfo(np.float32).eps)  # of the largest, as test_families.py


def write_wrapper(case: str, folder: Path, rename=lambda name: name, **changes) -> Path:
    folder.mkdir()
    content = {**CASES[case]["config"], **changes}
    (folder / "config.json").write_text(json.dumps(content))
    shapes = CASES[case]["shapes"]
    found = {rename(n): draw(case, n, tuple(shape)) for n, shape in shapes.items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def as_version_5(name: str) -> str:
    """The other way to name a text half."""
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return f"model.{name}"


def test_each_wrapper_has_a_case():
    assert {case["config"]["model_type"] for case in CASES.values()} == set(WRAPPERS)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=() if case.startswith("mistral3") else pytest.mark.slow
        )
        for case in CASES
    ],
)
def test_text_logits_are_those_of_the_whole_model(case, tmp_path):
    config, params = load(write_wrapper(case, tmp_path / case))
    with np.load(HERE / "wrappers.npz") as arrays:
        ids, wanted = arrays[f"{case}/ids"], arrays[f"{case}/logits"]
    run = jax.jit(logits, static_argnums=0)
    found = run(dataclasses.replace(config, dtype="float32"), params, ids)
    bound = TOLERANCE * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


def test_both_ways_to_name_a_text_half_are_read(tmp_path):
    _, params = load(write_wrapper("llava", tmp_path / "one"))
    _, again = load(write_wrapper("llava", tmp_path / "other", as_version_5))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_the_outer_setting_ties_and_without_it_the_files_do(tmp_path):
    inside = CASES["mistral3"]["config"]["text_config"]
    assert inside["tie_word_embeddings"] is False
    tied = write_wrapper("mistral3", tmp_path / "tied")
    assert model_config(tied).tie_embeddings
    untied = write_wrapper(
        "mistral3_mistral_untied", tmp_path / "untied", tie_word_embeddings=None
    )
    assert not model_config(untied).tie_embeddings
    assert "output" in load(untied)[1]


def test_an_export_is_the_text_half_under_its_own_name(tmp_path):
    folder = write_wrapper("mistral3", tmp_path / "whole")
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    export(config, params, tmp_path / "out", carried=read_carried(tmp_path / "run"))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["model_type"] == "ministral3"
    assert content["architectures"] == ["Ministral3ForCausalLM"]
    assert content["tie_word_embeddings"] is True
    before = load_file(folder / WEIGHTS)
    after = load_file(tmp_path / "out" / WEIGHTS)
    ours = {n for n in before if n.startswith("language_model.")}
    assert {f"language_model.{name}" for name in after} == ours
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[f"language_model.{name}"])
    assert load(tmp_path / "out")[0] == config


def test_what_is_left_out_is_said(tmp_path):
    (said,) = verify(write_wrapper("llava", tmp_path / "llava"))
    others = sum(not n.startswith("language_model.") for n in CASES["llava"]["shapes"])
    assert f"llama, the text half of llava ({others} tensors of" in said


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("qwen3_5", "qwen3_5_text"), ("llama4", "llama4_text"), ("gemma4", None)],
)
def test_an_unknown_text_half_is_refused_by_name(outer, inner, tmp_path):
    folder = write_wrapper("llava", tmp_path / "folder", model_type=outer)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["model_type"] = inner
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        load(folder)
    assert f"model_type={outer!r} is a multimodal model" in str(error.value)
    assert repr(inner) in str(error.value)
