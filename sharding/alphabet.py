# SPDX-License-Identifier: Apache-2.0
"""The letters of tensor dimensions, used in the whole project and nowhere redefined.

A letter is the shape suffix (`x_BTD`), the einsum subscript (`"BTD,DNH->BTNH"`), the
declared axes of a parameter (`axes="DNH"`) and the key of the partition rules
(`{"N": "tensor"}`). They follow the docstring of `jax.nn.dot_product_attention`.
"""

LETTERS = {
    "B": "batch rows",
    "T": "query positions",
    "S": "key positions",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head",
    "H": "head width",
    "F": "MLP width",
    "V": "vocabulary",
    "E": "experts",
    "R": "experts that a router compares",
    "A": "experts of a token",
    "C": "expert capacity",
    "L": "layers",
    "M": "microbatches in a pipeline",
    "P": "pipeline stages",
}
