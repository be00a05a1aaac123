# SPDX-License-Identifier: Apache-2.0
"""What the loss costs when compiled for H200s that are described, not there."""

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import offline
from pallas_kernels.cross_entropy import Terms, linear_cross_entropy

pytestmark = pytest.mark.slow

T, D, V = 8192, 4096, 128256  # the loss of Llama 3 on a sequence
COLLECTIVE = r"= \S+(?: \S+)? (all-\w+|reduce-scatter|collective-permute)[\w-]*\("


@pytest.fixture(scope="module")
def compiled(run_offline) -> Any:
    """What `main` found, in a process that has the CUDA plugin."""
    # On a device, timing decides for cuBLAS; here nothing is timed.
    ended = run_offline([__file__], XLA_FLAGS="--xla_gpu_enable_triton_gemm=false")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_memory_is_a_tenth_of_that_of_all_logits(compiled):
    # All logits: float32, and their float32 gradient.
    assert compiled["all"]["temporary"] >= 8 * T * V
    assert compiled["mosaic"]["temporary"] <= 0.1 * compiled["all"]["temporary"]
    assert compiled["mosaic"]["temporary"] <= 0.6 * compiled["xla"]["temporary"]


def test_nothing_of_the_size_of_a_chunk_is_copied(compiled):
    for name in ("mosaic", "cut-mosaic"):
        assert compiled[name]["copies"] == [], name


def test_a_cut_vocabulary_adds_no_collectives_to_those_of_the_reference(compiled):
    ours, others = (
        compiled[f"cut-{name}"]["collectives"] for name in ("mosaic", "xla")
    )
    assert set(ours) == set(others) == {"all-reduce"}
    # In the text twice: the first chunk is not in the loop over the others.
    assert ours["all-reduce"] <= 2 * others["all-reduce"]


def main() -> None:
    """Prints what the programs take."""
    x, w, targets = (
        jax.ShapeDtypeStruct((T, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((D, V), jnp.bfloat16),
        jax.ShapeDtypeStruct((T,), jnp.int32),
    )
    found = {"all": costs(all_logits, (x, w, targets), 1)}
    for name in ("mosaic", "xla"):
        options: Any = dict(letters="DV", z_loss=1e-4, softcap=None, chunk_tokens=2048)
        run: Any = functools.partial(
            linear_cross_entropy, **options, with_gradients=True, implementation=name
        )
        found[name] = costs(run, (x, w, targets), 1)
        cut, whole = jax.P(None, "tensor"), jax.P()
        run = jax.shard_map(
            functools.partial(run, vocab_axes=("tensor",)),
            in_specs=(whole, cut, whole),
            out_specs=Terms(*(whole, whole, whole, cut)),  # type: ignore[arg-type]
            check_vma=False,
        )
        found[f"cut-{name}"] = costs(run, (x, w, targets), 2)
    print(json.dumps(found))


def all_logits(x_TD, w_DV, targets_T):
    """The loss as one would write it, and its gradients by JAX."""

    def loss(x_TD, w_DV):
        logits_TV = jnp.einsum(
            "TD,DV->TV", x_TD, w_DV, preferred_element_type=jnp.float32
        )
        target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits_TV, axis=-1) - target_T).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(x_TD, w_DV)


def costs(function, inputs, num_devices: int) -> dict[str, Any]:
    mesh = offline.described_mesh((num_devices,), ("tensor",))
    specs = (jax.P(), jax.P(None, "tensor" if num_devices > 1 else None), jax.P())
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        for x, spec in zip(inputs, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*placed).compile()
    text = program.as_text() or ""
    kinds = [kind.removesuffix("-start") for kind in re.findall(COLLECTIVE, text)]
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "temporary": memory.temp_size_in_bytes,
        "copies": re.findall(r"= (\w+\[\d+,\d{5,}\])\S* copy\(", text),
        "collectives": {kind: kinds.count(kind) for kind in set(kinds)},
    }


if __name__ == "__main__":
    main()
