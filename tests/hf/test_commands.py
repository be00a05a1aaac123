# SPDX-License-Identifier: Apache-2.0
"""Bring a model in, train it further, and take it out: the commands as typed."""

import dataclasses
import json

import numpy as np
import pytest
from hf.cases import write_folder
from safetensors.numpy import load_file

from jaxllm.config import ModelConfig
from jaxllm.errors import InputError
from jaxllm.hf import load, model_config
from jaxllm.train import train


@pytest.fixture
def folder(tmp_path):
    """A model that has 37 rows of embedding, and its folder."""
    return write_folder("qwen2", tmp_path / "qwen2")


def test_a_model_is_imported_verified_and_exported_bitwise(
    folder, tmp_path, run_command
):
    def run(command: str) -> str:
        done = run_command(f"hf {command}", tmp_path)
        assert done.status == 0, done.stderr
        return done.stdout

    said = run("verify qwen2")
    assert "qwen2: qwen2, 39 tensors (39 F32), all finite" in said
    run("import qwen2 --workdir runs/a")
    run("export --workdir runs/a --to out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_starts_from_a_folder_with_more_rows_and_exports_those_of_the_folder(
    folder, tiny, tmp_path
):
    first = dict(load_file(folder / "model.safetensors"))
    config = tiny({"steps": 1, "optimizer.warmup_steps": 0, "init_from": str(folder)})
    model = model_config(folder, vocab_size=264, dtype="float32")
    config = dataclasses.replace(config, model=model)
    list(train(config, tmp_path / "run"))
    layout = json.loads((tmp_path / "run" / "hf" / "layout.json").read_text())
    assert set(layout["model.safetensors"]) - {"__metadata__"} == set(first)


def test_another_model_is_refused_before_anything_is_written(folder, tiny, tmp_path):
    config = tiny({"init_from": str(folder)})
    with pytest.raises(InputError, match=r"config\.init_from=.*qwen2 is a model of"):
        list(train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_newest_save_of_another(trained, tiny, tmp_path):
    short = {"steps": 1, "optimizer.warmup_steps": 0, "eval.every": 0}
    config = tiny({**short, "init_from": str(trained)})
    records = [r for r in train(config, tmp_path / "run") if "loss" in r]
    fresh = [r for r in train(tiny(short), tmp_path / "new") if "loss" in r]
    assert records[0]["loss"] < fresh[0]["loss"]


def test_the_settings_of_a_folder_are_those_that_its_weights_have(folder):
    settings = model_config(folder, remat="full")
    assert isinstance(settings, ModelConfig)
    assert settings.remat == "full"
    config, params = load(folder)
    assert settings.num_layers == config.num_layers
    assert params["embedding"].shape == (config.vocab_size, config.d_model)
    assert np.isfinite(np.asarray(params["embedding"])).all()
