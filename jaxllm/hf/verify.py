# SPDX-License-Identifier: Apache-2.0
"""Verifies a folder of transformers, and compares its logits with theirs."""

import collections
import dataclasses
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.manifest import TOKENIZER
from jaxllm.errors import InputError
from jaxllm.hf.carried import GENERATION
from jaxllm.hf.folder import CONFIG, Folder, check
from jaxllm.hf.loading import load
from jaxllm.hf.settings import load_json
from jaxllm.hf.sums import SUMS, check_sums
from jaxllm.hf.tensors import pieces
from jaxllm.models import logits
from jaxllm.text.tokenizers import HFTokenizer, load_tokenizer

TOLERANCE = 1e-4  # of the largest logit: roundings of float32 over all layers
_ROWS, _LENGTH = 2, 32
_BLOCK = 2**22  # numbers that are looked at together
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
        bad = [name for name in sorted(names) if not _is_finite(folder, name)]
        if bad:
            raise InputError(
                f"{path}: {len(bad)} tensors are not finite, first {bad[0]}."
            )
        number = collections.Counter(folder.entry(name)["dtype"] for name in names)
        tokens = _check_tokens(folder)
    kinds = ", ".join(f"{number[dtype]} {dtype}" for dtype in sorted(number))
    found = f"{path}: {folder.describe()}, {len(names)} tensors ({kinds}), all finite"
    found += tokens
    sums = check_sums(path)
    found += f"; {sums} files as in {SUMS}" if sums is not None else ""
    return [found, _compare_logits(path, python)] if python else [found]


def _check_tokens(folder: Folder) -> str:
    """Refuses ids of the tokenizer, and of ends of texts, that have no row.

    Returns:
      which added tokens have none: published models may have more than rows.
    """
    rows, known, said = folder.config.vocab_size, None, ""
    path = folder.path / TOKENIZER
    if path.is_file():
        tokenizer = load_tokenizer(str(path))
        assert isinstance(tokenizer, HFTokenizer), "a file is one"
        known = tokenizer.backend.get_vocab(with_added_tokens=True)
        plain = tokenizer.backend.get_vocab(with_added_tokens=False)
        beyond = {token: number for token, number in known.items() if number >= rows}
        if wrong := beyond.keys() & plain.keys():
            token = min(wrong, key=lambda each: beyond[each])
            raise InputError(
                f"{path}: the token {token!r} is {beyond[token]}, and the embedding "
                f"has {rows} rows; the tokenizer is of another model."
            )
        if beyond:
            said = f"; no row for the added tokens {', '.join(sorted(beyond)[:3])}"
    for name in (CONFIG, GENERATION):
        if not (folder.path / name).is_file():
            continue
        ends = load_json(folder.path / name).get("eos_token_id")
        for number in ends if isinstance(ends, list) else [ends]:
            if number is None:
                continue
            wrong = not isinstance(number, int) or not 0 <= number < rows
            if wrong or (known is not None and number not in known.values()):
                where = f"the {rows} rows" if wrong else TOKENIZER
                raise InputError(
                    f"{folder.path / name}: eos_token_id={number!r} is not among "
                    f"{where}, so no text would end with it."
                )
    return said


def _is_finite(folder: Folder, name: str) -> bool:
    """Returns whether all numbers are finite; looks at some MB, or an expert, each."""
    shape = folder.entry(name)["shape"]
    for part in range(shape[0]) if len(shape) > 2 else (None,):
        flat = folder.tensor(name, part).reshape(-1)
        starts = range(0, flat.size, _BLOCK)
        if not all(np.isfinite(flat[at : at + _BLOCK]).all() for at in starts):
            return False
    return True


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
