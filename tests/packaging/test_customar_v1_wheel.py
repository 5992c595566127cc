"""The wheel of comm-plugin-customar-v1 with its kernels: no kernel spills registers on any architecture."""

from __future__ import annotations

import re
import zipfile

import pytest
from wheelhouse import KERNEL_ENTRY, ROOT, BuildWheel, Built, Pip, compile_wheel


@pytest.fixture(scope="module")
def built(
    build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    return compile_wheel(
        ROOT / "plugins" / "customar_v1", build_wheel, pip, clean_environ, tmp_path_factory.mktemp("v1")
    )


def test_no_kernel_spills(built: Built) -> None:
    entries = KERNEL_ENTRY.findall(built.log)
    assert {(*kind_of(name), arch) for name, arch, _, _ in entries} == {
        (*kind, arch)
        for kind in (
            *((algorithm, world) for algorithm in ("one_stage", "two_stage") for world in (2, 4, 6, 8)),
            ("write_test_pages", 0),
            ("read_test_pages", 0),
        )
        for arch in ("sm_80", "sm_90", "sm_100")
    }
    assert [entry for entry in entries if entry[2:] != ("0", "0")] == []


def test_nvcc_warns_of_nothing(built: Built) -> None:
    assert [line for line in built.log.splitlines() if "warning" in line.lower()] == []


def kind_of(name: str) -> tuple[str, int]:
    """Return a kernel's algorithm and world size (0 without one) from its mangled name."""
    found = re.search(r"\d(one_stage|two_stage|write_test_pages|read_test_pages)(?:IN9comm_core\w*?ELi(\d)E)?", name)
    assert found is not None, name
    return found[1], int(found[2] or 0)


def test_its_files(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        files = {name.removeprefix("comm_plugin_customar_v1/") for name in archive.namelist()}
    assert {"_lib/comm_plugin_customar_v1.so", "csrc/world2.cu", "csrc/one_stage.cuh", "py.typed"} <= files
    assert not built.wheel.name.endswith("-any.whl")
