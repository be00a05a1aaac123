# SPDX-License-Identifier: Apache-2.0
"""The device a computation is traced for, which need not be one of this machine."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels import mosaic

HOPPER_KINDS = ("H100", "H200", "H800", "H20", "GH200")


@dataclasses.dataclass(frozen=True)
class Target:
    """What an implementation must know of the device it will run on."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as the driver names it, such as "NVIDIA H200"
    num_cores: int  # streaming multiprocessors; 1 where JAX does not tell

    @property
    def is_hopper(self) -> bool:
        """Whether kernels that need TMA and wgmma run on it."""
        return self == INTERPRETED or any(name in self.kind for name in HOPPER_KINDS)


# Interpret mode runs the cores one after the other: two make all code paths.
INTERPRETED = Target("gpu", "interpreted", 2)
H200 = Target("gpu", "NVIDIA H200", 132)


def current_target() -> Target:
    """Returns the device of the current mesh, or else JAX's default device.

    Under `jax.set_mesh`, of real or of described devices, and in `shard_map` that is
    what the program is compiled for, whatever machine this is.
    """
    if mosaic.is_interpreted():
        return INTERPRETED
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return Target(
            _family(device.platform), device.device_kind, device.num_cores or 1
        )
    device = jax.local_devices()[0]
    num_cores = getattr(device, "core_count", None) or 1
    return Target(_family(device.platform), device.device_kind, num_cores)


@contextlib.contextmanager
def traced_for(target: Target) -> Iterator[None]:
    """Makes a device, which need not be there, the `current_target` of this thread."""
    device = jax.sharding.AbstractDevice(
        device_kind=target.kind, num_cores=target.num_cores, platform=target.platform
    )
    mesh = jax.sharding.AbstractMesh((), (), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _family(platform: str | None) -> str:
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
