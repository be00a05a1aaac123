# SPDX-License-Identifier: Apache-2.0
"""Every token file format is read as its publisher wrote it, or refused by name."""

import dataclasses
import json
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.formats import TokenSplit, open_tokens, verify
from jaxllm.data.sample import looks_like_uint32
from jaxllm.data.token_file import check_ends
from jaxllm.errors import InputError
from jaxllm.text.token_folder import TokenSettings, make_token_folder

TOKENS = np.arange(1000) * 7 % 50257


def make_split(shards) -> TokenSplit:
    return TokenSplit(
        path="x",
        shards=tuple(np.array(shard, np.uint16) for shard in shards),
        document_ends=None,
        end_of_document=None,
        vocab_size=2**16,
        vocab_known=False,
        fingerprint="",
        tokenizer=None,
    )


def write_llmc(path, tokens, *, magic=20240520, version=1, dtype="<u2", num=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if num is None else num
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(dtype).tobytes())


def write_megatron(path, sequences, document_sequences, *, code=8, dtype="<u2"):
    lengths = [len(sequence) for sequence in sequences]
    itemsize = np.dtype(dtype).itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * itemsize
    content = b"MMIDIDX\0\0" + struct.pack("<QB", 1, code)
    content += struct.pack("<QQ", len(sequences), len(document_sequences))
    content += np.array(lengths, "<i4").tobytes() + offsets.astype("<i8").tobytes()
    content += np.array(document_sequences, "<i8").tobytes()
    path.with_suffix(".idx").write_bytes(content)
    path.write_bytes(np.concatenate(sequences).astype(dtype).tobytes())


def open_train(path) -> TokenSplit:
    split = open_tokens(str(path), "train")
    assert split is not None
    return split


@pytest.fixture
def token_folder(tmp_path):
    """A folder of three documents of bytes, in shards of 4 tokens."""
    text = tmp_path / "text.jsonl"
    documents = ["first", "second one", "3"]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    settings = TokenSettings(
        input=[str(text)],
        tokenizer="bytes",
        text_field="text",
        stdin_format="text",
        append_end_of_document=True,
        end_of_document=None,
        holdout=0.0,
        holdout_by="document",
        shard_tokens=4,
    )
    make_token_folder(settings, str(tmp_path / "tokens"))
    return tmp_path / "tokens"


@given(
    st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1), min_size=1, max_size=5),
    st.data(),
)
def test_a_slice_is_that_of_all_shards_end_to_end(shards, data):
    split = make_split(shards)
    whole = np.concatenate(shards)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    part = split.slice(start, stop)
    assert part.dtype == np.int32
    np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("start, stop", [(-1, 2), (0, 5), (3, 2)])
def test_a_slice_beyond_the_tokens_is_an_error(start, stop):
    with pytest.raises(IndexError):
        make_split([[1, 2], [3, 4]]).slice(start, stop)


def test_the_end_of_a_document_is_before_the_first_token():
    split = dataclasses.replace(make_split([[1, 2], [3, 4]]), end_of_document=9)
    assert split.slice(-1, 3).tolist() == [9, 1, 2, 3]
    assert split.slice(-1, 0).tolist() == [9]
    assert split.slice(-1, -1).tolist() == []
    for start in (-2, 5):
        with pytest.raises(IndexError):
            split.slice(start, 5)


def test_nanogpt_files_are_raw_uint16(tmp_path):
    (tmp_path / "train.bin").write_bytes(TOKENS.astype("<u2").tobytes())
    split = open_train(tmp_path / "train.bin")
    np.testing.assert_array_equal(split.slice(0, 1000), TOKENS)
    assert split.document_ends is None
    assert (split.vocab_size, split.vocab_known) == (2**16, False)


@pytest.mark.parametrize(
    "magic, version, dtype, top",
    [(20240520, 1, "<u2", 50256), (20240801, 7, "<u4", 128255)],
)
def test_llmc_files_have_a_header_and_either_width(
    tmp_path, magic, version, dtype, top
):
    tokens = np.array([1, 2, top])
    write_llmc(tmp_path / "x.bin", tokens, magic=magic, version=version, dtype=dtype)
    split = open_train(tmp_path / "x.bin")
    np.testing.assert_array_equal(split.slice(0, 3), tokens)
    assert split.vocab_size > top


