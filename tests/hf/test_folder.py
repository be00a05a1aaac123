# SPDX-License-Identifier: Apache-2.0
"""A folder is read whole, placed as asked for, and written bitwise the same."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hf.cases import tensors, write_folder
from hf.faults import (
    INDEX,
    WEIGHTS,
    cut,
    drop,
    header,
    in_place_of,
    index_of,
    only,
    only_pickle,
    only_pickle_shards,
    put,
    settings,
    two_files,
    write,
    write_shards,
)
from safetensors.numpy import load_file, save_file

import sharding
from jaxllm.errors import InputError
from jaxllm.hf import load
from jaxllm.hf.carried import Carried, carry, read_carried
from jaxllm.hf.export import export
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.importing import import_folder
from jaxllm.hf.loading import read_params


@pytest.mark.parametrize(
    "case", ["qwen3_moe", "gpt_neox", "granitemoe", "gemma3_text", "gpt_oss"]
)
def test_each_mesh_has_the_parameters_of_one_device(case, tmp_path):
    folder = write_folder(case, tmp_path / case)
    config, whole = load(folder)
    sizes = {"fsdp": 2, "tensor": 2, "data": 2}
    mesh = sharding.make_mesh(sizes)
    with Folder(folder) as opened:
        model, _ = check(opened)
        # Some sizes of these small models are odd: those dimensions stay whole.
        target = jax.tree.map(
            lambda leaf: leaf.update(sharding=_fitting(leaf.shape, mesh)),
            model.abstract,
        )
        placed = read_params(opened, target)
    assert config == opened.config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), whole)
    jax.tree.map(lambda x, like: _same_place(x, like), placed, target)


def _fitting(shape, mesh) -> jax.NamedSharding:
    axes = iter(("fsdp", "tensor"))
    spec = [next(axes, None) if size % 2 == 0 else None for size in shape]
    return jax.NamedSharding(mesh, jax.P(*spec))


def _same_place(x, like):
    assert x.sharding == like.sharding


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_shards_of_any_dtype_are_read_and_written_bitwise(dtype, tmp_path):
    folder = write_shards("phi3", tmp_path / "phi3", dtype)
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    carried = read_carried(tmp_path / "run")
    files = export(config, params, tmp_path / "out", carried=carried)
    assert set(files) == {path.name for path in folder.iterdir()} | {"SHA256SUMS"}
    for path in folder.iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_smallest_numbers_survive_though_their_file_is_not_aligned(dtype, tmp_path):
    """Subnormal numbers, of which many processors make zeros."""
    folder = write_folder("llama_plain", tmp_path / "llama")
    found = {n: x.astype(dtype) for n, x in load_file(folder / WEIGHTS).items()}
    up = found["model.layers.1.mlp.up_proj.weight"]
    up.view(np.uint16)[:] = np.arange(1, up.size + 1).reshape(up.shape) % 128
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + size] + b" "  # one more: tensors begin at odd places
    (folder / WEIGHTS).write_bytes(
        len(text).to_bytes(8, "little") + text + content[8 + size :]
    )
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    export(config, params, tmp_path / "out", carried=read_carried(tmp_path / "run"))
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in found.items():
        np.testing.assert_array_equal(
            written[name].view(np.uint16), tensor.view(np.uint16), name
        )


@pytest.mark.parametrize(
    "case",
    [
        *("llama_plain", "gpt2", "gpt_neox", "glm4", "mixtral", "granitemoe"),
        *("gemma2", "gpt_oss", "qwen2_moe", "glm4_moe", "granitemoehybrid"),
    ],
)
def test_a_model_without_origin_is_written_as_transformers_writes_it(case, tmp_path):
    config, params = load(write_folder(case, tmp_path / case))
    export(config, params, tmp_path / "out", carried=Carried())
    written = load_file(tmp_path / "out" / WEIGHTS)
    wanted = tensors(case)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(written[name], tensor)
    again, _ = load(tmp_path / "out")
    assert again == config


def test_buffers_and_bare_names_of_an_import_are_not_written_again(tmp_path):
    folder = write_folder("gpt2", tmp_path / "gpt2")
    found = load_file(folder / WEIGHTS)
    bare = {n.removeprefix("transformer."): x for n, x in found.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    bare["wte.weight"] = bare["wte.weight"].astype(np.float16)
    save_file(bare, folder / WEIGHTS)
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    export(config, params, tmp_path / "out", carried=read_carried(tmp_path / "run"))
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert written.keys() == found.keys()
    assert written["transformer.wte.weight"].dtype == np.float16
    np.testing.assert_array_equal(written["transformer.wte.weight"], bare["wte.weight"])


def test_a_model_that_was_changed_since_its_import_is_not_exported(tmp_path):
    folder = write_folder("qwen2", tmp_path / "qwen2")
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    changed = dataclasses.replace(config, rope_theta=5.0)
    with pytest.raises(InputError, match="rope_theta"):
        export(
            changed, params, tmp_path / "out", carried=read_carried(tmp_path / "run")
        )
    assert not (tmp_path / "out").exists()


def test_files_that_travel_are_the_same_bytes(tmp_path):
    folder = write_folder("qwen2", tmp_path / "qwen2")
    texts = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ x }}\n",
        "generation_config.json": '{"eos_token_id": [2, 5]}',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "modeling_x.py").write_text("raise SystemExit")
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    carried = read_carried(tmp_path / "run")
    assert carried.end_tokens == (2, 5)
    files = export(config, params, tmp_path / "out", carried=carried)
    assert "modeling_x.py" not in files
    for name, text in texts.items():
        assert (tmp_path / "out" / name).read_text() == text


NORM = "model.norm.weight"
CODE = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(NORM), f"{NORM} is missing"),
        (drop("lm_head.weight"), "lm_head.weight is missing"),
        (put("extra", np.ones(2, np.float32)), "extra is not a parameter"),
        (put(NORM, np.ones(3, np.float32)), f"{NORM} has the shape [3]"),
        (put(QUERY, np.ones((20, 24), np.float32)), f"{QUERY} has the shape [20, 24]"),
        (put(NORM, np.ones(20, np.int8)), f"{NORM} is I8"),
        (settings(num_hidden_layers=4), "model.layers.3."),
        (settings(num_hidden_layers=2), "model.layers.2."),
        (settings(intermediate_size=30), "has the shape"),
        (settings(vocab_size=38), "has the shape"),
        (settings(quantization_config={"quant_method": "gptq"}), "gptq"),
        (settings(architectures=["LlamaForSequenceClassification"]), "Classification"),
        (write("config.json", b"{"), "is not JSON"),
        (write("config.json", b"[]"), "is not a JSON object"),
        (write("config.json", b"\xff\xfe"), "is not JSON"),
        (write(WEIGHTS, b""), "is not a safetensors file"),
        (write(WEIGHTS, b"\x08\0\0\0\0\0\0\0garbage!"), "is not a safetensors file"),
        (cut, "is not a safetensors file"),
        (only_pickle, "pickle"),
        (two_files, "both have"),
        (index_of(), "has no weight_map"),
        (index_of(a="../x.safetensors"), "is not a file of this folder"),
        (index_of(a="/etc/passwd"), "is not a file of this folder"),
        (index_of(a="x.bin"), "is not a file of this folder"),
        (index_of(a="absent.safetensors"), "absent.safetensors cannot be read"),
        (index_of(a=WEIGHTS), "says that a is in model.safetensors"),
        (index_of(a="sub/x.safetensors"), "is not a file of this folder"),
        (index_of(a=7), "'7' is not a file of this folder"),
        (write(INDEX, b'{"weight_map": ['), "is not JSON"),
        (write(INDEX, b'{"weight_map": ["a"]}'), "has no weight_map"),
        (write(WEIGHTS, b"\xff" * 64), "is not a safetensors file"),
        (write(WEIGHTS, header(5, 3)), "is not a safetensors file"),
        (write(WEIGHTS, header(0, 2**40)), "is not a safetensors file"),
        (in_place_of(WEIGHTS), f"{WEIGHTS} "),
        (in_place_of("config.json"), "config.json cannot be read"),
        (only("adapter_config.json"), "config.json cannot be read"),
        (only_pickle_shards, "pickle"),
        (put(QUERY, np.ones((24, 20), np.uint8)), f"{QUERY} is U8"),
        (put(QUERY, np.ones((24, 20), np.complex64)), f"{QUERY} is C64"),
        (settings(auto_map=CODE), "auto_map='modeling_own.OwnForCausalLM' is code"),
        (settings(model_type="own", auto_map=CODE), "model_type='own' is not a family"),
        (settings(architectures=["LlamaForTokenClassification"]), "Classification"),
        (settings(architectures=["LlamaForQuestionAnswering"]), "QuestionAnswering"),
        (settings(quantization_config={"quant_method": "bitsandbytes"}), "bitsandb"),
        (settings(quantization_config={"quant_method": "awq"}), "awq"),
        (settings(quantization_config={"quant_method": "fp8"}), "weight_block_size"),
        (settings(quantization_config={"quant_method": "compressed-tensors"}), "compr"),
        (settings(rope_parameters={"rope_type": "dynamic"}), "type 'dynamic'"),
        (settings(rope_scaling={"type": "dynamic", "factor": 2}), "type 'dynamic'"),
        (settings(tie_word_embeddings=True), "lm_head.weight is not model.embed"),
        (settings(tie_word_embeddings="yes"), "tie_embeddings"),
        (settings(num_hidden_layers=0), "num_layers"),
        (settings(num_hidden_layers=-1), "num_layers"),
        (settings(num_attention_heads=0), "num_heads"),
        (settings(text_config={}), "model_type='llama' is a multimodal model"),
        (
            settings(model_type="llava", text_config={}, architectures=None),
            "hidden_size is missing",
        ),
        (
            settings(
                model_type="llava",
                text_config={},
                architectures=None,
                quantization_config={"quant_method": "awq"},
            ),
            "awq",
        ),
        (
            settings(
                model_type="llava",
                text_config={"model_type": "bert"},
                architectures=["LlavaForConditionalGeneration"],
            ),
            "model_type='bert' is not a family",
        ),
    ],
)
def test_a_malformed_folder_is_refused_and_nothing_is_written(change, said, tmp_path):
    folder = write_folder("llama_plain", tmp_path / "llama")
    change(folder)
    with pytest.raises(InputError) as error:
        import_folder(folder, tmp_path / "run", {"fsdp": 1})
    assert said in str(error.value)
    assert str(folder) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_folder_is_refused(made, tmp_path):
    if made:
        (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder with a model"):
        import_folder(tmp_path / "file", tmp_path / "run", {"fsdp": 1})
    assert not (tmp_path / "run").exists()


def test_tied_weights_that_differ_are_refused_and_equal_ones_are_one(tmp_path):
    folder = write_folder("qwen3_yarn", tmp_path / "tied")
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    put("lm_head.weight", embedding)(folder)
    assert "output" not in load(folder)[1]
    put("lm_head.weight", embedding + 1)(folder)
    with pytest.raises(InputError, match="tie_word_embeddings=true"):
        load(folder)


def test_a_base_model_lacks_the_first_word_of_every_name(tmp_path):
    folder = write_folder("gpt2", tmp_path / "gpt2")
    whole = load(folder)[1]
    arrays = load_file(folder / WEIGHTS)
    bare = {name.removeprefix("transformer."): x for name, x in arrays.items()}
    save_file(bare, folder / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], whole)


def test_nothing_is_written_where_something_is(tmp_path):
    config, params = load(write_folder("llama_plain", tmp_path / "llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        export(config, params, tmp_path / "out", carried=Carried())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_names_of_layers_that_only_version_5_knows_are_written_in_both_versions_words(
    tmp_path,
):
    folder = write_folder("granitemoehybrid", tmp_path / "model")
    given = json.loads((folder / "config.json").read_text())
    assert given["layer_types"] == ["full_attention"] * 3  # version 4 refuses that
    config, params = load(folder)
    with Folder(folder) as opened:
        carry(opened, tmp_path / "run")
    export(config, params, tmp_path / "out", carried=read_carried(tmp_path / "run"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == ["attention"] * 3


def test_a_layer_behind_the_last_is_left_out_where_the_family_has_such_and_no_other(
    tmp_path,
):
    folder = write_folder("glm4_moe", tmp_path / "model")  # of three layers
    config, params = load(folder)
    put("model.layers.3.eh_proj.weight", np.ones((2, 2), np.float32))(folder)
    again, same = load(folder)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    put("model.layers.4.eh_proj.weight", np.ones((2, 2), np.float32))(folder)
    with pytest.raises(InputError, match=r"layers\.4\.eh_proj\.weight is not a param"):
        load(folder)
