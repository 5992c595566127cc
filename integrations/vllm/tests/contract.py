"""What this package needs of vLLM: names and signatures, read from sources without importing them.

python contract.py vllm-0.33.0-*.whl            # or the folder that has `vllm/`: compare with contract.json
python contract.py --record FOLDER-OR-WHEEL...  # write contract.json
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "tests"))

from source_contract import Contract

_COMMUNICATORS = "vllm/distributed/device_communicators"
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

CONTRACT = Contract("vllm", Path(__file__).with_name("contract.json"), NAMES, {CUSTOM: (_CUSTOM_FILES, _CUSTOM_USE)})

if __name__ == "__main__":
    sys.exit(CONTRACT.run())
