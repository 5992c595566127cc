"""What this package needs of vLLM: names and signatures, read from sources without importing them.

    python contract.py vllm-0.33.0-*.whl            # or the folder that has `vllm/`: compare with contract.json
    python contract.py --record FOLDER-OR-WHEEL...  # write contract.json

contract.json has, for each name, its signatures or values with the releases that have them. A release fits if each of
its names has a recorded form; a new form needs a look at this package's code first.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

RECORD = Path(__file__).with_name("contract.json")
ABSENT = "absent"

_COMMUNICATORS = "vllm/distributed/device_communicators"
# By file: functions and methods, with their signatures and what they return if that is a constant; attributes and
# module variables, with their values; and `call of NAME`, with the arguments' names.
NAMES = {
    "vllm/platforms/interface.py": ["Platform.get_pass_manager_cls", "Platform.use_custom_op_collectives"],
    "vllm/platforms/cpu.py": ["CpuPlatform.device_name", "CpuPlatform.get_device_communicator_cls"],
    "vllm/platforms/cuda.py": [
        "CudaPlatformBase.device_name",
        "CudaPlatformBase.get_device_communicator_cls",
        "CudaPlatformBase.use_custom_op_collectives",
    ],
    "vllm/config/vllm.py": ["get_current_vllm_config_or_none", "VllmConfig.use_cumem_cudagraph_pool"],
    "vllm/compilation/passes/inductor_pass.py": ["InductorPass.hash_source", "enable_fake_mode"],
    "vllm/compilation/passes/pass_manager.py": ["PostGradPassManager.configure", "call of AllReduceFusionPass"],
    "vllm/compilation/passes/vllm_inductor_pass.py": [
        "VllmInductorPass.__init__",
        "VllmInductorPass.time_and_log",
        "VllmPatternMatcherPass.dump_patterns",
        "VllmPatternMatcherPass.match_table",
    ],
    "vllm/config/compilation.py": [
        "CompilationConfig.max_cudagraph_capture_size",
        "PassConfig.fuse_allreduce_rms",
    ],
    "vllm/config/model.py": ["ModelConfig.dtype", "ModelConfig.get_hidden_size"],
    "vllm/config/parallel.py": ["ParallelConfig.enable_elastic_ep"],
    "vllm/envs.py": [
        "VLLM_ALLREDUCE_USE_FLASHINFER",
        "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC",
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "VLLM_BATCH_INVARIANT",
        "__getattr__",
        "compile_factors",
    ],
    "vllm/ir/ops/layernorm.py": ["fused_add_rms_norm"],
    "vllm/plugins/__init__.py": ["DEFAULT_PLUGINS_GROUP", "load_general_plugins"],
    "vllm/distributed/communication_op.py": ["tensor_model_parallel_all_reduce"],
    "vllm/distributed/parallel_state.py": [
        "GroupCoordinator._all_reduce_out_place",
        "GroupCoordinator.graph_capture",
        "_ENABLE_CUSTOM_ALL_REDUCE",
        "_get_unique_name",
        "get_tp_group",
        "call of device_comm_cls",
        "resume_device_comms",
        "suspend_device_comms",
    ],
    f"{_COMMUNICATORS}/base_device_communicator.py": [
        "DeviceCommunicatorBase.destroy",
        "DeviceCommunicatorBase.resume",
        "DeviceCommunicatorBase.suspend",
    ],
    f"{_COMMUNICATORS}/cpu_communicator.py": ["CpuCommunicator.__init__", "CpuCommunicator.all_reduce"],
    f"{_COMMUNICATORS}/cuda_communicator.py": ["CudaCommunicator.__init__", "CudaCommunicator.all_reduce"],
}
# The attributes of `ca_comm` that this file and models read: this package's object must have all of them.
CUSTOM = "attributes of ca_comm"
_CUSTOM_FILES = re.compile(
    rf"vllm/models/.*/nvidia/.*\.py|{_COMMUNICATORS}/cuda_communicator\.py|vllm/distributed/parallel_state\.py"
)
_CUSTOM_USE = re.compile(r"\bca_comm\.(\w+)|\bcomm\.(mnnvl_lamport_\w+)")

Read = Callable[[str], str]


def extract(read: Read, files: Iterable[str]) -> dict[str, str]:
    """Return the form of each name, `ABSENT` for one that isn't there.

    Args:
        read: returns a file's text by its path, such as "vllm/envs.py".
        files: the paths of all files.
    """
    found = {}
    for path, names in NAMES.items():
        module = ast.parse(read(path))
        for name in names:
            found[f"{path}: {name}"] = _form(module, name)
    texts = [read(path) for path in files if _CUSTOM_FILES.fullmatch(path)]
    used = {name for text in texts for match in _CUSTOM_USE.finditer(text) for name in match.groups() if name}
    found[CUSTOM] = ", ".join(sorted(used))
    return found


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


def open_source(path: Path) -> tuple[str, dict[str, str]]:
    """Return the release, and the forms of its names, of a wheel or of a folder with `vllm/`."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return path.name.split("-")[1], extract(lambda name: archive.read(name).decode(), archive.namelist())
    files = [file.relative_to(path).as_posix() for file in path.glob("vllm/**/*.py")]
    release = re.search(r"version = ['\"]([^'\"]+)", (path / "vllm" / "_version.py").read_text())
    return release[1] if release else "unknown", extract(lambda name: (path / name).read_text(), files)


def load() -> dict[str, dict[str, str]]:
    """Return the record: for each name the releases by form, separated by spaces."""
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    return record


def differences(found: dict[str, str]) -> list[str]:
    """Return the names with a form that isn't recorded."""
    record = load()
    return [
        f"{name}: {form}\n  recorded: {[*record[name]]}" for name, form in found.items() if form not in record[name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write contract.json from these releases")
    parser.add_argument("sources", nargs="+", type=Path, help="wheels of vLLM, or folders that have `vllm/`")
    args = parser.parse_args()
    releases = [open_source(path) for path in args.sources]
    if args.record:
        record: dict[str, dict[str, str]] = {}
        for release, found in releases:
            for name, form in found.items():
                forms = record.setdefault(name, {})
                forms[form] = f"{forms.get(form, '')} {release}".strip()
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        return 0
    status = 0
    for release, found in releases:
        wrong = differences(found)
        print(f"vLLM {release}: {len(found) - len(wrong)} of {len(found)} names as recorded", *wrong, sep="\n")
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
