"""What `comm-core demo` sums."""

from __future__ import annotations

import pytest
import torch
from comm_core import cli
from comm_core.cli import demo


@pytest.mark.parametrize("world_size", [2, 8, 16, 18, 64, 256])
@pytest.mark.parametrize("dtype", demo._DTYPES)
def test_sums_are_exact_and_ranks_differ(dtype: str, world_size: int) -> None:
    tensors = [demo._test_tensor(rank, world_size, 1024, dtype, torch.device("cpu")) for rank in range(world_size)]
    total = torch.stack(tensors).double().sum(0)
    assert torch.equal(total.to(tensors[0].dtype).double(), total)
    assert not torch.equal(tensors[0], tensors[1])


def test_no_process_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--nproc", "0"])
    assert ended.value.code == 2
    assert "expected at least one process" in capsys.readouterr().err
