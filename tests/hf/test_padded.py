# SPDX-License-Identifier: Apache-2.0
"""Rows with padding before them, and rows of several documents, give the same logits.

padded.npz is made by make_padded.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hf.cases import HERE, write_folder

from jaxllm.hf import load
from jaxllm.models import logits

# Windows and caps, learned positions, queries that grow, norms after, layers apart.
CASES = ("gemma2", "gpt2", "ministral3", "olmo3", "qwen3", "smollm3")
TOLERANCE = 24 * float(np.finfo(np.float32).eps)  # of the largest, as test_families.py

cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "ministral3" else pytest.mark.slow)
        for case in CASES
    ],
)


def read(case, tmp_path):
    config, params = load(write_folder(case, tmp_path / case))
    with np.load(HERE / "padded.npz") as arrays:
        known = {name: arrays[f"{case}/{name}"] for name in ("ids", "mask", "logits")}
    return dataclasses.replace(config, dtype="float32"), params, known


def close(found, wanted):
    bound = TOLERANCE * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@cases
def test_left_padded_rows_give_the_logits_of_transformers(case, tmp_path):
    config, params, known = read(case, tmp_path)
    mask = known["mask"]
    assert mask[:, -1].all() and not mask[1:, 0].any()
    run = jax.jit(logits, static_argnums=0)
    found = np.asarray(run(config, params, known["ids"], mask.astype(np.int32)))
    close(found[mask], known["logits"][mask])


@cases
def test_documents_of_a_packed_row_give_the_logits_that_each_has_alone(case, tmp_path):
    config, params, known = read(case, tmp_path)
    alone = [ids[mask] for ids, mask in zip(known["ids"], known["mask"], strict=True)]
    sizes = [*map(len, alone), 2]  # and padding at the end
    tokens = np.concatenate([*alone, np.zeros(2, np.int32)])[None]
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), sizes)[None]
    run = jax.jit(logits, static_argnums=0)
    found = np.asarray(run(config, params, tokens, segments))[0]
    close(found[: sum(sizes[:-1])], known["logits"][known["mask"]])
