# SPDX-License-Identifier: Apache-2.0
"""A kernel that gives wrong numbers is found before training, and one that does not."""

import jax
import pytest

from jaxllm import flags
from jaxllm.plan import kernels
from jaxllm.train import train
from pallas_kernels import mosaic, self_check
from pallas_kernels.choice import Choice
from pallas_kernels.norm import op as norm_op
from pallas_kernels.self_check import KernelMismatch


@pytest.fixture
def wrong_norm(monkeypatch):
    """Plants a norm kernel whose last row is off by a part of itself."""
    right = norm_op.forward

    def wrong(*args, **options):
        *total, y_RD = right(*args, **options)
        return *total, y_RD.at[-1].multiply(2)

    monkeypatch.setattr(norm_op, "forward", wrong)


def test_checks_pass_where_there_is_nothing_wrong():
    with mosaic.interpret():
        self_check.check_norm("mosaic", "bfloat16", kind="layernorm", width=64)
        self_check.check_grouped_matmul("mosaic", "bfloat16", width=64, num_columns=64)
    # Other kernels have tests of their own; here, that what is compared is the same.
    for packed in (False, True):
        self_check.check_attention(
            "xla",
            "bfloat16",
            num_groups=2,
            head_dim=16,
            packed=packed,
            window=24,
            softcap=8.0,
        )
    for letters in ("DV", "VD"):
        self_check.check_cross_entropy(
            "xla",
            "bfloat16",
            width=32,
            num_words=96,
            letters=letters,
            softcap=None,
            z_loss=1e-3,
        )


def test_training_is_refused_before_anything_is_written(
    wrong_norm, tiny, tmp_path, monkeypatch
):
    (norm,) = (ask for ask in kernels.ASKS if ask.label == "norm")
    chosen = {norm: Choice("mosaic", "")}
    monkeypatch.setattr(kernels, "choose_kernels", lambda *_: chosen)
    message = "rmsnorm implementation=mosaic gives wrong numbers on interpreted: its "
    message += r"result 0 differs from plain JAX by \d"
    with mosaic.interpret(), pytest.raises(KernelMismatch, match=message) as error:
        next(train(tiny(), tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    assert flags.explain(error.value) == (flags.FAILED, str(error.value))


def test_self_check_can_be_switched_off(tiny, tmp_path, monkeypatch):
    def refuse(*_):
        raise KernelMismatch

    monkeypatch.setattr("jaxllm.run.startup.check_kernels", refuse)
    with pytest.raises(KernelMismatch):
        next(train(tiny(), tmp_path / "on"))
    records = train(tiny({"kernels.self_check": False}), tmp_path / "off")
    assert next(records)["step"] == 0
    records.close()


def test_nan_is_a_mismatch():
    with pytest.raises(KernelMismatch, match="nan"):
        self_check._compare(
            "test",
            "other",
            lambda name, x: x if name == "xla" else x * jax.numpy.nan,
            (jax.numpy.ones(3),),
        )
