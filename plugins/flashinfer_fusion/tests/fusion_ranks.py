"""Functions that run in each rank: core's part around the hooks, and the expected results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comm_core as comm
import comm_plugin_flashinfer_fusion as plugin
import torch
import torch.distributed as dist
from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe
from comm_core._control.stage import StageAbortedError
from comm_core._control.store import Control, store_of

BUDGET = 1 << 30
BF16 = torch.bfloat16


class Member:
    """One rank of a group: it connects, and runs Collective hooks as core does, with a vote at the end."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, budget: int = BUDGET) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        self.control = Control(store_of(group), dist.get_rank(group), ranks, 60.0)
        self.control.join(set())
        self.channel = SessionChannel()
        self.context = comm.GroupContext(
            group, dist.get_rank(group), len(ranks), device, ranks, self.channel, budget, 30.0
        )
        self.session: Any = None
        self.steps = 0

    def connect(self) -> Any:
        topology: Any = None
        self.session = self.step(lambda: plugin.connect(topology, self.context))
        return self.session

    def prepare(self, max_tokens: int, hidden_size: int, dtype: torch.dtype = BF16) -> Any:
        shapes = comm.Shapes(max_tokens, hidden_size, dtype)
        return self.step(lambda: plugin.pre_capture_init(self.session, shapes))

    def step(self, call: Callable[[], Any]) -> Any:
        """Returns the hook's result; ("failed", the reason, the rank) if it failed on any rank."""
        self.steps += 1
        try:
            with self.channel.open_stage(self.control, f"step {self.steps}", 60.0) as stage:
                try:
                    value = call()
                except StageAbortedError:
                    raise
                except Exception as error:  # as core does
                    raise stage.abort(describe(error)) from error
                stage.all_gather(None, "vote")
        except StageAbortedError as error:
            return "failed", error.reason, error.rank
        return value

    def fused(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Calls the hook, with core's defaults for arguments left out."""
        defaults: tuple[Any, ...] = (1e-6, 0.0, None, None)
        return plugin.all_reduce_add_rms_norm(self.session, *arguments, *defaults[len(arguments) - 3 :])


def integers(rank: int, shape: tuple[int, ...], device: torch.device, salt: int = 0) -> torch.Tensor:
    """Numbers with an exact sum over a few ranks and a residual, in every dtype."""
    numel = torch.Size(shape).numel()
    values = (torch.arange(numel, device=device) * 7919 + rank * 104729 + salt * 31) % 23
    return values.reshape(shape).to(BF16)


def inputs(
    rank: int, world_size: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype = BF16, salt: int = 0
) -> list[torch.Tensor]:
    """This rank's tensor, the residual and the weight."""
    tensor, residual = (integers(which, shape, device, salt) for which in (rank, world_size))
    weight = torch.arange(shape[1], device=device) % 3 + 1
    return [tensor.to(dtype), residual.to(dtype), weight.to(dtype)]


def check(
    results: tuple[torch.Tensor, torch.Tensor],
    world_size: int,
    salt: int = 0,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> None:
    """Compare with the formula in fp64; the sums are exact."""
    normed, summed = results
    shape, device = (len(normed), normed.shape[1]), normed.device
    sums = sum(integers(rank, shape, device, salt).double() for rank in range(world_size + 1))
    assert isinstance(sums, torch.Tensor)
    assert torch.equal(summed.double(), sums), (shape, salt, (summed.double() - sums).abs().max())
    weight = (torch.arange(shape[1], device=device) % 3 + 1).double() + offset
    exact = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + eps) * weight
    unit = torch.finfo(normed.dtype).eps
    torch.testing.assert_close(normed.double(), exact, rtol=unit, atol=1e-6)
