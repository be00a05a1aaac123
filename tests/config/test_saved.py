# SPDX-License-Identifier: Apache-2.0
"""The config beside the checkpoints: whole or absent, and compared on resume."""

import dataclasses
import errno
import json
import os

import pytest

from jaxllm.config import Config, DataConfig, ModelConfig, OptimizerConfig
from jaxllm.config.saved import compare_configs, read_config, read_values, write_config
from jaxllm.errors import InputError

CONFIG = Config(
    steps=10,
    model=ModelConfig(
        vocab_size=257,
        num_layers=2,
        d_model=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        d_ff=16,
        windows=(4, 0),
    ),
    data=DataConfig(paths=("a", "b"), sequence_length=16, batch_size=2),
    optimizer=OptimizerConfig(lr=1e-3),
)


def changed(section: str | None = None, **values) -> Config:
    if section is None:
        return dataclasses.replace(CONFIG, **values)
    part = dataclasses.replace(getattr(CONFIG, section), **values)
    return dataclasses.replace(CONFIG, **{section: part})


def test_what_is_read_is_what_was_written_and_is_no_change(tmp_path):
    assert read_values(tmp_path / "run") is None
    for config in (changed(steps=3), CONFIG):
        write_config(tmp_path / "run", config)
    assert read_config(tmp_path / "run") == CONFIG
    saved = read_values(tmp_path / "run")
    assert saved is not None
    assert saved == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert compare_configs(saved, dataclasses.asdict(CONFIG)) == ([], [])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("new", "error", "note"),
    [
        (changed("model", d_ff=32), "config.model.d_ff: 16 -> 32", None),
        (changed("model", windows=(0,)), "config.model.windows: [4, 0] -> [0]", None),
        (changed("model", scan_layers=False), "scan_layers: true -> false", None),
        (changed(seed=1), "config.seed: 0 -> 1", None),
        (changed("model", remat="full"), None, 'remat: "none" -> "full"'),
        (changed("model", dtype="float32"), None, '"bfloat16" -> "float32"'),
        (changed("optimizer", clip_norm=None), None, "clip_norm: 1.0 -> null"),
        (changed(steps=20), None, "config.steps: 10 -> 20"),
        (changed("data", paths=("a",)), None, 'paths: ["a", "b"] -> ["a"]'),
    ],
)
def test_another_model_or_seed_is_an_error_and_other_changes_are_notes(
    new, error, note
):
    old, new = dataclasses.asdict(CONFIG), dataclasses.asdict(new)
    errors, notes = compare_configs(old, new)
    assert (len(errors), len(notes)) == (int(error is not None), int(note is not None))
    assert (error or note) in (errors + notes)[0]


def test_settings_that_one_side_lacks_are_changes():
    old, new = dataclasses.asdict(CONFIG), dataclasses.asdict(CONFIG)
    del old["model"]["qk_norm"]
    old["logging"]["colour"] = "red"
    del old["model"]["tie_embeddings"], old["kernels"]["attention"]
    new["model"]["tie_embeddings"] = True
    errors, notes = compare_configs(old, new)
    # Before it was a setting, it did what is now its default.
    assert errors == ["config.model.tie_embeddings: unset -> true"]
    assert notes == [
        'config.kernels.attention: unset -> "auto"',
        'config.logging.colour: "red" -> unset',
        "config.model.qk_norm: unset -> false",
    ]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_a_damaged_config_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    for read in (read_config, read_values):
        with pytest.raises(InputError, match=r"config\.json is not the JSON object"):
            read(tmp_path)
    assert path.read_text(encoding="latin-1") == text


def test_a_place_that_cannot_hold_a_config_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"config\.json cannot be written"):
        write_config(tmp_path / "file", CONFIG)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json cannot be written"):
        write_config(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        read_values(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]


def test_no_config_or_one_of_another_version_is_refused_by_its_path(tmp_path):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.json"):
        read_config(tmp_path)
    values = json.loads(json.dumps(dataclasses.asdict(CONFIG))) | {"stepz": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.json: config\.stepz is not a sett"):
        read_config(tmp_path)
    assert read_values(tmp_path) == values


def test_a_config_from_before_a_setting_has_its_default_and_says_so(tmp_path, caplog):
    values = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    del values["kernels"], values["model"]["mlp"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == CONFIG
    (message,) = caplog.messages
    assert "config.json was written before these settings: " in message
    assert 'config.model.mlp="swiglu"' in message
    assert 'config.kernels.attention="auto"' in message
    assert "config.steps" not in message
    del values["model"]["d_ff"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.model\.d_ff is missing, and has no"):
        read_config(tmp_path)


def test_a_full_disk_keeps_the_old_config_and_is_no_fault_of_the_input(
    tmp_path, monkeypatch
):
    def disk_full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_config(tmp_path, CONFIG)
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*config\.json'"):
        write_config(tmp_path, changed(steps=3))
    assert read_config(tmp_path) == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