@pytest.mark.parametrize("code, dtype", [(8, "<u2"), (4, "<i4"), (1, "u1")])
@pytest.mark.parametrize("name", ["data_text_document", "data_text_document.bin"])
def test_megatron_pairs_know_their_documents(tmp_path, code, dtype, name):
    path = tmp_path / "data_text_document.bin"
    # The second document has two sequences.
    sequences = [[1, 2, 3], [4], [5, 6]]
    write_megatron(path, sequences, [0, 1, 3], code=code, dtype=dtype)
    split = open_train(tmp_path / name)
    np.testing.assert_array_equal(split.slice(0, 6), [1, 2, 3, 4, 5, 6])
    assert split.document_ends is not None
    np.testing.assert_array_equal(split.document_ends, [3, 6])
    assert split.end_of_document is None  # 3 and 6
    write_megatron(path, [[1, 6], [], [4], [6]], [0, 1, 2, 4], code=code, dtype=dtype)
    split = open_train(tmp_path / name)
    assert split.document_ends is not None
    assert split.document_ends.tolist() == [2, 4]  # without the empty one
    assert split.end_of_document == 6


@pytest.mark.parametrize(
    "number, usual, write",
    [
        (50256, 50256, lambda path, ids: ids.astype("<u2").tofile(path)),
        (50257, None, lambda path, ids: ids.astype("<u2").tofile(path)),  # no GPT-2
        (50255, None, lambda path, ids: ids.astype("<u2").tofile(path)),
        (50256, 50256, write_llmc),
        (
            128000,
            128000,
            lambda path, ids: write_llmc(
                path, ids, magic=20240801, version=7, dtype="<u4"
            ),
        ),
    ],
)
def test_the_usual_token_between_documents_is_found_where_it_occurs(
    tmp_path, number, usual, write
):
    ids = np.append(TOKENS, [number, 50256 if number == 50257 else 0])
    write(tmp_path / "x.bin", ids)
    split = open_train(tmp_path / "x.bin")
    assert (split.end_of_document, split.document_ends) == (usual, None)
    named = open_tokens(str(tmp_path / "x.bin"), "train", end_of_document=5)
    assert named is not None and named.end_of_document == 5


@pytest.mark.parametrize("number", [0, 3 * 4096 + 7, 511 * 4096 + 4095])
def test_a_changed_token_is_noticed_where_it_was_sampled(tmp_path, number):
    tokens = np.random.default_rng(0).integers(0, 99, 512 * 4096).astype("<u2")
    before = write_and_open(tmp_path, tokens)
    sampled = any(
        number in range(start, start + 4096)
        for start in (2 * (511 * 4096 * block // 255 // 2) for block in range(256))
    )
    tokens[number] += 1
    assert (write_and_open(tmp_path, tokens) != before) == sampled


def write_and_open(folder, tokens) -> str:
    tokens.tofile(folder / "x.bin")
    return open_train(folder / "x.bin").fingerprint


def test_a_token_folder_that_changed_has_another_fingerprint(token_folder, tmp_path):
    before = open_train(token_folder).fingerprint
    moved = shutil.move(token_folder, tmp_path / "moved")
    assert open_train(moved).fingerprint == before
    for name, content in (("train-00001.bin", b"zz"), ("train-ends.bin", b"\1")):
        path = Path(moved) / name
        whole = path.read_bytes()
        path.write_bytes(content + whole[len(content) :])
        assert open_train(moved).fingerprint != before
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "ends", [b"\xff" * 24, [6, 6, 19], [0, 6, 19], [6, 17, 20], [17, 6, 19]]
)
def test_ends_of_documents_that_cannot_be_are_damage(token_folder, ends):
    path = token_folder / "train-ends.bin"
    assert np.fromfile(path, "<i8").tolist() == [6, 17, 19]
    path.write_bytes(ends if isinstance(ends, bytes) else np.array(ends, "<i8"))
    with pytest.raises(InputError, match=r"train-ends\.bin is damaged: .* up to 19"):
        open_train(token_folder)


def test_ten_million_ends_are_checked_at_once():
    ends = np.arange(1, 10_000_001, dtype=np.int64) * 7
    began_at_s = time.perf_counter()
    check_ends("x", ends, 70_000_000, empty=False)
    assert time.perf_counter() - began_at_s < 0.5  # 0.03 s on a machine that is idle


@given(st.integers(0, 2**32 - 1), st.integers(2, 2**16), st.floats(0, 20))
def test_a_stream_of_uint16_is_never_taken_for_uint32(seed, vocab_size, skew):
    rng = np.random.default_rng(seed)
    ids = (rng.random(3000) ** (1 + skew) * vocab_size).astype(np.uint16)
    rng.shuffle(kinds := np.arange(vocab_size, dtype=np.uint16))
    for stream in (ids, kinds[ids], np.sort(ids), np.repeat(ids, 2), ids[:130]):
        assert not looks_like_uint32(len(stream), make_split([stream]).slice)


@pytest.mark.parametrize("vocab_size", [300, 32_000, 128_256, 262_144])
def test_raw_uint32_is_refused_and_read_when_named(tmp_path, vocab_size):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 5000)
    tokens.astype("<u4").tofile(tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"config\.data\.raw_dtype=uint32"):
        open_train(tmp_path / "x.bin")
    split = open_tokens(str(tmp_path / "x.bin"), "train", raw_dtype="uint32")
    assert split is not None
    np.testing.assert_array_equal(split.slice(0, 5000), tokens)
    split = open_tokens(str(tmp_path / "x.bin"), "train", raw_dtype="uint16")
    assert split is not None and split.num_tokens == 10_000


