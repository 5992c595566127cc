import torch

from sglang.srt.distributed import parallel_state

workspaces = []


def resolve_fusion_group(*, use_attn_tp_group: bool):
    group = parallel_state._ATTN_TP
    return group.world_size, group.rank_in_group, group


def flashinfer_allreduce_residual_rmsnorm(
    input_tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    max_token_num: int = 2048,
    use_attn_tp_group: bool = True,
):
    return None, None


def pre_initialize_workspaces(max_token_num: int, hidden_dim: int, dtype: torch.dtype, use_oneshot: bool | None = None):
    workspaces.append((max_token_num, hidden_dim, dtype))
