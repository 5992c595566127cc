"""vLLM's own groups and communicators on CPUs, release by release, of the parts that vllm_parts.py wrote."""

from __future__ import annotations

from pathlib import Path

import parts_ranks
import pytest
import vllm_parts
from harness import Ranks, install
from test_vllm_groups import ADDING

RELEASES = vllm_parts.releases() or [
    pytest.param("", marks=pytest.mark.skip(reason="no parts of vLLM here: see integrations/vllm/tests/vllm_parts.py"))
]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["tp", "dp"])
def test_real_groups_on_cpus(release: str, name: str, tmp_path: Path) -> None:
    # vLLM's operators can be defined once in a process.
    pool = Ranks(tmp_path)
    metadata = vllm_parts.write_metadata(tmp_path / "metadata", f"{release}+cpu")
    found = install(tmp_path / "found", "adding", ADDING)
    try:
        results = pool.run(
            parts_ranks.serve_real,
            name,
            path=[[metadata, vllm_parts.FOLDER / release, found]] * 2,
            env={"VLLM_DIST_IDENT": "comm-vllm-test", "VLLM_LOGGING_LEVEL": "INFO"},
        )
    finally:
        pool.close()
    for result in results:
        assert result == {
            "class": "CommCpuCommunicator",
            "stock": "vllm.distributed.device_communicators.cpu_communicator",
            "backend": "adding" if name == "tp" else None,
            "gathered": [0.0, 1.0],
            "closed": True,
        } | ({"slept": True} if tuple(map(int, release.split(".")))[:2] >= (0, 30) else {})