def test_an_id_beyond_int32_is_an_error(tmp_path):
    np.array([5, 2**32 - 1], "<u4").tofile(tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x\.bin has the token 4294967295"):
        open_tokens(str(tmp_path / "x.bin"), "train", raw_dtype="uint32")


def test_a_file_that_is_cut_off_in_use_is_one_error(tmp_path):
    (tmp_path / "x.bin").write_bytes(TOKENS.astype("<u2").tobytes())
    split = open_train(tmp_path / "x.bin")
    os.truncate(tmp_path / "x.bin", 1000)
    np.testing.assert_array_equal(split.slice(0, 500), TOKENS[:500])
    with pytest.raises(InputError, match=r"x\.bin was cut off .* ends at byte 1000"):
        split.slice(400, 600)


def test_a_file_that_is_replaced_in_use_is_read_as_it_was(tmp_path):
    (tmp_path / "x.bin").write_bytes(TOKENS.astype("<u2").tobytes())
    split = open_train(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(b"")
    (tmp_path / "y.bin").replace(tmp_path / "x.bin")
    np.testing.assert_array_equal(split.slice(0, 1000), TOKENS)


def test_a_folder_of_others_has_their_val_files_as_eval(tmp_path):
    write_llmc(tmp_path / "fineweb_val_000000.bin", [9])
    write_llmc(tmp_path / "fineweb_train_000002.bin", [3, 4])
    write_llmc(tmp_path / "fineweb_train_000001.bin", [1, 2])
    held_out = open_tokens(str(tmp_path), "eval")
    assert held_out is not None
    np.testing.assert_array_equal(held_out.slice(0, 1), [9])
    np.testing.assert_array_equal(open_train(tmp_path).slice(0, 4), [1, 2, 3, 4])
    glob = open_train(tmp_path / "fineweb_train_*.bin")
    np.testing.assert_array_equal(glob.slice(0, 4), [1, 2, 3, 4])
    assert open_tokens(str(tmp_path / "fineweb_val_000000.bin"), "eval") is None


def test_the_fingerprint_is_that_of_the_tokens_not_of_their_files(tmp_path):
    write_llmc(tmp_path / "a.bin", TOKENS)
    (tmp_path / "b.bin").write_bytes(TOKENS.astype("<u2").tobytes())
    write_llmc(tmp_path / "c-1.bin", TOKENS[:300])
    write_llmc(tmp_path / "c-2.bin", TOKENS[300:])
    write_llmc(tmp_path / "d.bin", TOKENS[::-1])
    a, b, c, d = (
        open_train(tmp_path / name).fingerprint
        for name in ("a.bin", "b.bin", "c-*.bin", "d.bin")
    )
    assert a == b == c != d


def test_a_token_folder_gives_back_its_text_and_boundaries(token_folder):
    split = open_train(token_folder)
    assert len(split.shards) > 1
    assert split.document_ends is not None
    first, second, third = split.document_ends
    assert bytes(split.slice(0, first - 1).tolist()) == b"first"
    assert bytes(split.slice(first, second - 1).tolist()) == b"second one"
    assert split.slice(third - 1, third).tolist() == [256]
    assert (split.vocab_size, split.vocab_known) == (257, True)
    assert split.end_of_document == 256
    assert open_tokens(str(token_folder), "eval") is None
    verify(str(token_folder))


@pytest.mark.parametrize("name", ["train-00001.bin", "train-ends.bin"])
def test_one_flipped_bit_is_found_by_verify(token_folder, name):
    content = bytearray((token_folder / name).read_bytes())
    content[3] ^= 1
    (token_folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} has changed"):
        verify(str(token_folder))


@pytest.mark.parametrize("name", ["train-00001.bin", "train-ends.bin"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_missing_or_short_file_is_refused_when_opened(token_folder, name, damage):
    path = token_folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "shorter":
        path.write_bytes(content[:-1])
    for read in (open_train, verify):
        with pytest.raises(InputError, match=rf"{name} .*manifest.json says"):
            read(str(token_folder))


def change_manifest(*keys, value):
    def change(text: str) -> str:
        content = json.loads(text)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-30], "damaged: it is not JSON"),
        (lambda text: "", "damaged: it is not JSON"),
        (lambda text: "[]", "has format None"),
        (change_manifest("format", value="other"), "has format 'other'"),
        (change_manifest("dtype", value="int8"), "dtype is 'int8'"),
        (change_manifest("splits", value=[]), "damaged"),
        (
            change_manifest("splits", "train", "num_tokens", value=1),
            "sum of its shards",
        ),
        (change_manifest("splits", "train", "num_documents", value=1), "num_documents"),
        (change_manifest("splits", "train", "sha256", value=None), "sha256 is None"),
        (change_manifest("splits", "test", value={}), "unknown split 'test'"),
        (
            change_manifest("splits", "train", "ends", "name", value="../x"),
            "damaged: a file name leaves the folder",
        ),
        (change_manifest("tokenizer", "vocab_size", value=-1), "vocab_size is -1"),
        (change_manifest("tokenizer", "vocab_size", value=2**32), "exceeds int32"),
        (
            change_manifest("settings", "append_end_of_document", value=None),
            "append_end_of_document is None",
        ),
        (change_manifest("tokenizer", "more", value=1), "should have the keys"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(token_folder, change, message):
    path = token_folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=r"manifest\.json") as error:
        open_train(token_folder)
    assert message in str(error.value)


def test_a_folder_that_is_not_finished_is_refused(token_folder):
    (token_folder / "manifest.json").unlink()
    (token_folder / ".jaxllm-partial").mkdir()
    with pytest.raises(InputError, match="is not finished"):
        open_train(token_folder)


def write_raw(path, num_bytes):
    path.write_bytes(b"\1" * num_bytes)


def cut_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def damaged_megatron(folder, damage):
    path = folder / "x.bin"
    write_megatron(path, [[1, 2, 3], [4]], [0, 1, 2])
    damage(path)


def rewrite_index(position, content):
    def rewrite(path):
        index = bytearray(path.with_suffix(".idx").read_bytes())
        index[position : position + len(content)] = content
        path.with_suffix(".idx").write_bytes(index)

    return rewrite


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: None, "x.bin does not exist"),
        (lambda d: write_raw(d / "x.bin", 3), "has 3 bytes"),
        (lambda d: write_raw(d / "x.bin", 0), "holds no tokens"),
        (lambda d: write_llmc(d / "x.bin", [1], version=2), "has version 2"),
        (lambda d: write_llmc(d / "x.bin", [1], num=2), "header says 2 tokens"),
        (lambda d: write_llmc(d / "x.bin", [1], magic=20240522), "multiple-choice"),
        (lambda d: damaged_megatron(d, cut_last_byte), "is not what"),
        (lambda d: damaged_megatron(d, rewrite_index(0, b"N")), "not a Megatron index"),
        (lambda d: damaged_megatron(d, rewrite_index(9, b"\2")), "has version 2"),
        (lambda d: damaged_megatron(d, rewrite_index(17, b"\7")), "token type 7"),
        (lambda d: damaged_megatron(d, rewrite_index(18, b"\1")), "its header needs"),
        (lambda d: damaged_megatron(d, rewrite_index(34, b"\2")), "is not what"),
    ],
)
def test_a_damaged_file_of_others_is_refused_by_name(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        open_train(tmp_path / "x.bin")
    assert str(tmp_path) in str(error.value)


def test_what_is_no_token_file_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("text!!")
    with pytest.raises(InputError, match=r"x\.txt is not a token file"):
        open_train(tmp_path / "x.txt")
    with pytest.raises(InputError, match=r"neither manifest\.json nor \.bin files"):
        open_train(tmp_path)
    write_raw(tmp_path / "a.bin", 4)
    write_llmc(tmp_path / "b.bin", [1])
    with pytest.raises(InputError, match="different formats"):
        open_train(tmp_path)
