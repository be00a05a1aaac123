# SPDX-License-Identifier: Apache-2.0
"""Config files, overrides and JSON: what is read, and how wrong input is refused."""

import dataclasses
import json

import numpy as np
import pytest

from jaxllm.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    load_config,
    override,
    presets,
)
from jaxllm.config.fields import unknown_setting
from jaxllm.config.files import check_types, config_from_dict, config_to_dict, flatten
from jaxllm.errors import InputError

CONFIG = Config(
    steps=100,
    model=presets.tiny_1m(windows=(0, 16)),
    data=DataConfig(
        paths=("a", "b"), weights=(1.0, 3.0), sequence_length=64, batch_size=8
    ),
    optimizer=OptimizerConfig(lr=1e-3),
)

FILE = """\
from jaxllm.config import Config, DataConfig
from jaxllm.config import OptimizerConfig, presets
STEPS = 100
def get_config():
    return Config(
        steps=STEPS,
        model=presets.tiny_1m(),
        data=DataConfig(paths=("a",), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-3),
    )
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str):
        path = tmp_path / "run.py"
        path.write_text(text)
        return path

    return write_file


def refusal(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    return str(error.value)


# Config files


def test_a_file_is_read_from_any_directory_and_leaves_nothing_behind(
    write, monkeypatch
):
    path = write(FILE)
    monkeypatch.chdir(path.parent)
    assert load_config(path) == load_config("run.py") == load_config("./run.py")
    assert load_config(path).steps == 100
    assert [other.name for other in path.parent.iterdir()] == ["run.py"]


def test_a_changed_file_is_read_again(write):
    load_config(write(FILE))
    assert load_config(write(FILE.replace("STEPS = 100", "STEPS = 101"))).steps == 101


def test_overrides_of_a_file_are_typed(write):
    config = load_config(write(FILE), {"optimizer.lr": "3e-4", "steps": "1e3"})
    assert (config.optimizer.lr, config.steps) == (3e-4, 1000)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps=STEPS", "steps='100'", "line 5: config.steps='100' must be int."),
        ("lr=1e-3", "lr=None", "config.optimizer.lr=None must be float."),
        ("lr=1e-3", "lr='x'", "line 9: config.optimizer.lr='x' must be float."),
        ("lr=1e-3", "lr=True", "config.optimizer.lr=True must be float."),
        ("lr=1e-3", "lr=-1.0", "line 9: config.optimizer.lr=-1.0 must be above 0."),
        ("lr=1e-3", "lrr=1", "did you mean config.optimizer.lr?"),
        ("lr=1e-3", "", "missing 1 required keyword-only argument: 'lr'"),
        ("lr=1e-3", "lr=1., name='Adamw'", "did you mean adamw?"),
        ('("a",)', '"a"', "config.data.paths='a' must be tuple[str, ...], such as"),
        ('("a",)', '["a"]', "config.data.paths=['a'] must be tuple[str, ...]"),
        ("OptimizerConfig(lr=1e-3)", "dict(lr=1)", "must be OptimizerConfig"),
        ("tiny_1m()", "tiny_1m(n_layers=2)", "did you mean config.model.num_layers?"),
        ("STEPS,", "1 // 0,", "line 6: ZeroDivisionError: integer division"),
        ("STEPS = 100", "STEPS = ", "line 3: SyntaxError: invalid syntax."),
        ("STEPS = 100", "import nothing", "line 3 imports nothing, which is not inst"),
        ("def get_config", "def config", "has no get_config()"),
        ("return Config(", "return dict(", "get_config() returned dict; it must"),
        ("get_config()", "get_config(a)", "get_config() missing 1 required"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_reason(write, old, new, message):
    assert old in FILE
    path = write(FILE.replace(old, new))
    text = refusal(load_config, path)
    assert message in text
    assert str(path) in text or text.startswith("config.")


def test_a_file_that_is_not_there_is_refused_with_a_similar_one(write):
    path = write(FILE)
    text = refusal(load_config, path.with_name("runn.py"))
    assert text.endswith(f"runn.py does not exist; did you mean {path}?")
    assert "is a directory" in refusal(load_config, path.parent)


# Overrides


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "1.5", "config.steps='1.5' must be int."),
        ("steps", "many", "config.steps='many' must be int."),
        ("steps", "inf", "config.steps='inf' must be int."),
        ("steps", "none", "config.steps='none' must be int."),
        ("steps", True, "config.steps=True must be int."),
        ("steps", 2.5, "config.steps=2.5 must be int."),
        ("optimizer.lr", "fast", "config.optimizer.lr='fast' must be float."),
        ("optimizer.lr", None, "config.optimizer.lr=None must be float."),
        ("model.qk_norm", "maybe", "config.model.qk_norm='maybe' must be bool."),
        ("model.qk_norm", 1, "config.model.qk_norm=1 must be bool."),
        ("model.windows", "0,x", "must be tuple[int, ...]."),
        ("data.paths", 3, "config.data.paths=3 must be tuple[str, ...], such as (3,)."),
        (
            "optimizer.name",
            "adamv",
            "config.optimizer.name='adamv' must be one of adamw, muon, adafactor, "
            "lion, sgd; did you mean adamw?",
        ),
        (
            "optimizer.lrr",
            "1",
            "config.optimizer.lrr is not a setting; did you mean config.optimizer.lr?",
        ),
        ("lr", "1", "did you mean config.optimizer.lr?"),
        ("optimiser.lr", "1", "did you mean config.optimizer.lr?"),
        ("every", "1", "config.eval.every or config.checkpoint.every or"),
        ("steps.x", "1", "did you mean config.steps?"),
        ("kernels", "xla", "is a section, not a setting; set one of config.kernels."),
        ("zzzzzz", "1", "docs/settings.md lists them all."),
    ],
)
def test_a_wrong_override_is_refused_with_setting_value_and_rule(name, value, message):
    assert message in refusal(override, CONFIG, {name: value})


def test_all_wrong_overrides_are_named_at_once():
    text = refusal(override, CONFIG, {"stepz": 1, "steps": "x"})
    assert text.splitlines() == [
        unknown_setting("stepz"),
        "config.steps='x' must be int.",
    ]


def test_settings_that_depend_on_each_other_change_together():
    heads = {"model.num_heads": 3, "model.num_kv_heads": 3}
    for pairs in (heads, reversed(heads.items())):
        assert override(CONFIG, pairs).model.num_heads == 3
    across = {"data.batch_size": 9, "optimizer.microbatches": 3}
    assert override(CONFIG, across).optimizer.microbatches == 3
    assert "num_kv_heads=4" in refusal(override, CONFIG, {"model.num_heads": 3})


def test_the_last_of_repeated_overrides_counts():
    assert (
        override(CONFIG, [("steps", "1"), ("config.steps", 3), ("steps", 2)]).steps == 2
    )


def test_python_values_are_converted_to_the_type_of_the_setting():
    config = override(
        CONFIG,
        {
            "optimizer.lr": np.float32(0.5),
            "steps": np.int64(3),
            "optimizer.clip_norm": 1,
            "data.weights": [1, 2],
        },
    )
    changed = (config.optimizer.lr, config.steps, config.data.weights)
    assert changed == (0.5, 3, (1.0, 2.0))
    assert type(config.steps) is int
    assert type(config.optimizer.clip_norm) is float
    json.dumps(flatten(config))


def test_the_flat_config_and_its_text_are_overrides_that_make_it():
    other = Config(
        steps=1,
        model=presets.qwen3_0_6b(),
        data=DataConfig(paths=("c",), sequence_length=2, batch_size=1),
        optimizer=OptimizerConfig(lr=1.0, clip_norm=None),
    )
    flat = flatten(CONFIG)
    assert override(other, flat) == CONFIG
    assert override(other, {name: str(value) for name, value in flat.items()}) == CONFIG


# JSON


def test_a_config_survives_json():
    assert config_from_dict(json.loads(json.dumps(config_to_dict(CONFIG)))) == CONFIG


def test_json_with_other_keys_or_types_is_refused_by_name():
    values = config_to_dict(CONFIG)
    extra = values | {"stepz": 1}
    assert "did you mean config.steps?" in refusal(config_from_dict, extra)
    missing = {name: value for name, value in values.items() if name != "steps"}
    assert "config.steps is missing" in refusal(config_from_dict, missing)
    filled = {name: value for name, value in values.items() if name != "seed"}
    assert config_from_dict(filled) == CONFIG
    deep = values | {"optimizer": values["optimizer"] | {"b3": 1}}
    assert "config.optimizer.b3 is not a setting" in refusal(config_from_dict, deep)
    typed = values | {"steps": "100"}
    assert "config.steps='100' must be int." in refusal(config_from_dict, typed)
    assert "config.mesh=3" in refusal(config_from_dict, values | {"mesh": 3})
    assert "config=[]" in refusal(config_from_dict, [])


# Types


def test_types_are_checked_in_a_section_alone():
    check_types(CONFIG)
    check_types(CONFIG.model)
    wrong = dataclasses.replace(CONFIG.model, qk_norm="yes")  # pyright: ignore
    assert refusal(check_types, wrong) == "config.model.qk_norm='yes' must be bool."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import sys; sys.exit(0)", "it exits with 0; it must only define get_config"),
        ("raise SystemExit", "it exits with None; it must only define get_config"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("where", ["", "def get_config():\n    "])
def test_a_config_file_that_ends_the_program_is_refused(write, line, said, where):
    path = write(f"{where}{line}\n{'' if where else FILE}")
    assert refusal(load_config, path).startswith(
        f"{path}, line {2 if where else 1}: {said}"
    )
