# SPDX-License-Identifier: Apache-2.0
"""The families of models that can be read and written."""

from collections.abc import Mapping

from jaxllm.hf.dense import DENSE
from jaxllm.hf.layernorm import LAYERNORM
from jaxllm.hf.mixtures import MIXTURES
from jaxllm.hf.shared import SHARED
from jaxllm.hf.table import Family

FAMILIES: Mapping[str, Family] = {**DENSE, **LAYERNORM, **MIXTURES, **SHARED}
