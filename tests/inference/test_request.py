# SPDX-License-Identifier: Apache-2.0
"""What is asked of a run: how prompts begin, how far it may go, what it refuses."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from jaxllm.checkpoint.label import DATA, json_checksum
from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.inference import Request, Sampling, read_request
from jaxllm.inference.request import USUAL_TOKENS
from jaxllm.text.tokenizers import BytesTokenizer, HFTokenizer

ROW = 16  # tokens of a row in the run that is asked


@pytest.fixture(scope="module")
def make_run(trained, tmp_path_factory):
    """Copies a run, with what its batches are said to be."""

    def make(**batches) -> Path:
        run = tmp_path_factory.mktemp("run") / "run"
        shutil.copytree(trained, run)
        for path in run.glob("checkpoints/*/data/data.json"):
            data = json.loads(path.read_text())
            data["batches"] |= {
                name.replace("data_", "config.data."): value
                for name, value in batches.items()
            }
            sums = data.pop("checksums")
            data["checksums"] = {**sums, DATA: json_checksum(data)}
            path.write_text(json.dumps(data))
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run) -> Path:
    return make_run(order_version=2, data_end_of_document=[None, 256])


@pytest.fixture(scope="module")
def old_run(make_run) -> Path:
    return make_run(order_version=1)


def ask(run: Path, *texts: str, overrides=None, **options) -> Request:
    config = read_config(run)
    options = {"sampling": Sampling(), **options}
    return read_request(run, config, "latest", BytesTokenizer(), texts, **options)


def test_each_prompt_begins_as_documents_did_in_training(run):
    asked = ask(run, "ab", "")
    assert asked.prompts == ((256, 97, 98), (256,))
    assert asked.ends == {256}


def test_a_run_whose_documents_have_another_end_uses_that(make_run):
    run = make_run(order_version=2, data_end_of_document=[10])
    asked = ask(run, "")
    assert (asked.prompts, asked.ends) == (((10,),), {10, 256})


def ask_with(model: models.Model, run: Path, text: str) -> Request:
    tokenizer = HFTokenizer(tokenizers.Tokenizer(model).to_str().encode(), None)
    config = read_config(run)
    return read_request(run, config, "latest", tokenizer, [text], sampling=Sampling())


def test_a_prompt_that_would_lose_a_character_is_refused(run):
    with pytest.raises(InputError, match=r"no token for 'x' \(U\+0078\), nor an"):
        ask_with(models.BPE({"a": 0}, []), run, "ax")


def test_unknown_characters_of_a_prompt_are_counted(run, caplog):
    asked = ask_with(models.BPE({"a": 0, "?": 1}, [], unk_token="?"), run, "ax")
    assert asked.prompts[0][-2:] == (0, 1)
    assert "1 of 2 characters of the prompts are unknown" in caplog.text


@pytest.mark.parametrize("batches", [{"order_version": 1}, {"order_version": 2}])
def test_an_empty_prompt_is_refused_where_no_documents_beginning_was_trained(
    make_run, batches
):
    run = make_run(**batches, data_end_of_document=[None])
    assert ask(run, "ab").prompts == ((97, 98),)
    with pytest.raises(InputError, match=r"prompt 1 is empty.*Give --prompt at least"):
        ask(run, "ab", "")


@pytest.mark.parametrize("length", [1, 9, ROW])
def test_text_goes_to_the_end_of_a_trained_row_by_default(old_run, length, caplog):
    asked = ask(old_run, "a", "b" * length)
    assert asked.max_tokens == ROW + 1 - length
    assert caplog.messages == []


def test_text_is_not_longer_than_usual_by_default(make_run):
    run = make_run(order_version=1)
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["data"]["sequence_length"] = 8192
    path.write_text(json.dumps(config))
    assert ask(run, "a").max_tokens == USUAL_TOKENS


def test_going_beyond_trained_rows_is_warned_about_once(old_run, caplog):
    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert ask(old_run, "a", "b" * 10, max_tokens=8).max_tokens == 8
    [message] = caplog.messages
    assert "rows of config.data.sequence_length=16 tokens" in message
    assert message.endswith("--max_tokens=7 ends there.")
    caplog.clear()
    ask(old_run, "a", "b" * 10, max_tokens=7)
    assert caplog.messages == []


def test_a_prompt_longer_than_a_row_asks_for_a_number_of_tokens(old_run, caplog):
    with pytest.raises(InputError, match=r"prompt 1 has 17 tokens.*give --max_tokens"):
        ask(old_run, "a", "b" * 17)
    assert ask(old_run, "a", "b" * 17, max_tokens=3).max_tokens == 3
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_tokens=0), "--max_tokens=0 must be from 1 to"),
        (dict(max_tokens=10**12), "--max_tokens=1000000000000 must be from 1 to"),
        (dict(max_tokens=2**31 - 1), r"--max_tokens=2147483647, .* needs .*B of mem"),
        (dict(sampling=Sampling(top_k=265)), r"--top_k=265 .*vocab_size=264; 0 is all"),
    ],
)
def test_what_cannot_be_honoured_is_refused(old_run, options, words):
    with pytest.raises(InputError, match=words):
        ask(old_run, "a", **options)


def test_a_token_that_the_model_lacks_is_refused(old_run):
    class Larger(BytesTokenizer):
        def encode(self, text):
            return [264]

    with pytest.raises(InputError, match=r"prompt 0 has token 264.*vocab_size=264"):
        read_request(
            old_run,
            read_config(old_run),
            "latest",
            Larger(),
            ["a"],
            sampling=Sampling(),
        )
