"""The kernels of the benchmark's limits compile for every architecture of a wheel; test_bench_gpus.py runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import comm_bench
import pytest
from comm_core._native import toolchain


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_the_kernels_are_compiled_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = toolchain.find_sources(Path(comm_bench.__file__).parent)
    assert "limits.cu" in {source.name for source in sources}
    recipe = toolchain.make_recipe("comm_bench", sources, toolchain.find_tools(sources), capabilities=(80, 90, 100))
    for number in (80, 90, 100):
        assert f"-gencode=arch=compute_{number},code=sm_{number}" in recipe.flags
    built = recipe.build(tmp_path)
    assert caplog.text == ""
    import tvm_ffi

    # It contains the CUDA runtime, so it loads without a driver.
    module = tvm_ffi.load_module(str(built))
    for name in ("launch", "hop", "transfer"):
        assert callable(getattr(module, name))
