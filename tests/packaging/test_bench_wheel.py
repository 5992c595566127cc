"""The wheel of comm-bench with its kernels: no kernel spills registers on any architecture."""

from __future__ import annotations

import zipfile

import pytest
from wheelhouse import KERNEL_ENTRY, ROOT, BuildWheel, Built, Pip, compile_wheel


@pytest.fixture(scope="module")
def built(
    build_wheel: BuildWheel, pip: Pip, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    return compile_wheel(ROOT / "bench", build_wheel, pip, clean_environ, tmp_path_factory.mktemp("bench"))


def test_no_kernel_spills_and_nvcc_warns_of_nothing(built: Built) -> None:
    entries = KERNEL_ENTRY.findall(built.log)
    assert {arch for _, arch, _, _ in entries} == {"sm_80", "sm_90", "sm_100"}
    assert [entry for entry in entries if entry[2:] != ("0", "0")] == []
    assert [line for line in built.log.splitlines() if "warning" in line.lower()] == []


def test_its_files(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        files = {name.removeprefix("comm_bench/") for name in archive.namelist()}
    assert {"_lib/comm_bench.so", "csrc/limits.cu", "schema.json", "py.typed"} <= files
    assert not built.wheel.name.endswith("-any.whl")
