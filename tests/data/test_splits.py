# SPDX-License-Identifier: Apache-2.0
"""Splits that do not belong together, or leak, or do not fit, are refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.data import splits as splits_module
from jaxllm.data.fingerprint import (
    data_fingerprint,
    describe_change,
    eval_fingerprint,
)
from jaxllm.data.formats import TokenSplit
from jaxllm.data.splits import (
    check_batch,
    check_vocab,
    describe_documents,
    open_held_out,
    open_train,
)
from jaxllm.errors import InputError


def write_tokens(path, num_tokens, seed=0) -> str:
    tokens = np.random.default_rng(seed).integers(0, 500, num_tokens)
    tokens.astype("<u2").tofile(path)
    return str(path)


def make_config(*names, **settings) -> DataConfig:
    settings = {
        "sequence_length": 16,
        "batch_size": 4,
        "cross_document_attention": True,
        **settings,
    }
    return DataConfig(**{"paths": names, **settings})


def make_split(path, **fields) -> TokenSplit:
    split = TokenSplit(
        path=path,
        shards=(np.arange(100, dtype=np.uint16),),
        document_ends=np.array([40, 100]),
        end_of_document=256,
        vocab_size=257,
        vocab_known=True,
        fingerprint=path,
        tokenizer="bytes",
    )
    return dataclasses.replace(split, **fields)


@pytest.fixture
def folders(monkeypatch):
    """Splits by (path, name), as if they were token folders."""
    opened = {}
    monkeypatch.setattr(
        splits_module,
        "open_tokens",
        lambda path, split, **reading: opened.get((path, split)),
    )
    return opened


def test_training_and_held_out_files_are_opened(tmp_path):
    first, second = (write_tokens(tmp_path / f"{i}.bin", 200, i) for i in range(2))
    held_out = write_tokens(tmp_path / "other.bin", 50, 2)
    config = make_config(first, second, eval_paths=(held_out,))
    train = open_train(config)
    assert [split.path for split in train] == [first, second]
    assert [split.path for split in open_held_out(config, train)] == [held_out]


def test_held_out_parts_of_the_training_folders_are_the_default(folders):
    folders["a", "train"] = make_split("a")
    folders["b", "train"] = make_split("b")
    folders["b", "eval"] = make_split("b", fingerprint="b-eval")
    (split,) = open_eval(make_config("a", "b"))
    assert split.fingerprint == "b-eval"


def test_an_eval_path_gives_its_held_out_part_or_else_all_of_it(folders):
    folders["a", "train"] = make_split("a")
    folders["b", "train"] = make_split("b")
    folders["b", "eval"] = make_split("b", fingerprint="b-eval")
    folders["c", "train"] = make_split("c")
    config = make_config("a", eval_paths=("b", "c"))
    found = [split.fingerprint for split in open_eval(config)]
    assert found == ["b-eval", "c"]


def test_all_that_is_wrong_with_the_paths_is_one_error(tmp_path):
    missing = str(tmp_path / "missing.bin")
    short = write_tokens(tmp_path / "short.bin", 10)
    with pytest.raises(InputError) as caught:
        open_train(make_config(missing, short))
    assert missing in str(caught.value)
    assert f"{short} has 10; use at most 9" in str(caught.value)


def open_eval(config):
    return open_held_out(config, open_train(config))


WRONG = {
    "no row": (
        {("a", "train"): make_split("a")},
        "train",
        {"sequence_length": 101},
        ["config.data.sequence_length=101", "101 tokens", "a has 100", "at most 100"],
    ),
    "no training part": (
        {("a", "eval"): make_split("a")},
        "train",
        {},
        ["a in config.data.paths has no training part", "--holdout"],
    ),
    "no held-out part": (
        {("a", "train"): make_split("a")},
        "eval",
        {},
        ["config.data.eval_paths=()", "'a'", "--holdout", "config.eval.every=0"],
    ),
    "empty held-out part": (
        {
            ("a", "train"): make_split("a"),
            ("a", "eval"): make_split(
                "a-eval", document_ends=np.arange(1, 101), end_of_document=None
            ),
        },
        "eval",
        {},
        ["held-out part of a-eval has 100 tokens, and nothing", "config.data.eval_pa"],
    ),
    "no boundaries": (
        {("a", "train"): make_split("a", document_ends=None)},
        "train",
        {"packing": "best_fit"},
        ["config.data.packing=best_fit", "a does not list", "packing=concat"],
    ),
    "documents of one token": (
        {
            ("a", "train"): make_split(
                "a", document_ends=np.arange(1, 101), end_of_document=None
            )
        },
        "train",
        {},
        ["a in config.data.paths has no document of 2 tokens"],
    ),
    "a row without targets": (
        {
            ("a", "train"): make_split(
                "a",
                document_ends=np.append(np.arange(20, 61), 100),
                end_of_document=None,
            )
        },
        "train",
        {},
        ["one token from token 32 to 48, a row", "config.data.packing=best_fit"],
    ),
    "documents that cannot be found": (
        {("a", "train"): make_split("a", document_ends=None, end_of_document=None)},
        "train",
        {"cross_document_attention": False},
        [
            "a in config.data.paths does not say where",
            "config.data.end_of_document",
            "config.data.cross_document_attention=true",
        ],
    ),
    "a token that is in no document": (
        {("a", "train"): make_split("a", document_ends=None, end_of_document=7000)},
        "train",
        {"end_of_document": 7000},
        ["config.data.end_of_document=7000 is not among the tokens of a"],
    ),
    "a token for files that list their documents": (
        {("a", "train"): make_split("a")},
        "train",
        {"end_of_document": 5},
        ["config.data.end_of_document=5 is for files that do not", "leave it out"],
    ),
    "the same tokens twice": (
        {
            ("a", "train"): make_split("a"),
            ("b", "train"): make_split("b", fingerprint="a"),
        },
        "train",
        {"paths": ("a", "b")},
        ["config.data.paths has the tokens of a twice", "config.data.weights"],
    ),
    "the same held-out tokens twice": (
        {
            ("a", "train"): make_split("a"),
            ("b", "train"): make_split("b"),
            ("c", "train"): make_split("c", fingerprint="b"),
        },
        "eval",
        {"eval_paths": ("b", "c")},
        ["config.data.eval_paths has the tokens of b twice"],
    ),
    "mixed tokenizers": (
        {
            ("a", "train"): make_split("a"),
            ("b", "train"): make_split("b", tokenizer="bpe"),
        },
        "train",
        {},
        ["one tokenizer", "a by bytes", "b by bpe"],
    ),
    "another tokenizer for evaluation": (
        {
            ("a", "train"): make_split("a"),
            ("b", "train"): make_split("b", tokenizer="bpe"),
        },
        "eval",
        {"eval_paths": ("b",)},
        ["one tokenizer", "a by bytes", "b by bpe"],
    ),
    "the same data": (
        {
            ("a", "train"): make_split("a"),
            ("b", "train"): make_split("b", fingerprint="a"),
        },
        "eval",
        {"eval_paths": ("b",)},
        ["held-out tokens of b are tokens of a", "config.data.eval_paths"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_splits_are_refused_with_the_remedy(folders, name):
    opened, split, settings, words = WRONG[name]
    paths = ("a", "b") if name == "mixed tokenizers" else ("a",)
    folders.update(opened)
    config = make_config(**{"paths": paths, **settings})
    with pytest.raises(InputError) as caught:
        open_train(config) if split == "train" else open_eval(config)
    for word in words:
        assert word in str(caught.value)


def test_a_file_among_those_of_training_is_a_leak(tmp_path):
    for i in range(3):
        write_tokens(tmp_path / f"{i}.bin", 200, i)
    (tmp_path / "link.bin").symlink_to(tmp_path / "1.bin")
    train = str(tmp_path / "[0-2].bin")
    for held_out in ("1.bin", "link.bin"):
        config = make_config(train, eval_paths=(str(tmp_path / held_out),))
        with pytest.raises(InputError, match="would measure memory"):
            open_eval(config)


def test_a_vocabulary_above_that_of_the_model_is_refused():
    splits = (make_split("a"), make_split("b", vocab_size=999, vocab_known=False))
    check_vocab(splits, 257)
    with pytest.raises(InputError) as caught:
        check_vocab(splits, 256)
    assert "config.model.vocab_size=256" in str(caught.value)
    assert "the 257 tokens in the vocabulary of a; use 257 or" in str(caught.value)


def test_a_fingerprint_survives_json_and_a_move_of_the_files():
    config = make_config("a", "b", weights=(0.7, 0.3))
    splits = (make_split("a"), make_split("b"))
    saved = json.loads(json.dumps(data_fingerprint(config, splits)))
    moved = tuple(dataclasses.replace(split, path="elsewhere") for split in splits)
    assert describe_change(saved, data_fingerprint(config, moved)) is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sequence_length", 32),
        ("batch_size", 8),
        ("packing", "best_fit"),
        ("shuffle", False),
        ("weights", (0.5, 0.5)),
    ],
)
def test_a_changed_setting_is_named_with_both_values(setting, value):
    config = make_config("a", "b")
    splits = (make_split("a"), make_split("b"))
    changed = dataclasses.replace(config, **{setting: value})
    old, new = data_fingerprint(config, splits), data_fingerprint(changed, splits)
    message = describe_change(old, json.loads(json.dumps(new)))
    assert message is not None
    was = getattr(config, setting) or "none"
    now = list(value) if isinstance(value, tuple) else value
    assert f"config.data.{setting} was {was} and is now {now}" in message


def test_changed_tokens_are_named_by_their_place():
    config = make_config("a", "b")
    a, b, c = make_split("a"), make_split("b"), make_split("c")
    old = data_fingerprint(config, (a, b))
    for splits, words in (
        ((a, c), "tokens of config.data.paths changed, at 1"),
        ((b, a), "another order"),
        ((a,), "was 2 paths and is now 1"),
    ):
        assert words in str(describe_change(old, data_fingerprint(config, splits)))


def test_a_run_with_rows_of_another_order_is_told_what_changed():
    new = data_fingerprint(make_config("a"), (make_split("a"),))
    old = {**new, "order_version": 1}
    del old["config.data.end_of_document"]
    message = str(describe_change(old, new))
    assert "with rows of order 1" in message and "makes rows of order 2" in message
    assert "the first token of a document is a target too" in message
    assert "with the version that began it" in message
    assert "none" not in message  # what is not in it is no change of a setting
    assert "it is older" in str(describe_change({**new, "order_version": 3}, new))


def test_what_a_document_is_predicted_from_is_saved():
    splits = make_split("a"), make_split("b", end_of_document=None)
    saved = data_fingerprint(make_config("a", "b"), splits)
    assert saved["config.data.end_of_document"] == [256, None]
    assert describe_documents(splits[0]) is None
    assert "b: its documents do not end in one" in str(describe_documents(splits[1]))
    found = make_split("c", document_ends=None)
    assert "c: token 256 is taken" in str(describe_documents(found))


def test_evaluations_of_other_rows_have_other_fingerprints():
    config, splits = make_config("a"), (make_split("a"),)
    first = eval_fingerprint(config, splits, 2)
    assert eval_fingerprint(config, splits, 2) == first
    more = dataclasses.replace(config, sequence_length=32)
    others = [
        eval_fingerprint(config, splits, 3),
        eval_fingerprint(more, splits, 2),
        eval_fingerprint(config, (make_split("b"),), 2),
    ]
    assert len({first, *others}) == 4


def test_a_batch_of_more_rows_than_there_are_is_refused():
    check_batch(make_config("a"), 4)
    with pytest.raises(InputError, match=r"batch_size=4 is more than the 3 rows"):
        check_batch(make_config("a"), 3)


def test_a_short_held_out_file_has_the_documents_of_the_training_files(tmp_path):
    ids = np.arange(200, dtype="<u2")
    np.append(ids, 50256).astype("<u2").tofile(tmp_path / "train.bin")
    ids[::-1].tofile(tmp_path / "val.bin")
    config = make_config(str(tmp_path), cross_document_attention=False)
    (held_out,) = open_eval(config)
    assert held_out.end_of_document == 50256
