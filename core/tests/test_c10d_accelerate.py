"""accelerate on the backend "comm": a training loop over DistributedDataParallel; needs accelerate installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import Counting

if TYPE_CHECKING:
    from harness import Ranks

pytest.importorskip("accelerate", reason="accelerate isn't installed: pip install accelerate")

STEPS = 3


def train() -> tuple[list[float], int]:
    """Each step's loss on this rank and its mean over the ranks, and the number of sums that the handle served."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier job of this process

    counting = Counting() if dist.get_backend() == "comm" else None
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 1)
    data = torch.utils.data.TensorDataset(torch.arange(16 * STEPS * 2.0).reshape(-1, 8) / 100)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, batches = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.01), loader)
    losses = []
    for (batch,) in batches:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        losses += [loss.item(), accelerator.reduce(loss.detach(), reduction="mean").item()]
    return losses, 0 if counting is None else counting.served


def test_losses_equal_those_of_gloo(ranks: Ranks) -> None:
    # accelerate wants an address, although the process group exists.
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **job} for rank in range(2)]
    found = {
        backend: ranks.run(train, backend=backend, installed=True, env=places, deadline_s=240)
        for backend in ("gloo", "comm")
    }
    for (losses, served), (expected, _) in zip(found["comm"], found["gloo"], strict=True):
        assert len(losses) == 2 * STEPS
        assert losses == expected
        # DistributedDataParallel's one bucket, and the mean of the loss, at each step.
        assert served == 2 * STEPS
