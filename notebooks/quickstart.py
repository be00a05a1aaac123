# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A run from Python
#
# A config, the model's plan, some text as tokens, a hundred steps with a break in the
# middle, the loss, a sample. Under a minute on one CPU; it needs no network and no GPU.
# Install with `pip install -e '.[notebooks]'`.

# %%
import email
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt

import sharding
from jaxllm import tokenize
from jaxllm.config import load_config
from jaxllm.inference import Sampling, generate, load_for_generation, read_request
from jaxllm.plan.cost import full_report
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.data import open_train_data
from jaxllm.step import prepare
from jaxllm.text.tokenizers import load_tokenizer
from jaxllm.train import train

ROOT = Path.cwd() if Path("configs").exists() else Path.cwd().parent
DATA, WORKDIR = ROOT / "data" / "notebook", ROOT / "runs" / "notebook"
use_compilation_cache()  # the next time, programs need not be compiled again

# %% [markdown]
# ## A config
#
# The same file that the command line takes, here made smaller by overrides. They are
# checked together: try `"model.num_heads": 5`.

# %%
config = load_config(
    ROOT / "configs" / "quickstart.py",
    {
        "steps": 100,
        "model.vocab_size": 264,
        "model.num_layers": 2,
        "model.d_model": 96,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 24,
        "model.d_ff": 256,
        "data.paths": (str(DATA),),
        "data.sequence_length": 128,
        "optimizer.warmup_steps": 10,
        "eval.every": 50,
        "eval.batches": 4,
        "mesh.fsdp": 1,
    },
)
print(config.model)

# %% [markdown]
# ## The model and where it lives
#
# `prepare` knows every shape and placement before anything is computed. Devices that do
# not exist can be asked about too: here a mesh of eight.

# %%
mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
setup = prepare(config, mesh)
print(full_report(setup))

# %%
eight = sharding.abstract_mesh({"fsdp": 4, "tensor": 2})
print(sharding.plan(setup.model.abstract, setup.model.letters, eight).table())

# %% [markdown]
# ## Text to tokens
#
# The command `python -m jaxllm.tokenize`, called as a function: the source of Python's
# `json` and `email` packages, one token a byte, the last twentieth held out.

# %%
status = tokenize.main(
    [
        "tokenize",
        f"--input={json.__path__[0]}/*.py",
        f"--input={email.__path__[0]}/*.py",
        f"--output={DATA}",
        "--tokenizer=bytes",
        "--holdout=0.05",
        "--holdout_by=tail",
        "--overwrite",
    ]
)
assert status == tokenize.FINISHED

# %% [markdown]
# Batch number 7 of this run, as every run with this data, config and seed sees it:

# %%
with open_train_data(setup).batches(start=7) as batches:
    batch = next(batches)
print({name: rows.shape for name, rows in batch.items()})
print(load_tokenizer(str(DATA)).decode(batch["tokens"][0].tolist()))

# %% [markdown]
# ## Train, stop, go on
#
# `train` is an iterator over what it logs. Leaving the loop saves the run.

# %%
records = []
for record in train(config, WORKDIR, overwrite=True):
    records.append(record)
    if record["step"] >= 40:
        break
print("stopped at", records[-1])

# %% [markdown]
# The same call resumes it, with the next batch and the same numbers as without a break.

# %%
for record in train(config, WORKDIR):
    records.append(record)
    if "eval_loss" in record:
        print(record)

# %%
trained = [record for record in records if "loss" in record]
held_out = [record for record in records if "eval_loss" in record]
plt.plot(
    [r["step"] for r in trained], [r["loss"] for r in trained], label="a training batch"
)
plt.plot(
    [r["step"] for r in held_out], [r["eval_loss"] for r in held_out], "o", label="eval"
)
plt.xlabel("step")
plt.ylabel("nats per byte")
plt.legend()
plt.show()

# %% [markdown]
# ## Sample
#
# A hundred steps teach it how lines look and which letters go together. The model of
# `make quickstart` writes Python.

# %%
request = read_request(
    WORKDIR,
    config,
    "latest",
    load_tokenizer(str(DATA)),
    ["def "],
    max_tokens=100,
    sampling=Sampling(temperature=0.8, top_p=0.95),
)
model, params, mesh = load_for_generation(WORKDIR, config, "latest")
with jax.set_mesh(mesh):
    pieces = generate(model, params, request)
    print("def " + "".join(piece for _, piece in pieces))
