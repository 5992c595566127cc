import os

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import Platform


class NvmlCudaPlatform(CudaPlatformBase):
    """As in vLLM, the platform's class inherits what `register` replaces."""


class RocmPlatform(CudaPlatformBase):
    device_name = "rocm"


_CLASSES = {"cpu": CpuPlatform, "cuda": NvmlCudaPlatform, "rocm": RocmPlatform, "unspecified": Platform}

current_platform = _CLASSES[os.environ.get("STAND_IN_PLATFORM", "cpu")]()
