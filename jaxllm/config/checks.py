# SPDX-License-Identifier: Apache-2.0
"""Checks that several sections share, and the values that their errors suggest."""

import math

from jaxllm.errors import InputError


def check_positive(section, name: str, fields: str):
    """Refuses a field of `config.<name>` that is not a finite number above 0."""
    for field in fields.split():
        value = getattr(section, field)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"config.{name}.{field}={value} must be above 0.")


def check_not_negative(section, name: str, fields: str):
    """Refuses a field of `config.<name>` that is not a finite number from 0 on."""
    for field in fields.split():
        value = getattr(section, field)
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"config.{name}.{field}={value} must not be below 0.")


def divisors(n: int) -> list[int]:
    """Returns the numbers that divide n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def neighbours(n: int, divisor: int) -> str:
    """Returns the multiples of divisor next to n, for a remedy."""
    below = n // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
