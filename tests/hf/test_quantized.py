# SPDX-License-Identifier: Apache-2.0
"""Tensors in fewer bits are read as their specifications say, and written plain."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hf.cases import all_cases, tensors, write_folder
from hf.weights import draw
from safetensors.numpy import load_file, save_file

from jaxllm.errors import InputError
from jaxllm.hf import load
from jaxllm.hf.carried import carry, read_carried
from jaxllm.hf.export import export
from jaxllm.hf.folder import Folder
from jaxllm.hf.quantized import decode
from jaxllm.hf.verify import verify

# Of the case gpt_oss, whose widths are no multiples of 32.
WIDER = {20: 64, 28: 96, 56: 192}


def write_mxfp4(folder: Path) -> dict[str, np.ndarray]:
    """Writes a small gpt_oss with experts in mxfp4; returns its plain tensors."""
    folder.mkdir()
    case, rng = all_cases()["gpt_oss"], np.random.default_rng(0)
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    config = case["config"] | sizes | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    plain, stored = {}, {}
    for name, shape in case["shapes"].items():
        shape = tuple(WIDER[n] if n in WIDER else n for n in shape)
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = draw("gpt_oss", name, shape)
            continue
        experts, inner, out = shape
        blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)
        scales = rng.integers(121, 127, (experts, out, inner // 32), np.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = by_definition(blocks, scales)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


def by_definition(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns [experts, in, out]: a sign, two exponent bits, one of the mantissa."""
    experts, out, number, _ = blocks.shape
    values = np.empty((experts, out, number, 32))
    for place in range(32):
        bits = blocks[..., place // 2].astype(int) >> (4 * (place % 2)) & 15
        sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
        normal = 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        value = np.where(exponent > 0, normal, mantissa / 2) * (1 - 2 * sign)
        values[..., place] = value * 2.0 ** (scales.astype(int) - 127)
    return values.reshape(experts, out, -1).swapaxes(1, 2).astype(np.float32)


def test_mxfp4_is_what_the_specification_says_whole_and_by_expert():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 5, 4, 16), np.uint8)
    scales = rng.integers(0, 255, (3, 5, 4), np.uint8)
    whole = by_definition(blocks, scales)
    np.testing.assert_array_equal(decode("mxfp4", blocks, scales), whole)
    np.testing.assert_array_equal(decode("mxfp4", blocks[2], scales[2]), whole[2])
    scales[0, 0, 0] = 255
    assert np.isnan(decode("mxfp4", blocks, scales)[0, :32, 0]).all()


def test_fp8_is_its_values_times_the_factor_of_their_block():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 300, 200)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2.0, (2, 3, 2)).astype(np.float32)
    each = scales.repeat(128, 1)[:, :300].repeat(128, 2)[:, :, :200]
    whole = values.astype(np.float32) * each
    np.testing.assert_array_equal(decode("fp8", values, scales), whole)
    np.testing.assert_array_equal(decode("fp8", values[1], scales[1]), whole[1])


def test_a_model_in_mxfp4_is_read_and_written_as_a_plain_one(tmp_path):
    plain = write_mxfp4(tmp_path / "mxfp4")
    assert "8 MXFP4" in verify(tmp_path / "mxfp4")[0]
    config, params = load(tmp_path / "mxfp4")
    with Folder(tmp_path / "mxfp4") as opened:
        carry(opened, tmp_path / "run")
    carried = read_carried(tmp_path / "run")
    export(config, params, tmp_path / "out", carried=carried)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in content
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == plain.keys()
    for name, tensor in plain.items():
        packed = name.endswith(("gate_up_proj", "down_proj"))
        assert written[name].dtype == (ml_dtypes.bfloat16 if packed else np.float32)
        np.testing.assert_array_equal(written[name].astype(np.float32), tensor)
    again, same = load(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_model_in_fp8_is_read(tmp_path):
    folder = write_folder("phi3", tmp_path / "phi3")
    found = tensors("phi3")
    stored = dict(found)
    for name, tensor in found.items():
        if name.endswith("proj.weight"):
            stored[name] = (tensor * 2).astype(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = np.full((1, 1), 0.5, np.float32)
            found[name] = stored[name].astype(np.float32) / 2
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    text = json.dumps(config | {"quantization_config": method})
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = load(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(text)
    model, params = load(folder)
    assert model == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, params, wanted[1])


@pytest.mark.parametrize(
    ("case", "method", "said"),
    [
        ("phi3", {"quant_method": "gptq"}, "quant_method='gptq' cannot be read"),
        ("phi3", {"quant_method": "mxfp4"}, "quant_method='mxfp4' cannot be read"),
        ("gpt_oss", {"quant_method": "bitsandbytes"}, "only mxfp4"),
        ("phi3", {"quant_method": "fp8"}, "weight_block_size=None cannot be read"),
        ("phi3", "fp8", "quant_method=None cannot be read"),
    ],
)
def test_other_methods_are_refused_by_name(case, method, said, tmp_path):
    folder = write_folder(case, tmp_path / case)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"quantization_config": method})
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        load(folder)
    assert said in str(error.value)


def test_blocks_of_another_shape_are_refused(tmp_path):
    write_mxfp4(tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in stored if name.endswith("down_proj_scales"))
    stored[name] = stored[name][:, :, :-1].copy()
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj: values U8 .* not those of mxfp4"):
        load(tmp_path / "mxfp4")
