"""`comm-core new`: write the project of a new backend, complete and installable, for its author to change."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import string
import sys
from importlib import resources
from typing import Any

from packaging.version import Version

from comm_core._schema import printable
from comm_core._version import __version__

__all__ = ["add_parser", "run"]

#: The templates of each file, one after another, by its path in the project.
_FILES = {
    "pyproject.toml": ("pyproject.toml",),
    "README.md": ("README.md",),
    "src/${module}/__init__.py": ("plugin.py",),
    "tests/test_${name}.py": ("test.py",),
}
#: The files that differ, or are added, with native code of that kind.
_KERNEL_FILES = {
    kernel: {
        "pyproject.toml": ("pyproject.toml", "hook.toml"),
        "README.md": (f"{kernel}/README.md",),
        "src/${module}/__init__.py": (f"{kernel}/plugin.py",),
        **{f"src/${{module}}/csrc/{source}": (f"{kernel}/{source}",) for source in sources},
    }
    for kernel, sources in {"cpp": ["kernel.cpp"], "cuda": ["kernel.cuh", "binding.cu"]}.items()
}
#: The extras of comm-core that the native code needs.
_EXTRAS = {"cpp": "[kernels]", "cuda": "[kernels,memory]"}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "new",
        help="write the project of a new backend plugin",
        description="Write a project with the backend NAME, which sums through torch.distributed, or by native code of "
        "its own: a place to begin.",
    )
    parser.add_argument("name", metavar="NAME", help="the backend's name: a-z, 0-9 and _, beginning with a letter")
    parser.add_argument(
        "--folder", type=pathlib.Path, metavar="PATH", help="the project's folder, a new one; default: comm-plugin-NAME"
    )
    parser.add_argument(
        "--kernel",
        choices=sorted(_KERNEL_FILES),
        help="with native code: cpp sums CPU tensors over shared memory, cuda by a kernel that reads its peers' memory",
    )
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Write the project and print the next steps; return 1 if it can't be written, else 0."""
    from comm_core._plugins.installed import PluginRejectedError, check_name

    name: str = args.name
    try:
        check_name(name)
    except PluginRejectedError as rejection:
        args.fail(f"no backend can have the name {printable(repr(name))}: {rejection.reason}. Choose another name")
    folder = args.folder or pathlib.Path(f"comm-plugin-{name}")
    try:
        folder.mkdir(parents=True)
        _write(folder, name, args.kernel)
    except FileExistsError:
        args.fail(f"{printable(str(folder))} exists; nothing was written. Name a new folder with --folder PATH")
    except OSError as error:
        print(f"comm-core: the project can't be written: {printable(str(error))}", file=sys.stderr)
        return 1
    print(_next_steps(folder, name))
    return 0


def _write(folder: pathlib.Path, name: str, kernel: str | None) -> None:
    values = {
        "name": name,
        "module": f"comm_plugin_{name}",
        # A distribution's name can't end in a separator.
        "distribution": f"comm-plugin-{name.replace('_', '-').strip('-')}",
        "title": "".join(word.capitalize() for word in name.split("_")),
        "core": _compatible(__version__),
        "extras": _EXTRAS.get(kernel or "", ""),
    }
    templates = resources.files("comm_core") / "_template"
    for path, names in {**_FILES, **_KERNEL_FILES.get(kernel or "", {})}.items():
        file = folder / string.Template(path).substitute(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((templates / f"{each}.template").read_text(encoding="utf-8") for each in names)
        file.write_text(string.Template(text).substitute(values), encoding="utf-8")


def _compatible(running: str) -> str:
    """Return the releases of comm-core with the interface of this one: in 0.x a minor release may change it."""
    version = Version(running)
    # A pre-release comes before its release.
    lowest = version.public if version.is_prerelease else f"{version.major}.{version.minor}"
    return f">={lowest},<" + (f"0.{version.minor + 1}" if version.major == 0 else f"{version.major + 1}")


def _next_steps(folder: pathlib.Path, name: str) -> str:
    return f"""\
Wrote the backend '{name}' to {printable(str(folder))}. Next:

  cd {shlex.quote(str(folder))}
  pip install -e '.[test]'
  comm-core doctor    # is it found, does it load
  comm-core check {name}
  comm-core demo      # is it chosen, is it right, how fast is it
  pytest              # does it keep the contract of the hooks"""
