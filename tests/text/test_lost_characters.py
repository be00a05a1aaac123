# SPDX-License-Identifier: Apache-2.0
"""No character is lost without a word."""

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from jaxllm import tokenize
from jaxllm.text.lost_characters import encode_and_count
from jaxllm.text.tokenizers import HFTokenizer, train_bpe

TEXT = "ab \u00e9\u6c34 abx ab\n" * 10


def make(model, **rules) -> HFTokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, value in rules.items():
        setattr(backend, name, value)
    backend.add_special_tokens(["</s>"])
    return HFTokenizer(backend.to_str().encode(), None)


def bpe(**keywords):
    return models.BPE({"a": 0, "b": 1, "ab": 2, "e": 3}, [("a", "b")], **keywords)


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
DROPS = make(bpe())
ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


def test_what_a_model_drops_is_counted_and_what_its_rules_remove_is_not():
    assert encode_and_count(DROPS, [TEXT, "x"])[1].vanished == {
        "\u00e9": 10,
        "\u6c34": 10,
        "x": 11,
    }
    without_accents = make(bpe(), normalizer=ACCENTS)
    lost = encode_and_count(without_accents, [TEXT])[1]
    assert lost.vanished == {"\u6c34": 10, "x": 10}


@pytest.mark.parametrize(
    "model, unknown",
    [
        (models.WordLevel({"ab": 0, "?": 1}, "?"), 50),  # words, spaces not counted
        (models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?"), 30),
        (models.Unigram([("?", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0), 30),
        (models.BPE(BYTES, [], byte_fallback=True), 0),
    ],
)
def test_characters_of_unknown_tokens_are_counted(model, unknown):
    lost = encode_and_count(make(model), [TEXT])[1]
    assert (lost.total, lost.unknown, lost.vanished) == (len(TEXT), unknown, {})


def test_bytes_lose_nothing():
    tokenizer = train_bpe([TEXT] * 9, 257)
    lost = encode_and_count(tokenizer, [TEXT])[1]
    assert (lost.unknown, lost.vanished) == (0, {})


@pytest.fixture
def command(tmp_path):
    def run(tokenizer: HFTokenizer, *flags: str) -> int:
        (tmp_path / "t.json").write_bytes(tokenizer.json)
        (tmp_path / "x.txt").write_text(TEXT)
        return tokenize.main(
            [
                *("tokenize", f"--input={tmp_path}/x.txt", f"--output={tmp_path}/out"),
                *(f"--tokenizer={tmp_path}/t.json", "--holdout=0", *flags),
            ]
        )

    return run


def test_a_loss_is_refused_with_its_share_and_allowed_on_demand(command, capsys):
    assert command(DROPS) == 2
    error = capsys.readouterr().err
    assert "has no token for '\u00e9' (U+00E9), '\u6c34' (U+6C34), 'x'" in error
    assert "23.08% of the characters of the text so far would vanish" in error
    flag = error.split("as in ")[1].strip().removesuffix(".")
    assert command(DROPS, "--max_lost=0.23") == 2
    assert "23.08% of the characters of the text would" in capsys.readouterr().err
    assert command(DROPS, flag) == 0
    assert "30 of 130 characters (23.08%) are dropped by" in capsys.readouterr().err


def test_unknown_characters_are_said(command, capsys):
    assert command(make(models.WordLevel({"ab": 0, "?": 1}, "?"))) == 0
    assert "50 of 130 characters (38.46%) are unknown to" in capsys.readouterr().err


def test_a_model_that_stops_at_the_unknown_is_one_message(command, capsys):
    assert command(make(models.Unigram([("ab", -1.0)]))) == 2
    assert "the tokenizer cannot encode this text: " in capsys.readouterr().err
