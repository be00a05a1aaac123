# SPDX-License-Identifier: Apache-2.0
"""What is read from a run's directory: parameters of a step, and the tokenizer."""

import dataclasses
import json
import shutil

import jax
import pytest

from jaxllm import tokenize
from jaxllm.config.saved import read_config
from jaxllm.errors import CheckpointError, InputError
from jaxllm.models import Model
from jaxllm.run.saved_model import (
    load_params,
    load_run_tokenizer,
    read_step,
    save_tokenizer,
)
from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer, load_tokenizer


@pytest.mark.parametrize(
    ("text", "step"), [("latest", "latest"), ("best", "best"), ("0", 0), ("120", 120)]
)
def test_a_step_is_a_number_or_a_word(text, step):
    assert read_step(text) == step


@pytest.mark.parametrize("text", ["", "newest", "-1", "1.5", "1e3", " 1", "\u0663x"])
def test_another_step_is_refused(text):
    with pytest.raises(InputError, match=r"--step=.* must be a number, latest or best"):
        read_step(text)


def test_parameters_of_each_saved_step_are_read(trained):
    config = read_config(trained)
    abstract = Model(config.model).abstract
    found = {}
    for which in (4, 6, "latest", "best"):
        step, params = load_params(trained, config, which, abstract)
        found[which] = step
        assert jax.tree.structure(params) == jax.tree.structure(abstract)
    assert found == {4: 4, 6: 6, "latest": 6, "best": 6}


@pytest.mark.parametrize("which", [5, 7, 10**30])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(trained, which):
    config = read_config(trained)
    with pytest.raises(InputError, match=rf"--step={which}: .* steps \[4, 6\]"):
        load_params(trained, config, which, Model(config.model).abstract)


def test_parameters_are_not_read_under_another_model_of_the_same_shapes(
    trained, tmp_path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    text = (workdir / "config.json").read_text()
    theta = '"rope_theta": 10000.0'
    assert theta in text
    (workdir / "config.json").write_text(text.replace(theta, '"rope_theta": 10001.0'))
    with pytest.raises(InputError, match=r"rope_theta: 10000\.0 -> 10001\.0"):
        load_params(workdir, read_config(workdir), "latest", {})


# Where an array is broken, threads of TensorStore call an event loop that Orbax has
# closed, and nobody can catch that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_parameters_that_are_damaged_are_refused_with_the_other_steps(
    trained, tmp_path
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = read_config(workdir)
    params = Model(config.model).abstract
    arrays = max(
        (workdir / "checkpoints/6/state").rglob("*"), key=lambda p: p.stat().st_size
    )
    data = bytearray(arrays.read_bytes())
    arrays.write_bytes(bytes(byte ^ 1 for byte in data))
    with pytest.raises(CheckpointError, match=r"6 is damaged: .* Give --step, one of"):
        load_params(workdir, config, "latest", params)
    step, _ = load_params(workdir, config, 4, params)  # as it says
    assert step == 4


def test_a_run_without_a_save_says_so(trained, tmp_path):
    config = read_config(trained)
    for which in ("latest", "best", 0):
        with pytest.raises(InputError, match=rf"--step={which}: .* train it first"):
            load_params(tmp_path, config, which, Model(config.model).abstract)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """Token folders by tokenizer."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 50)
    made = {}
    for name in ("bytes", "bpe:270"):
        made[name] = str(tmp_path / name.replace(":", ""))
        status = tokenize.main(
            [
                "tokenize",
                f"--input={text}",
                f"--output={made[name]}",
                f"--tokenizer={name}",
                "--holdout=0",
                "--workers=1",
            ]
        )
        assert status == 0
    return made


@pytest.mark.parametrize("name", ["bytes", "bpe:270"])
def test_a_run_keeps_the_tokenizer_of_its_data(folders, tmp_path, name):
    workdir = tmp_path / "run"
    workdir.mkdir()
    before = load_tokenizer(folders[name])
    save_tokenizer(["no_folder.bin", folders[name]], workdir)
    save_tokenizer(["no_folder.bin", folders[name]], workdir)  # on a resume
    shutil.rmtree(folders[name])
    after = load_run_tokenizer(workdir, None)
    assert after == before
    assert after.decode(after.encode("one two")) == "one two"


def test_the_end_of_document_is_that_of_the_data(folders, tmp_path):
    tokenizer = load_tokenizer(folders["bpe:270"])
    assert isinstance(tokenizer, HFTokenizer)
    workdir = tmp_path / "run"
    workdir.mkdir()
    save_tokenizer([folders["bpe:270"]], workdir)
    facts = workdir / "tokenizer" / "facts.json"
    facts.write_text(json.dumps({"kind": "hf", "end_of_document": None}))
    expected = dataclasses.replace(tokenizer, end_of_document=None)
    assert load_run_tokenizer(workdir, None) == expected


def test_files_of_others_leave_a_run_without_a_tokenizer(tmp_path):
    save_tokenizer([str(tmp_path / "x.bin")], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"has no tokenizer.*give --tokenizer"):
        load_run_tokenizer(tmp_path, None)
    assert load_run_tokenizer(tmp_path, "bytes") == BytesTokenizer()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "hf"}', '"kind"'])
def test_a_damaged_tokenizer_is_refused_by_its_file(tmp_path, text):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "facts.json").write_text(text)
    with pytest.raises(InputError, match=r"facts\.json is damaged .* --tokenizer"):
        load_run_tokenizer(tmp_path, None)
