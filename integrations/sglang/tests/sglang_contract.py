"""What this package needs of SGLang: names and signatures, read from sources without importing them.

python sglang_contract.py sglang-0.5.23-*.whl          # or the folder that has `sglang/`: compare with contract.json
python sglang_contract.py --record FOLDER-OR-WHEEL...  # write contract.json
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "tests"))

from source_contract import Contract

_COMMUNICATORS = "sglang/srt/distributed/device_communicators"
_RUNNER = "sglang/srt/model_executor"
# Attributes of `ca_comm` that SGLang and its models read: this package's object must have all of them.
CUSTOM = "attributes of ca_comm"
GROUP_NAMES = "names of groups"

CONTRACT = Contract(
    "sglang",
    Path(__file__).with_name("contract.json"),
    {
        "sglang/srt/environ.py": [
            "Envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE",
            "Envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH",
        ],
        "sglang/srt/plugins/__init__.py": ["GENERAL_PLUGINS_GROUP", "load_plugins"],
        "sglang/srt/plugins/hook_registry.py": [
            "HookRegistry._hooks",
            "HookRegistry._patched",
            "HookRegistry.apply_hooks",
            "HookRegistry.register",
            "HookType.AROUND",
        ],
        "sglang/srt/distributed/parallel_state.py": [
            "GroupCoordinator._all_reduce_out_place",
            "GroupCoordinator.all_reduce",
            "GroupCoordinator.destroy",
            "GroupCoordinator.graph_capture",
            "call of CAClass",
            "call of dispatch_custom_allreduce",
            "get_attn_tp_group",
            "get_moe_ep_group",
            "get_moe_tp_group",
        ],
        f"{_COMMUNICATORS}/custom_all_reduce.py": ["dispatch_custom_allreduce"],
        f"{_COMMUNICATORS}/custom_all_reduce_v2.py": [
            "CustomAllReduceV2.capture",
            "CustomAllReduceV2.close",
            "CustomAllReduceV2.custom_all_reduce",
            "CustomAllReduceV2.should_custom_ar",
        ],
        "sglang/srt/layers/flashinfer_comm_fusion.py": [
            "flashinfer_allreduce_residual_rmsnorm",
            "pre_initialize_workspaces",
            "resolve_fusion_group",
        ],
        "sglang/srt/layers/layernorm.py": ["call of flashinfer_allreduce_residual_rmsnorm"],
        # The largest batch that SGLang fuses.
        "sglang/srt/layers/communicator.py sglang/srt/layers/layer_boundary/residual/add_norm.py": [
            "FUSE_ALLREDUCE_MAX_BATCH_SIZE"
        ],
        f"{_RUNNER}/model_runner.py": ["ModelRunner._pre_initialize_flashinfer_allreduce_workspace"],
        f"{_RUNNER}/model_runner.py {_RUNNER}/runner/base_runner.py": [
            "call of self._pre_initialize_flashinfer_allreduce_workspace"
        ],
        f"{_RUNNER}/runner/base_runner.py": ["BaseRunner._pre_initialize_flashinfer_allreduce_workspace"],
        f"{_RUNNER}/forward_batch_info.py": ["compute_local_num_token_non_padded"],
    },
    {
        CUSTOM: (
            re.compile(
                rf"{_COMMUNICATORS}/vocab_gather\.py|sglang/srt/layers/(communication|moe|quantization)/\w+\.py"
                r"|sglang/srt/layers/dp_attention\.py|sglang/srt/models/(beam|muse_spark|minimax_m2|minimax_m3)\.py"
                r"|sglang/srt/distributed/parallel_state\.py"
            ),
            re.compile(
                r"\bca_comm\.(\w+)|(?<![.\w])(?:tp_)?comm\.(disabled|group|device|rank|world_size|obj|config|has_multicast"
                r"|max_\w+|_push_\w+|supports_push|reserve_push_capacity|uses_\w+)\b"
            ),
        ),
        GROUP_NAMES: (
            re.compile(r"sglang/srt/distributed/parallel_state\.py"),
            re.compile(r"\bgroup_name=\"(\w+)\""),
        ),
    },
)

if __name__ == "__main__":
    sys.exit(CONTRACT.run())
