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
from jaxllm.inference import (
    Request,
    Sampling,
    generate,
    generation,
    load_for_generation,
    read_request,
)
from jaxllm.text.decoding import TextStream
from jaxllm.text.tokenizers import BytesTokenizer

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_for_generation(trained, read_config(trained), "latest")


@pytest.fixture(scope="module")
def ask(trained):
    """Makes the request for some prompts."""

    def make(prompts, *, max_tokens=12, sampling=GREEDY, tokenizer=None) -> Request:
        return read_request(
            trained,
            read_config(trained),
            "latest",
            tokenizer or BytesTokenizer(),
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
        )

    return make


def written(loaded, request: Request) -> list[str]:
    model, params, mesh = loaded
    texts = [""] * len(request.prompts)
    with jax.set_mesh(mesh):
        for number, piece in generate(model, params, request):
            texts[number] += piece
    return texts


def test_pieces_come_as_they_are_made(loaded, ask, monkeypatch):
    model, params, mesh = loaded
    asked = []

    def add(stream, token_id):
        asked.append(token_id)
        return "."

    monkeypatch.setattr(TextStream, "add", add)
    with jax.set_mesh(mesh):
        pieces = generate(model, params, ask(["def f"], max_tokens=50))
        assert [next(pieces), next(pieces)] == [(0, "."), (0, ".")]
    assert len(asked) == 2


def test_an_incomplete_character_at_the_end_is_written(loaded, ask, monkeypatch):
    # "\u6c34" lacks its last byte.
    columns = iter([[0xE6, ord("a")], [0xB0, None]])
    monkeypatch.setattr(generation, "sample_tokens", lambda *_, **__: columns)
    assert written(loaded, ask(["x", "y"])) == ["\ufffd", "a"]


def test_the_same_seed_writes_the_same_and_another_does_not(loaded, ask):
    def text(seed: int) -> list[str]:
        request = ask(["def ", "class A"], sampling=Sampling(seed=seed), max_tokens=30)
        return written(loaded, request)

    one = text(1)
    assert one == text(1)
    assert one != text(2)


def test_a_prompt_does_not_see_the_others(loaded, ask):
    alone = written(loaded, ask(["def add("]))
    together = written(loaded, ask(["def add(", "import numpy as np\nimport", "a"]))
    assert together[0] == alone[0]


def test_a_prompt_ends_with_its_document(loaded, ask):
    # The first token that it would write is declared to end a document.
    [text] = written(loaded, ask(["def "]))
    ends = dataclasses.replace(BytesTokenizer(), end_of_document=ord(text[0]))
    assert written(loaded, ask(["def "], tokenizer=ends)) == [""]


def test_no_more_than_max_tokens_are_written(loaded, ask):
    for number in (1, 7):
        [text] = written(loaded, ask(["abc"], max_tokens=number))
        assert 0 < len(text.encode()) <= 3 * number  # U+FFFD takes 3 bytes


def test_only_tokens_of_the_tokenizer_are_written(loaded, ask):
    # At this temperature each of the 264 ids is as likely as the others.
    hot = Sampling(temperature=1e6, seed=1)
    lines = dataclasses.replace(BytesTokenizer(), vocab_size=11)
    [text] = written(loaded, ask(["\n"], max_tokens=200, sampling=hot, tokenizer=lines))
    assert len(text) == 200
    assert set(text) <= {chr(i) for i in range(11)}


def test_several_devices_write_the_same(loaded, trained, ask):
    request = ask(["def ", "class Model:"])
    cut = load_for_generation(trained, read_config(trained), "latest", num_devices=2)
    assert cut[2].shape["tensor"] == 2
    assert written(cut, request) == written(loaded, request)


@pytest.mark.parametrize("number", [0, 9, -1])
def test_devices_that_are_not_there_are_refused(trained, number):
    with pytest.raises(InputError, match=rf"--devices={number} must be from 1 to"):
        load_for_generation(trained, read_config(trained), "latest", number)


def test_the_greedy_token_is_the_likeliest_of_the_whole_model(loaded, ask):
    model, params, mesh = loaded
    request = ask(["def forward(self, x"], max_tokens=3)
    ids = list(request.prompts[0])
    [text] = written(loaded, request)

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
    assert request.tokenizer.decode(ids[-3:]) == text


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


def test_a_new_process_compiles_nothing_for_another_seed_or_prompt(
    trained, command_server, tmp_path
):
    def num_entries(arguments: str) -> int:
        ended = command_server.run(
            ["-m", "jaxllm.generate", f"--workdir={trained}", *arguments.split()],
            tmp_path,
            {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert (ended.status, ended.stderr) == (0, "")
        return len(list((tmp_path / "cache").glob("*-cache")))

    made = num_entries("--prompt=ab --max_tokens=2")
    assert made == 3  # and the checksums of what is read
    for arguments in (
        "--prompt=abcdefg --max_tokens=3 --seed=7",
        "--prompt=ab --max_tokens=8 --temperature=0 --top_k=5 --top_p=0.3",
    ):
        assert num_entries(arguments) == made
