"""Write vLLM's Python parts for process groups into a folder, to run them where all of vLLM can't be installed.

    python vllm_parts.py vllm-0.33.0-*.whl...   # or, for a wheel, the folder that has `vllm/`

`.vllm-parts/0.33.0` of this checkout gets `vllm.distributed` and `vllm.platforms` as they are, with what they import, 2
MB. Modules that need the compiled part of vLLM or other packages are replaced by small ones. So vLLM's own custom
all-reduce isn't available: its communicator sums by NCCL or torch's symmetric memory on GPUs, and by Gloo on CPUs.

test_vllm_parts.py and test_vllm_gpus.py use the releases that are there. They need psutil and regex.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[3] / ".vllm-parts"

_KEPT = re.compile(
    r"vllm/(distributed/(device_communicators/)?\w+\.py|platforms/.*\.py|plugins/__init__\.py|logging_utils/.*\.py"
    r"|utils/\w+\.py|ray/\w+\.py|third_party/(__init__|pynvml)\.py|(envs|logger|version|_version)\.py)"
)
_REPLACED = {
    "vllm/__init__.py": "from vllm.version import __version__\n",
    # Without these, vLLM takes its kernels and ROCm's for missing.
    "vllm/_C_stable_libtorch.py": "",
    "vllm/_custom_ops.py": "",
    "vllm/_aiter_ops.py": """
class rocm_aiter_ops:
    is_custom_all_reduce_enabled = is_enabled = is_rdna_aiter_enabled = staticmethod(lambda: False)
    get_aiter_allreduce = staticmethod(lambda: None)
""",
    # The configuration needs pydantic and transformers; the groups read these names of it.
    "vllm/config/__init__.py": """
import contextlib
from types import SimpleNamespace

_current = None


def get_current_vllm_config_or_none():
    return _current


def get_current_vllm_config():
    return _current


@contextlib.contextmanager
def set_current_vllm_config(config):
    global _current
    before, _current = _current, config
    try:
        yield
    finally:
        _current = before


def VllmConfig(max_tokens, hidden_size, dtype):
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, get_hidden_size=lambda: hidden_size),
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=max_tokens, pass_config=SimpleNamespace(fuse_allreduce_rms=False)
        ),
        parallel_config=SimpleNamespace(
            enable_elastic_ep=False,
            all2all_backend=None,
            cpu_distributed_timeout=None,
            distributed_timeout_seconds=None,
            cpu_distributed_timeout_seconds=None,
        ),
        use_cumem_cudagraph_pool=False,
    )
""",
    "vllm/config/compilation.py": "class PassConfig:\n    pass\n",
    # It needs zmq; groups without it broadcast by torch.distributed.
    "vllm/distributed/device_communicators/shm_broadcast.py": "class MessageQueue:\n    pass\n",
    "vllm/utils/network_utils.py": """
def get_distributed_init_method(ip, port):
    return get_tcp_uri(ip, port)


def get_tcp_uri(ip, port):
    return f"tcp://{ip}:{port}"


def get_ip():
    return "127.0.0.1"


def get_open_port():
    raise NotImplementedError


def join_host_port(host, port):
    return f"{host}:{port}"


def aiter_requires_tcp_store():
    return False
""",
    "vllm/v1/attention/backends/registry.py": """
import enum


class AttentionBackendEnum(enum.Enum):
    NO_ATTENTION = "none"
""",
    "vllm/v1/attention/backends/mla/prefill/registry.py": """
import enum


class MLAPrefillBackendEnum(enum.Enum):
    NO_ATTENTION = "none"
""",
    "vllm/v1/worker/ubatching.py": "def dbo_current_ubatch_id():\n    return 0\n",
}


def releases() -> list[str]:
    """Return the releases with parts in this checkout; none if other packages that they need aren't installed."""
    if not all(importlib.util.find_spec(name) for name in ("psutil", "regex")):
        return []
    return sorted(path.name for path in FOLDER.glob("*") if path.is_dir())


def write_metadata(folder: Path, release: str) -> Path:
    """Write vLLM's metadata, by which it chooses its platform: CPUs for a release with "cpu" in it. Return `folder`."""
    info = folder / f"vllm-{release}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    return folder


def main() -> None:
    for source in map(Path, sys.argv[1:]):
        texts = dict(_kept(source)) | _REPLACED
        release = re.findall(r"version = ['\"]([^'\"]+)", texts["vllm/_version.py"])[0]
        folder = write_metadata(FOLDER / release, release)
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        print(f"{folder}: {sum(map(len, texts.values())) / 1e6:.1f} MB")


def _kept(source: Path) -> Iterator[tuple[str, str]]:
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                if _KEPT.fullmatch(name):
                    yield name, archive.read(name).decode()
    else:
        for path in source.glob("vllm/**/*.py"):
            if _KEPT.fullmatch(name := path.relative_to(source).as_posix()):
                yield name, path.read_text()


if __name__ == "__main__":
    main()
