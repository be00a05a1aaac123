# SPDX-License-Identifier: Apache-2.0
"""Verifies a folder of transformers, and compares its logits with theirs."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.loading import load
from jaxllm.hf.tensors import pieces
from jaxllm.models import logits

TOLERANCE = 1e-4  # of float32 logits of ordinary size, over all layers
_ROWS, _LENGTH = 2, 32


def verify(path: Path) -> list[str]:
    """Checks names, shapes, dtypes and values of a folder; returns what was found.

    With torch and transformers installed, logits are compared with theirs.

    Raises:
      InputError: something is wrong.
    """
    with Folder(path) as folder:
        model, rename = check(folder)
        names = {
            rename(p.name)
            for x in model.letters
            for p in pieces(model, folder.family, x)
        }
        dtypes: dict[str, int] = {}
        bad = []
        for name in sorted(names):
            entry = folder.entry(name)
            dtypes[entry.get_dtype()] = dtypes.get(entry.get_dtype(), 0) + 1
            if not np.isfinite(np.asarray(entry[:], np.float32)).all():
                bad.append(name)
        if bad:
            raise InputError(
                f"{path}: {len(bad)} tensors are not finite, first {bad[0]}."
            )
    kinds = ", ".join(f"{number} {dtype}" for dtype, number in sorted(dtypes.items()))
    lines = [f"{path}: {folder.model_type}, {len(names)} tensors ({kinds}), all finite"]
    try:
        lines.append(_compare_logits(path))
    except ImportError as error:
        lines.append(f"logits are not compared: {error}")
    return lines


def _compare_logits(path: Path) -> str:
    theirs: Any = importlib.import_module("transformers")  # not a dependency
    torch: Any = theirs.utils.import_utils.torch  # which transformers needs as well
    config, params = load(path)
    config = dataclasses.replace(config, dtype="float32")
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.vocab_size, (_ROWS, _LENGTH), np.int32)
    ours_BTV = np.asarray(
        jax.jit(logits, static_argnums=0)(config, params, jnp.asarray(tokens_BT))
    )
    model = theirs.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        wanted_BTV = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    apart = float(np.abs(ours_BTV - wanted_BTV).max())
    said = (
        f"logits differ from transformers {theirs.__version__} by {apart:.1e} at most"
    )
    if not apart <= TOLERANCE * max(1.0, float(np.abs(wanted_BTV).max())):
        raise InputError(f"{path}: {said}, which is more than rounding.")
    return said
