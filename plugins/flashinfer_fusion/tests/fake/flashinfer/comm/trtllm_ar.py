from __future__ import annotations

import os

_symm_workspace_refs: dict[int, list[object]] = {}


def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace: object, group: object = None) -> None:
    _symm_workspace_refs.pop(id(workspace), None)


def get_trtllm_comm_module() -> None:
    if os.environ.get("FAKE_BUILD") == "fails":
        raise RuntimeError("ninja: build stopped")
