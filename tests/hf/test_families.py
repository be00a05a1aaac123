# SPDX-License-Identifier: Apache-2.0
"""Every family gives the logits and the tokens of transformers."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf.cases import PROMPTS, all_cases, reference, write_folder

from jaxllm.errors import InputError
from jaxllm.hf import load
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.settings import read_model
from jaxllm.hf.writing import differences, family_of, write_model
from jaxllm.inference import Sampling
from jaxllm.inference.sampling import sample_tokens
from jaxllm.models import Model, logits

# Of the largest logit: float32 roundings of the products and sums of some layers.
TOLERANCE = 24 * float(np.finfo(np.float32).eps)
# One of each mechanism; the others are variants.
FAST = (
    *("llama_llama3", "qwen3_yarn", "gemma2", "gemma3_text", "phi3_window", "olmo3"),
    *("gpt2", "gpt_neox", "cohere_qk_norm", "smollm3", "granitemoe", "ministral3"),
    *("gpt_oss", "nanochat", "llama4_text", "qwen2_moe_interval", "glm4_moe"),
)
CASES = [
    pytest.param(case, marks=() if case in FAST else pytest.mark.slow)
    for case in all_cases()
]


def test_each_family_has_a_case():
    kinds = {case["config"]["model_type"] for case in all_cases().values()}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    config, params = load(write_folder(case, tmp_path / case))
    known = reference(case)
    run = jax.jit(logits, static_argnums=0)
    found = run(dataclasses.replace(config, dtype="float32"), params, known["ids"])
    assert found.dtype == jnp.float32
    bound = TOLERANCE * np.abs(known["logits"]).max()
    np.testing.assert_allclose(found, known["logits"], rtol=0, atol=bound)


def _marks(case: str, seen: set[str]):
    """Returns the marks of a case, which CI has for one of each family."""
    if case in ("gemma2", "gpt2", "llama4_text"):
        return ()
    kind = all_cases()[case]["config"]["model_type"]
    again = kind in seen
    seen.add(kind)
    return pytest.mark.whole if again else pytest.mark.slow


# Longrope takes its factors by the length of the row: transformers by that of the text
# so far, which changes while it generates.
GREEDY = [case for case in all_cases() if case != "phi3_longrope"]
_SEEN: set[str] = set()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=_marks(case, _SEEN)) for case in GREEDY]
)
def test_greedy_tokens_of_prompts_of_two_lengths_are_those_of_transformers(
    case, tmp_path
):
    config, params = load(write_folder(case, tmp_path / case))
    known = reference(case)
    prompts = [
        row[:size].tolist() for row, size in zip(known["ids"], PROMPTS, strict=True)
    ]
    model = Model(dataclasses.replace(config, dtype="float32"))
    number = known["greedy"].shape[1]
    columns = sample_tokens(
        model, params, prompts, max_tokens=number, sampling=Sampling(temperature=0.0)
    )
    made = np.array(list(columns)).T
    for row, wanted in zip(made, known["greedy"], strict=True):
        clear = int((wanted >= 0).sum())  # up to where two are about equally likely
        assert clear > 0
        np.testing.assert_array_equal(row[:clear], wanted[:clear])


@pytest.mark.parametrize("case", all_cases())
def test_settings_are_the_same_after_writing_and_reading(case):
    given = all_cases()[case]["config"]
    kind, model = read_model(given, case)
    written = json.loads(json.dumps(write_model(kind, model)))
    assert differences(model, read_model(written, case)[1]) == []


@pytest.mark.parametrize("case", all_cases())
def test_a_model_of_unknown_origin_finds_a_family_that_says_all_of_it(case):
    _, model = read_model(all_cases()[case]["config"], case)
    written = write_model(family_of(model), model)
    assert differences(model, read_model(written, case)[1]) == []


@pytest.mark.parametrize("case", all_cases())
def test_what_version_4_reads_is_written_beside_what_version_5_reads(case):
    kind, model = read_model(all_cases()[case]["config"], case)
    written = write_model(kind, model)
    if kind != "gpt2":
        assert written["rope_theta"] == model.rope_theta
        scaling = written.get("rope_scaling")
        assert (scaling is not None) == (model.rope.scaling != "none")
        old = {k: v for k, v in written.items() if k != "rope_parameters"}
        assert differences(model, read_model(old, case)[1]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "model_type='bert' is not a family"),
        ({"model_type": None}, "model_type=None is not a family"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be honoured"),
        ({"new_key": 3}, "new_key=3 is not known"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_attention_heads": "4"}, "num_attention_heads is missing or no whole"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "x": 1}}, "x of RoPE"),
        ({"rope_scaling": "linear"}, "a setting has a wrong value"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be honoured"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"head_dim": 7}, "must be even"),
        ({"vocab_size": 3.5}, "vocab_size is missing or no whole"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not honoured"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(changes, said):
    given = {**all_cases()["llama_plain"]["config"], **changes}
    if "rope_scaling" in changes:
        del given["rope_parameters"]
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_model(given, "config.json")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba"] * 3}, "layer_types has mamba"),
        ("granitemoehybrid", {"layer_types": None}, "layer_types has mamba"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func='softmax' cannot be"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True cannot"),
        ("qwen3_moe_listed", {"mlp_only_layers": [0, 1, 2, 3, 4]}, "no layer experts"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "no layer experts"),
    ],
)
def test_mixtures_that_cannot_be_honoured_are_refused_by_name(case, changes, said):
    with pytest.raises(InputError, match=said):
        read_model({**all_cases()[case]["config"], **changes}, "config.json")


@pytest.mark.parametrize(
    ("step", "dense", "first", "layers"),
    [
        (1, [0, 1], 2, (True,)),
        (2, [], 0, (False, True)),
        (2, [1], 2, (False, True)),
        (1, [0, 3, 4], 1, (True, True, True, False, False)),
    ],
)
def test_few_layers_are_compiled_one_by_one(step, dense, first, layers):
    given = {**all_cases()["qwen2_moe"]["config"], "num_hidden_layers": 6}
    given |= {"decoder_sparse_step": step, "mlp_only_layers": dense}
    given["layer_types"] = ["full_attention"] * 6
    moe = read_model(given, "config.json")[1].moe
    assert (moe.variant.first_dense, moe.variant.layers) == (first, layers)


def test_the_document_lists_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = page.partition("| `model_type` |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    listed = [name for row in rows for name in re.findall("`([a-z0-9_]+)`", row)]
    assert sorted(listed) == sorted(FAMILIES)
    assert f"by {len(all_cases())} small models" in " ".join(page.split())
