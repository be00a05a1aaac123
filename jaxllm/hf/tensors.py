# SPDX-License-Identifier: Apache-2.0
"""Which part of which tensor of a file is which part of a parameter."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.hf.table import Family, Tensor
from jaxllm.models import Model

# What is copied at once: few enough for a core's cache, where it may be transposed.
_BLOCK_ELEMENTS = 2**20

type Bounds = tuple[tuple[int, int], ...]  # start and stop along each dimension


@dataclasses.dataclass(frozen=True)
class Piece:
    """One layer, or one expert of one layer, of a parameter.

    Attributes:
      tensor: of the family's table.
      name: of the tensor in the files.
      place: where the piece is along the parameter's leading L and E: () for a whole.
      letters: of the piece.
      sizes: of each letter.
      starts: where it begins along each dimension of the file's tensor, in elements.
      shape: of the file's tensor.
      expert: along a first dimension E that the piece is one of; None: it has none.
    """

    tensor: Tensor
    name: str
    place: tuple[int, ...]
    letters: str
    sizes: Mapping[str, int]
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    expert: int | None = None

    @property
    def dims(self) -> list[str]:
        """The letters, and at most a digit, of each dimension of the piece."""
        dims = self.tensor.dims.replace("+", "").split()
        return dims if self.expert is None else dims[1:]

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the piece within the file's tensor, as a view of it.

        Args:
          tensor: without the dimension E, if the piece is of one `expert`.
        """
        starts = self.starts if self.expert is None else self.starts[1:]
        ends = (
            slice(start, start + math.prod(self._sizes(dims)))
            for start, dims in zip(starts, self.dims, strict=True)
        )
        spread = tensor[tuple(ends)]
        spread = spread.reshape([n for dims in self.dims for n in self._sizes(dims)])
        order = "".join(self.dims)
        if digit := next((x for x in order if x.isdigit()), None):
            at = order.index(digit)
            spread = spread[(*(slice(None),) * at, self.tensor.index)]
            order = order.replace(digit, "")
        found = spread.transpose([order.index(letter) for letter in self.letters])
        assert np.shares_memory(found, tensor), "splitting dimensions copies nothing"
        return found

    def blocks(self, bounds: Bounds) -> Iterator[Bounds]:
        """Yields small blocks that together are the piece within bounds.

        Most have the same shape, and each is contiguous in the file, or nearly.
        """
        dim = self.letters.index(next(x for x in self.tensor.dims if x in self.letters))
        start, stop = bounds[dim]
        others = math.prod(b - a for a, b in bounds) // max(stop - start, 1)
        step = min(max(_BLOCK_ELEMENTS // max(others, 1), 1), stop - start)
        for first in range(start, stop, max(step, 1)):
            first = min(first, stop - step)  # the last one has the size of the others
            yield (*bounds[:dim], (first, first + step), *bounds[dim + 1 :])

    def _sizes(self, dims: str) -> list[int]:
        return [int(x) if x.isdigit() else self.sizes[x] for x in dims]


def pieces(model: Model, family: Family, path: str) -> Iterator[Piece]:
    """Yields the pieces of a parameter, in the order of its leading dimensions."""
    letters, shape = model.letters[path], _shape_of(model, path)
    sizes = _all_sizes(model.config) | dict(zip(letters, shape, strict=True))
    name, layers = _layers(model.config, path)
    apart = name.replace("mlp/", "dense/", 1)
    if apart in family.tensors and not model.config.layer(layers[0]).sparse:
        name = apart
    tensor = family.tensors[name]
    inner = (
        letters.removeprefix("L") if len(layers) > 1 or letters[0] == "L" else letters
    )
    # One at a time also out of a tensor of all experts, which may be large.
    of_all = tensor.dims.startswith("E ") and len(letters.removeprefix("L")) > 2
    by_expert = "{e}" in tensor.name or of_all
    inner = inner.removeprefix("E") if by_expert else inner
    for place, layer in enumerate(layers):
        for expert in range(sizes["E"] if by_expert else 1):
            yield Piece(
                tensor=tensor,
                name=tensor.name.format(n=layer, e=expert),
                place=(
                    *((place,) if letters[0] == "L" else ()),
                    *((expert,) if by_expert else ()),
                ),
                letters=inner,
                sizes=sizes,
                starts=_starts(tensor, sizes),
                shape=_file_shape(tensor, family, sizes),
                expert=expert if of_all else None,
            )


def _layers(config: ModelConfig, path: str) -> tuple[str, range]:
    """Returns a path without its block, and the numbers of the layers that it is of."""
    part, *rest = path.split("/", 2)
    if part not in ("leading", "blocks"):
        return path, range(1)
    number, name = int(rest[0]), rest[1]
    if part == "blocks":
        number += len(config.leading)
        if config.scan_layers:
            return name, range(number, config.num_layers, len(config.period))
    return name, range(number, number + 1)


def _starts(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    before = sum(_product(letters, sizes) for letters in tensor.after.split())
    return tuple(before if "+" in dims else 0 for dims in tensor.dims.split())


def _file_shape(
    tensor: Tensor, family: Family, sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Returns the shape of a tensor with all the parameters that it has."""
    shared = {other for other in family.tensors.values() if other.name == tensor.name}
    return tuple(
        sum(
            _product(other.dims.split()[place].replace("+", ""), sizes)
            for other in shared
        )
        if "+" in dims
        else _product(dims, sizes)
        for place, dims in enumerate(tensor.dims.split())
    )


def _product(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(x) if x.isdigit() else sizes[x] for x in letters)


def _all_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "D": config.d_model,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.d_ff_expert,
        "V": config.vocab_size,
        "E": config.moe.num_experts,
    }


def _shape_of(model: Model, path: str) -> tuple[int, ...]:
    node: Any = model.abstract
    for key in path.split("/"):
        node = node[key]
    return node.shape
