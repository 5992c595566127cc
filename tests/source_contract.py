"""What an integration needs of an engine: names and signatures, read from sources without importing them.

The record of an integration, contract.json, has for each name its signatures or values with the releases that have
them. A release fits if each of its names has a recorded form; a new form needs a look at the integration's code first.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["ABSENT", "Contract", "Read"]

ABSENT = "absent"

#: Returns a file's text by its path, such as "vllm/envs.py".
Read = Callable[[str], str]


class Contract:
    """The names of an engine that an integration needs.

    Args:
        engine: the engine's import package.
        record: the file with the recorded forms.
        names: by file, or by several files separated by spaces of which each release has one: functions and methods,
            with their signatures and what they return if that is a constant; attributes and module variables, with
            their values; and `call of NAME`, with the arguments' names.
        used: by a title, which files are searched, and for which expression: the record has what its groups find.
    """

    def __init__(
        self,
        engine: str,
        record: Path,
        names: Mapping[str, Sequence[str]],
        used: Mapping[str, tuple[re.Pattern[str], re.Pattern[str]]],
    ) -> None:
        self.engine, self.record, self.names, self.used = engine, record, names, used

    def extract(self, read: Read, files: Iterable[str]) -> dict[str, str]:
        """Return the form of each name, `ABSENT` for one that isn't there.

        Args:
            read: as above.
            files: the paths of all files.
        """
        files = [*files]
        found = {}
        for paths, names in self.names.items():
            for name in names:
                forms = [_form(ast.parse(read(path)), name) for path in paths.split() if not files or path in files]
                found[f"{paths}: {name}"] = next((form for form in forms if form != ABSENT), ABSENT)
        for title, (path, expression) in self.used.items():
            texts = [read(name) for name in files if path.fullmatch(name)]
            used = {group for text in texts for match in expression.finditer(text) for group in match.groups() if group}
            found[title] = ", ".join(sorted(used))
        return found

    def open_source(self, path: Path) -> tuple[str, dict[str, str]]:
        """Return the release, and the forms of its names, of a wheel or of a folder with the engine's package."""
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                release = path.name.split("-")[1]
                return release, self.extract(lambda name: archive.read(name).decode(), archive.namelist())
        files = [file.relative_to(path).as_posix() for file in path.glob(f"{self.engine}/**/*.py")]
        release = re.findall(r"version = ['\"]([^'\"]+)", (path / self.engine / "_version.py").read_text())[0]
        return release, self.extract(lambda name: (path / name).read_text(), files)

    def load(self) -> dict[str, dict[str, str]]:
        """Return the record: for each name the releases by form, separated by spaces."""
        record: dict[str, dict[str, str]] = json.loads(self.record.read_text())
        return record

    def releases(self) -> set[str]:
        """Return the recorded releases."""
        return {release for forms in self.load().values() for names in forms.values() for release in names.split()}

    def forms_of(self, name: str) -> list[str]:
        """Return the recorded forms of a name, which may be without its file."""
        (forms,) = (forms for key, forms in self.load().items() if key.endswith(f": {name}") or key == name)
        return [*forms]

    def differences(self, found: dict[str, str]) -> list[str]:
        """Return the names with a form that isn't recorded."""
        record = self.load()
        return [
            f"{name}: {form}\n  recorded: {[*record[name]]}" for name, form in found.items() if form not in record[name]
        ]

    def run(self) -> int:
        """Compare the wheels of the command line with the record, or record them; return the exit status."""
        parser = argparse.ArgumentParser(description=f"Compare releases of {self.engine} with {self.record.name}.")
        parser.add_argument("--record", action="store_true", help=f"write {self.record.name} from these releases")
        parser.add_argument("sources", nargs="+", type=Path, help=f"wheels, or folders that have `{self.engine}/`")
        args = parser.parse_args()
        releases = [self.open_source(path) for path in args.sources]
        if args.record:
            record: dict[str, dict[str, str]] = {}
            for release, found in releases:
                for name, form in found.items():
                    forms = record.setdefault(name, {})
                    forms[form] = f"{forms.get(form, '')} {release}".strip()
            self.record.write_text(json.dumps(record, indent=2) + "\n")
            return 0
        status = 0
        for release, found in releases:
            wrong = self.differences(found)
            title = f"{self.engine} {release}: {len(found) - len(wrong)} of {len(found)} names as recorded"
            sys.stdout.write("\n".join([title, *wrong, ""]))
            status |= bool(wrong)
        return status


def _form(module: ast.Module, name: str) -> str:
    if name.startswith("call of "):
        function = name.removeprefix("call of ")
        calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
        if not calls:
            return ABSENT
        return ", ".join([*map(ast.unparse, calls[0].args), *(keyword.arg or "**" for keyword in calls[0].keywords)])
    owner, _, last = name.rpartition(".")
    body: list[ast.stmt] = module.body
    if owner:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        body = classes[0].body if classes else []
    else:  # also inside `if TYPE_CHECKING:`, where vLLM declares its variables
        body = [*body, *(inner for node in body if isinstance(node, ast.If) for inner in node.body)]
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == last:
            return _signature(node)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and last in [
            getattr(target, "id", None) for target in targets
        ]:
            return ast.unparse(node.value) if node.value is not None else "declared"
    return ABSENT


def _signature(node: ast.FunctionDef) -> str:
    constants = [inner.value for inner in node.body if isinstance(inner, ast.Return)]
    value = constants[0] if len(constants) == 1 and isinstance(constants[0], ast.Constant) else None
    return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(value)}" if value is not None else "")
