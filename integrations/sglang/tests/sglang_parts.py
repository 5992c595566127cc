"""Write SGLang's Python parts for process groups into a folder, to run them where all of SGLang can't be installed.

    python sglang_parts.py sglang-0.5.23-*.whl...   # or, for a wheel, the folder that has `sglang/`

`.sglang-parts/0.5.23` of this checkout gets `sglang.srt.distributed` and `sglang.srt.plugins` as they are, with what
they import, 10 MB. Packages that aren't installed, such as orjson and zmq, are replaced by modules of empty classes:
process groups import them and don't use them. The module of SGLang's model runner is replaced by a small one.

test_sglang_parts.py and test_sglang_gpus.py use the releases that are there.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[3] / ".sglang-parts"

_KEPT = re.compile(
    r"sglang/(version|_version|_platform_stubs|kernel_api_logging|global_config|utils)\.py"
    r"|sglang/(kernels|jit_kernel)/(?!.*(test|bench)).*\.(py|cuh|h|cu)"
    r"|sglang/srt/(model_executor/)?\w+\.py"
    r"|sglang/srt/(distributed|plugins|platforms|utils|compilation|observability|debug_utils|arg_groups|elastic_ep)/.*\.py"
    r"|sglang/srt/model_executor/runner_backend_utils/.*\.py"
    r"|sglang/srt/layers/(\w+\.py|moe/(__init__|utils)\.py|layer_boundary/.*\.py)"
)
#: A module that gives other modules in place of packages that aren't installed.
MISSING_PACKAGES = '''
"""Modules of empty classes in place of packages that aren't installed."""

import dataclasses
import importlib.abc
import importlib.machinery
import sys
import types

NAMES = {
    *("IPython", "PIL", "aiohttp", "fastapi", "huggingface_hub", "msgspec", "orjson", "psutil", "pybase64", "pydantic"),
    *("pydantic_core", "requests", "sgl_kernel", "starlette", "torchvision", "tqdm", "triton", "zmq"),
}


class EmptyType(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Empty(metaclass=EmptyType):
    def __init__(self, *args, **options):
        pass

    def __init_subclass__(cls, **options):
        pass

    def __class_getitem__(cls, item):
        return cls

    def __call__(self, *args, **options):
        return args[0] if args else None


class Struct:
    """Does what SGLang's settings need of msgspec's."""

    def __init_subclass__(cls, kw_only=False, frozen=False, **options):
        dataclasses.dataclass(cls, kw_only=kw_only, unsafe_hash=frozen)
        cls.__struct_fields__ = tuple(field.name for field in dataclasses.fields(cls))


def field(*, default=dataclasses.MISSING, default_factory=dataclasses.MISSING, **options):
    return dataclasses.field(default=default, default_factory=default_factory)


KNOWN = {
    "msgspec": {"Struct": Struct, "field": field},
    "msgspec.structs": {"replace": dataclasses.replace, "fields": dataclasses.fields, "asdict": dataclasses.asdict},
}


class EmptyModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty


def importer():
    """Return the file that imports; transformers asks what is installed, and must hear the truth."""
    frame = sys._getframe(2)
    while frame and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in NAMES and "/transformers/" not in importer():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = EmptyModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        vars(module).update(KNOWN.get(module.__name__, {}))


sys.meta_path.append(Finder())  # after those that find what is installed
'''
_REPLACED = {
    "sglang/__init__.py": "import missing_packages\nfrom sglang.version import __version__\n",
    # The settings need transformers; without a server's, groups take the defaults.
    "sglang/srt/server_args.py": """
class ServerArgs:
    pass


def get_global_server_args():
    raise ValueError("there are no settings of a server")


get_server_args = get_global_server_args
""",
    "missing_packages.py": MISSING_PACKAGES,
}
_RUNNER = '''
class {name}:
    """Has what this package reads of SGLang's."""

    def __init__(self, model_runner):
        self.model_runner = model_runner

    def _pre_initialize_flashinfer_allreduce_workspace(self):
        pass
'''


def releases() -> list[str]:
    """Return the releases with parts in this checkout."""
    return sorted(path.name for path in FOLDER.glob("*") if path.is_dir())


def write_metadata(folder: Path, release: str) -> Path:
    """Write SGLang's metadata, which has its release and this package's entry point. Return `folder`."""
    info = folder / f"sglang-{release}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    return folder


def main() -> None:
    for source in map(Path, sys.argv[1:]):
        texts = dict(_kept(source))
        release = re.findall(r"version = ['\"]([^'\"]+)", texts["sglang/_version.py"])[0]
        texts |= _REPLACED
        if tuple(map(int, release.split(".")[:3])) >= (0, 5, 14):
            texts["sglang/srt/model_executor/runner/base_runner.py"] = _RUNNER.format(name="BaseRunner")
        else:
            texts["sglang/srt/model_executor/model_runner.py"] = _RUNNER.format(name="ModelRunner")
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
        for path in source.glob("sglang/**/*.py"):
            if _KEPT.fullmatch(name := path.relative_to(source).as_posix()):
                yield name, path.read_text()


if __name__ == "__main__":
    main()
