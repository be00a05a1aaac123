# SPDX-License-Identifier: Apache-2.0
"""Verifies a folder of transformers, and compares its logits with theirs."""

import dataclasses
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.hf.folder import Folder, check
from jaxllm.hf.loading import load
from jaxllm.hf.tensors import pieces
from jaxllm.models import logits

TOLERANCE = 1e-4  # of the largest logit: roundings of float32 over all layers
_ROWS, _LENGTH = 2, 32
# For a Python that has torch and transformers: they are no dependencies of ours.
_THEIRS = """
import sys
import numpy, torch, transformers
folder, home = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, torch_dtype=torch.float32, trust_remote_code=False, local_files_only=True
).eval()
with torch.no_grad():
    tokens = torch.from_numpy(numpy.load(home + "/tokens.npy")).long()
    numpy.save(home + "/logits.npy", model(tokens).logits.float().numpy())
print(transformers.__version__)
"""


def verify(path: Path, python: str | None = None) -> list[str]:
    """Checks names, shapes, dtypes and values of a folder; returns what was found.

    Args:
      path: of the folder.
      python: an interpreter with torch and transformers, whose logits of random tokens
        are compared with ours; None compares none.

    Raises:
      InputError: something is wrong.
    """
    with Folder(path) as folder:
        model, rename = check(folder)
        paths = model.letters
        names = {rename(p.name) for x in paths for p in pieces(model, folder.family, x)}
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
    found = f"{path}: {folder.model_type}, {len(names)} tensors ({kinds}), all finite"
    return [found, _compare_logits(path, python)] if python else [found]


def _compare_logits(path: Path, python: str) -> str:
    config, params = load(path)
    config = dataclasses.replace(config, dtype="float32")
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.vocab_size, (_ROWS, _LENGTH), np.int32)
    run = jax.jit(logits, static_argnums=0)
    ours_BTV = np.asarray(run(config, params, jnp.asarray(tokens_BT)))
    with tempfile.TemporaryDirectory() as home:
        np.save(Path(home) / "tokens.npy", tokens_BT)
        command = [python, "-c", _THEIRS, str(path), home]
        try:
            ended = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise InputError(
                f"--python={python} cannot be run: {error.strerror}."
            ) from error
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
            raise InputError(
                f"--python={python} did not give logits of {path}: {last}; give a "
                "Python with torch and transformers that knows this model."
            )
        wanted_BTV = np.load(Path(home) / "logits.npy")
    apart = float(np.abs(ours_BTV - wanted_BTV).max())
    version = ended.stdout.strip().splitlines()[-1]
    said = f"logits differ from those of transformers {version} by {apart:.1e} at most"
    if not apart <= TOLERANCE * float(np.abs(wanted_BTV).max()):
        raise InputError(f"{path}: {said}, which is more than rounding.")
    return said
