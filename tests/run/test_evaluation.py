# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out tokens: the same by the loop, by command, by hand."""

import json

import jax
import numpy as np
import pytest

import sharding
from jaxllm.config import override
from jaxllm.config.saved import read_config
from jaxllm.errors import InputError
from jaxllm.run.data import open_run_data
from jaxllm.run.evaluation import evaluate, evaluate_run
from jaxllm.run.saved_model import load_params
from jaxllm.step import compile_eval, prepare


def eval_losses(workdir) -> dict[int, float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}


@pytest.mark.parametrize("which", [4, 6, "latest", "best"])
def test_a_saved_step_has_the_loss_that_the_run_measured(trained, which):
    measured = eval_losses(trained)
    found = evaluate_run(trained, read_config(trained), which)
    step = which if isinstance(which, int) else 6
    assert found == {"step": step, "eval_loss": measured[step]}


def test_the_command_line_prints_one_line_of_json(trained, run_command, tmp_path):
    command = f"evaluate --workdir {trained} --step"
    ended = run_command(f"{command} best", tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert (ended.status, ended.stderr) == (0, "")
    measured = eval_losses(trained)
    assert json.loads(ended.stdout) == {"step": 6, "eval_loss": measured[6]}
    ended = run_command(f"{command} 4", tmp_path)
    assert json.loads(ended.stdout)["eval_loss"] == pytest.approx(measured[4], rel=1e-6)


def test_other_settings_of_the_evaluation_can_be_given(trained, run_command, tmp_path):
    command = f"evaluate --workdir {trained} --config.eval.batches="
    few = json.loads(run_command(f"{command}1", tmp_path).stdout)
    everything = json.loads(run_command(f"{command}0", tmp_path).stdout)
    assert few["step"] == everything["step"] == 6
    assert few["eval_loss"] != everything["eval_loss"]


def test_the_loss_is_the_mean_over_all_targets_however_they_are_cut(trained):
    config = override(read_config(trained), {"eval.batches": 0})
    losses = []
    for batch_size in (8, 24):
        cut = override(config, {"data.batch_size": batch_size})
        losses.append(evaluate_run(trained, cut, "latest")["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_loss_is_that_of_the_models_probabilities(trained):
    config = read_config(trained)
    setup = prepare(config, sharding.make_mesh(config.mesh.sizes))
    _, params = load_params(trained, config, "latest", setup.abstract_state.params)
    with open_run_data(setup).eval_batches() as batches:
        kept = list(batches)
    found = evaluate(compile_eval(setup), params, kept)["eval_loss"]

    def logits(params, batch):
        model = setup.model.bind(params)
        args = (batch[name] for name in ("tokens", "positions", "segments"))
        return model.logits(model(*args)[0])

    total = count = 0.0
    with jax.set_mesh(setup.mesh):
        for batch in kept:
            logits_BTV = np.asarray(jax.jit(logits)(params, batch), np.float64)
            targets_BT = np.asarray(batch["targets"])
            sums_BT = np.log(np.exp(logits_BTV).sum(-1))
            picked = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
            total += (sums_BT - picked)[targets_BT >= 0].sum()
            count += (targets_BT >= 0).sum()
    assert found == pytest.approx(total / count, rel=1e-6)


def test_the_held_out_batches_are_the_same_at_every_call(tiny):
    setup = prepare(tiny(), sharding.make_mesh({"fsdp": 8}))
    calls = []
    for _ in range(2):
        with open_run_data(setup).eval_batches() as batches:
            calls.append([np.asarray(batch["tokens"]) for batch in batches])
    assert len(calls[0]) == 2
    np.testing.assert_array_equal(*calls)


def test_held_out_tokens_outside_the_vocabulary_are_refused(tiny):
    setup = prepare(tiny({"model.vocab_size": 256}), sharding.make_mesh({"fsdp": 8}))
    with pytest.raises(InputError, match=r"config\.model\.vocab_size=256 must be"):
        open_run_data(setup)


def test_attention_that_this_machine_lacks_is_refused(tiny, tmp_path):
    config = tiny(
        {
            "kernels.attention": "cudnn",
            "model.dtype": "bfloat16",
            "data.cross_document_attention": True,
        }
    )
    with pytest.raises(InputError, match=r"config\.kernels\.attention=cudnn: .*cpu"):
        evaluate_run(tmp_path, config, "latest")
