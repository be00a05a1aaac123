# SPDX-License-Identifier: Apache-2.0
"""Checks that several sections share, and the values that their errors suggest."""

import math

from jaxllm.errors import InputError

LARGEST_INT = 2**31 - 1  # of int32, in which devices count
SMALLEST_FLOAT = 2.0**-126  # of float32 with all its digits; devices take less for 0
LARGEST_FLOAT = 2.0**128 - 2.0**104


# What is beyond these is a slip, and would be planned for minutes.
MAX_WIDTH = 2**20
MAX_COUNT = 2**16  # of layers, heads, experts


def check_positive(section, name: str, fields: str):
    """Refuses a field of `config.<name>` that is not above 0, as int32 or float32."""
    for field in fields.split():
        value = getattr(section, field)
        if value is None:
            continue
        if not value > 0:
            raise InputError(f"config.{name}.{field}={value} must be above 0.")
        check_fits(f"config.{name}.{field}", value)


def check_not_negative(section, name: str, fields: str):
    """Refuses a field of `config.<name>` that is below 0, or no int32 or float32."""
    for field in fields.split():
        value = getattr(section, field)
        if not value >= 0:
            raise InputError(f"config.{name}.{field}={value} must not be below 0.")
        check_fits(f"config.{name}.{field}", value)


def check_at_most(section, name: str, **limits: int):
    """Refuses a field of `config.<name>` that is above its limit."""
    for field, limit in limits.items():
        if (value := getattr(section, field)) > limit:
            raise InputError(f"config.{name}.{field}={value} must be at most {limit}.")


def check_fits(name: str, value: float):
    """Refuses a number, not negative, that is another one as int32 or float32."""
    if isinstance(value, int):
        if value > LARGEST_INT:
            raise InputError(
                f"{name}={value} must be at most {LARGEST_INT}, the largest int32."
            )
    elif value > LARGEST_FLOAT:
        raise InputError(
            f"{name}={value} must be at most {LARGEST_FLOAT:.6g}, the largest float32."
        )
    elif 0 < value < SMALLEST_FLOAT:
        raise InputError(
            f"{name}={value} must be at least {SMALLEST_FLOAT:.6g}: anything smaller "
            "is 0 as float32."
        )


def divisors(n: int) -> list[int]:
    """Returns the numbers that divide n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def neighbours(n: int, divisor: int) -> str:
    """Returns the multiples of divisor next to n, for a remedy."""
    below = n // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
