# SPDX-License-Identifier: Apache-2.0
"""Text from a run: streamed, repeatable, ended by its documents, without its data."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.inference import Sampling, generate, generation, load_for_generation
from jaxllm.text.decoding import TextStream
from jaxllm.text.tokenizers import BytesTokenizer

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_for_generation(trained, read_config(trained), "latest")


def written(loaded, prompts, *, max_tokens=12, sampling=GREEDY, tokenizer=None):
    model, params, mesh = loaded
    texts = [""] * len(prompts)
    with jax.set_mesh(mesh):
        for number, piece in generate(
            model,
            params,
            tokenizer or BytesTokenizer(),
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
        ):
            texts[number] += piece
    return texts


def test_pieces_come_as_they_are_made(loaded, monkeypatch):
    model, params, mesh = loaded
    asked = []

    def add(stream, token_id):
        asked.append(token_id)
        return "."

    monkeypatch.setattr(TextStream, "add", add)
    with jax.set_mesh(mesh):
        pieces = generate(
            model, params, BytesTokenizer(), ["def f"], max_tokens=50, sampling=GREEDY
        )
        assert [next(pieces), next(pieces)] == [(0, "."), (0, ".")]
    assert len(asked) == 2


def test_an_incomplete_character_at_the_end_is_written(loaded, monkeypatch):
    # "\u6c34" lacks its last byte.
    columns = iter([[0xE6, ord("a")], [0xB0, None]])
    monkeypatch.setattr(generation, "sample_tokens", lambda *_, **__: columns)
    assert written(loaded, ["x", "y"]) == ["\ufffd", "a"]


def test_the_same_seed_writes_the_same_and_another_does_not(loaded):
    prompts = ["def ", "class A"]
    one = written(loaded, prompts, sampling=Sampling(seed=1), max_tokens=30)
    assert one == written(loaded, prompts, sampling=Sampling(seed=1), max_tokens=30)
    assert one != written(loaded, prompts, sampling=Sampling(seed=2), max_tokens=30)


def test_a_prompt_does_not_see_the_others(loaded):
    alone = written(loaded, ["def add("])
    together = written(loaded, ["def add(", "import numpy as np\nimport", "a"])
    assert together[0] == alone[0]


def test_an_empty_prompt_begins_a_document(loaded):
    assert len(written(loaded, [""], max_tokens=5)) == 1


def test_a_prompt_ends_with_its_document(loaded):
    # The first token that it would write is declared to end a document.
    model, params, mesh = loaded
    with jax.set_mesh(mesh):
        first = next(
            iter(
                generate(
                    model,
                    params,
                    BytesTokenizer(),
                    ["def "],
                    max_tokens=1,
                    sampling=GREEDY,
                )
            )
        )[1]
    ends = dataclasses.replace(BytesTokenizer(), end_of_document=ord(first))
    assert written(loaded, ["def "], tokenizer=ends) == [""]
    assert written(loaded, ["def "])[0].startswith(first)


def test_no_more_than_max_tokens_are_written(loaded):
    for number in (1, 7):
        text = written(loaded, ["abc"], max_tokens=number)[0]
        assert 0 < len(text.encode()) <= 3 * number  # U+FFFD takes 3 bytes


def test_several_devices_write_the_same(loaded, trained):
    prompts = ["def ", "class Model:"]
    cut = load_for_generation(trained, read_config(trained), "latest", num_devices=2)
    assert cut[2].shape["tensor"] == 2
    assert written(cut, prompts) == written(loaded, prompts)


@pytest.mark.parametrize("number", [0, 9, -1])
def test_devices_that_are_not_there_are_refused(trained, number):
    with pytest.raises(InputError, match=rf"--devices={number} must be from 1 to"):
        load_for_generation(trained, read_config(trained), "latest", number)


def test_the_greedy_token_is_the_likeliest_of_the_whole_model(loaded):
    model, params, mesh = loaded
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode("def forward(self, x")
    [text] = written(loaded, ["def forward(self, x"], max_tokens=3)

    @jax.jit
    def likeliest(params, tokens_BT, last):
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        module = model.bind(params)
        logits_BTV = module.logits(module(tokens_BT, positions_BT, None)[0])
        return logits_BTV[0].argmax(-1)[last]

    with jax.set_mesh(mesh):
        for _ in range(3):
            # What comes behind the last token is not seen by it.
            tokens_BT = np.array([ids + [0] * (32 - len(ids))], np.int32)
            ids.append(int(likeliest(params, tokens_BT, len(ids) - 1)))
    assert tokenizer.decode(ids[-3:]) == text


def test_the_command_line_needs_nothing_but_the_run(trained, run_command, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = workdir / "config.json"
    config.write_text(
        config.read_text().replace(read_config(trained).data.paths[0], "gone")
    )
    arguments = [
        *("generate", "--workdir=run", "--max_tokens=8", "--seed=3"),
        *("--prompt=def f(", "--prompt=class", "--step=4"),
    ]
    one = run_command(arguments, tmp_path)
    assert (one.status, one.stderr) == (0, "")
    assert one.stdout.startswith("def f(")
    assert "\n--- 2 ---\nclass" in one.stdout
    assert run_command(arguments, tmp_path) == one
    again = run_command([*arguments, "--seed=4"], tmp_path)
    assert again.status == 0 and again.stdout != one.stdout


def test_the_command_line_begins_a_document_without_a_prompt(
    trained, run_command, tmp_path
):
    ended = run_command(f"generate --workdir {trained} --max_tokens=4", tmp_path)
    assert (ended.status, ended.stderr) == (0, "")
    assert len(ended.stdout) > 1
