"""What the CUDA runtime says of this machine's GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .errors import InvalidArgument, MockMode


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU: NVRTC's name of its architecture, multiprocessors, bytes of L2 cache, marketing name."""

    arch: str
    num_sms: int
    l2_bytes: int
    name: str


def gpu_problem() -> str | None:
    """Why no kernel can be launched on this machine, or None when one can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); pip install 'cutlass-fa[cuda13]'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"the CUDA runtime finds no usable GPU ({error})"
    return None if count > 0 else "the CUDA runtime finds no GPU"


@lru_cache(maxsize=64)
def device_info(device: int) -> DeviceInfo:
    """Facts of CUDA device `device`. Raises MockMode on a machine without a GPU."""
    problem = gpu_problem()
    if problem is not None:
        raise MockMode(f"no GPU to ask about: {problem}")
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    capability = f"{properties['major']}{properties['minor']}"
    arch = f"sm_{capability}" + ("a" if capability == "90" else "")
    return DeviceInfo(arch, properties["multiProcessorCount"], properties["l2CacheSize"], properties["name"].decode())


def check_current_device(device: int) -> None:
    """Raises InvalidArgument unless CUDA device `device` is the caller's current one, on which kernels are launched."""
    import cupy

    current = cupy.cuda.runtime.getDevice()
    if current != device:
        raise InvalidArgument(
            f"q, k, v are on device {device} and the current device is {current}: make it current, for instance with "
            f"`with cupy.cuda.Device({device}):` or `with torch.cuda.device({device}):`"
        )
