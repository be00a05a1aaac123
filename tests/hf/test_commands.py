# SPDX-License-Identifier: Apache-2.0
"""Bring a model in, train it further, and take it out: the commands as typed."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hf.cases import write_folder
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.hf import load, model_config
from jaxllm.inference import Sampling, read_request
from jaxllm.run.saved_model import load_run_tokenizer
from jaxllm.train import train

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WEIGHTS = "model.safetensors"
LETTERS = " \nabcdefghijklmnopqrstuvwxyz"


def add_tokenizer(folder: Path) -> None:
    """Adds a tokenizer of letters, which begins a text with 1; 2 and 5 end one."""
    names = {"<pad>": 0, "<s>": 1, "</s>": 2}
    names |= {letter: 3 + place for place, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder as the page takes it for granted, with a model of 37 tokens."""
    home = tmp_path_factory.mktemp("home")
    add_tokenizer(write_folder("qwen2", home / "models" / "base"))
    (home / "own.txt").write_text("some text of my own to go on with\n" * 40)
    (home / "configs").mkdir()
    (block,) = re.findall(r"```python\n([^`]*get_config[^`]*)```", PAGE.read_text())
    (home / "configs" / "continue.py").write_text(block)
    return home


@pytest.fixture(scope="module")
def run(home, run_command):
    def run(command: str) -> str:
        done = run_command(command, home)
        assert done.status == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="module")
def tuned(home, run) -> Path:
    """The directory of a run that went on from the model, with more rows."""
    tokenizer = "--tokenizer models/base/tokenizer.json"
    run(f"tokenize --input own.txt --output data/own {tokenizer} --holdout_by tail")
    small = {
        "steps": 2,
        "optimizer.warmup_steps": 1,
        "data.sequence_length": 8,
        "data.batch_size": 8,
        "eval.batches": 1,
        "model.vocab_size": 40,
    }
    flags = " ".join(f"--config.{name}={value}" for name, value in small.items())
    run(f"train --config configs/continue.py --workdir runs/tuned {flags}")
    return home / "runs" / "tuned"


@pytest.fixture(scope="module")
def imported(home, run) -> Path:
    run("hf import models/base --workdir runs/base")
    return home / "runs" / "base"


def test_a_folder_is_verified(run):
    found = "models/base: qwen2, 39 tensors (39 F32), all finite\n"
    assert run("hf verify models/base") == found


def test_an_imported_model_is_exported_bitwise(home, run, imported):
    run("hf export --workdir runs/base --to models/again")
    for name in (WEIGHTS, "tokenizer.json", "generation_config.json"):
        again = (home / "models" / "again" / name).read_bytes()
        assert again == (home / "models" / "base" / name).read_bytes()


def test_an_imported_model_writes_and_is_evaluated(run, imported, tuned):
    said = run("generate --workdir runs/base --prompt some --max_tokens 4")
    assert said.startswith("some")
    run("generate --workdir runs/base --max_tokens 4")  # begins with the token 1
    data = "--config.data.paths=data/own --config.data.sequence_length=8"
    result = json.loads(run(f"evaluate --workdir runs/base {data}"))
    assert result["step"] == 0
    assert 0 < result["eval_loss"] < 10


def test_an_imported_model_is_no_run_to_resume(home, run_command, imported, tuned):
    done = run_command("train --workdir runs/base --config.data.paths=data/own", home)
    assert done.status == 2
    assert "config.init_from" in done.stderr


def test_a_tuned_model_has_the_rows_the_names_and_the_tokenizer_of_its_origin(
    home, run, tuned
):
    run("hf export --workdir runs/tuned --to models/tuned")
    base = load_file(home / "models" / "base" / WEIGHTS)
    made = load_file(home / "models" / "tuned" / WEIGHTS)
    assert {n: x.shape for n, x in made.items()} == {
        n: x.shape for n, x in base.items()
    }
    assert any(not np.array_equal(made[name], base[name]) for name in base)
    run("hf verify models/tuned")
    run("generate --workdir runs/tuned --prompt some --max_tokens 4")


def test_any_of_the_end_tokens_of_the_generation_ends_a_text(imported):
    request = read_request(
        imported,
        read_config(imported),
        "latest",
        load_run_tokenizer(imported, None),
        ["ab"],
        sampling=Sampling(),
    )
    assert request.ends >= {2, 5}
    assert request.prompts == ((1, 5, 6),)


def test_verify_compares_the_logits_that_another_python_gives(home, run_command):
    """A stand-in for one with transformers, which is not installed for tests."""
    assert load(home / "models" / "base")[0].dtype == "float32"
    script = home / "python"
    for planted, status in (("0", 0), ("1e-2", 2)):
        script.write_text(
            f"#!{sys.executable}\n"
            "import sys, jax, numpy\n"
            "from jaxllm.hf import load\n"
            "from jaxllm.models import logits\n"
            "folder, home = sys.argv[3:]\n"
            "config, params = load(folder)\n"
            "tokens = numpy.load(home + '/tokens.npy')\n"
            "run = jax.jit(logits, static_argnums=0)\n"
            "out = numpy.array(run(config, params, tokens))\n"
            f"out[0, 3, 4] += {planted}\n"
            "numpy.save(home + '/logits.npy', out)\n"
            "print('5.24.0')\n"
        )
        script.chmod(0o755)
        done = run_command("hf verify models/base --python ./python", home)
        assert done.status == status, done.stderr
        said = "logits differ from those of transformers 5.24.0 by"
        assert said in done.stdout + done.stderr


def test_another_model_is_refused_before_anything_is_written(home, tiny, tmp_path):
    config = tiny({"init_from": str(home / "models" / "base")})
    with pytest.raises(InputError, match=r"config\.init_from=.*base is a model of"):
        list(train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_newest_save_of_another(trained, tiny, tmp_path):
    short = {"steps": 1, "optimizer.warmup_steps": 0, "eval.every": 0}
    config = tiny({**short, "init_from": str(trained)})
    records = [r for r in train(config, tmp_path / "run") if "loss" in r]
    fresh = [r for r in train(tiny(short), tmp_path / "new") if "loss" in r]
    assert records[0]["loss"] < fresh[0]["loss"]


def test_the_settings_of_a_folder_are_those_that_its_weights_have(home):
    settings = model_config(home / "models" / "base", remat="full")
    config, _ = load(home / "models" / "base")
    assert settings == dataclasses.replace(config, remat="full")
