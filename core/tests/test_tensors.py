"""Every make of tensor is summed, or refused, alike on all ranks: by a backend's hooks and by torch.distributed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import faulty_plugins as faulty
import pytest
import tensor_ranks

if TYPE_CHECKING:
    from harness import Ranks


@pytest.mark.parametrize("disabled", ["", "shm"], ids=["shm", "torch.distributed"])
@pytest.mark.parametrize("deterministic", ["0", "1"])
def test_outputs_of_many_equal_calls(ranks: Ranks, disabled: str, deterministic: str) -> None:
    env = {"COMM_CORE_DISABLE": disabled, "COMM_CORE_DETERMINISTIC": deterministic}
    for found in ranks.run(tensor_ranks.reduce_often, env=env, installed=True):
        assert found == dict.fromkeys(found, "True")
        assert len(found) == 9


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("installed", [True, False], ids=["a backend", "torch.distributed"])
def test_every_tensor(ranks: Ranks, tmp_path: Path, installed: bool, world_size: int) -> None:
    path = [[faulty.install_kind(tmp_path, faulty.Good, "first", 300)]] * world_size if installed else []
    one, *others = ranks.run(tensor_ranks.reduce_everything, world_size=world_size, path=path)
    assert others == [one] * (world_size - 1)

    refused = {f"refused {name}": error.__name__ for name, (_, error) in tensor_ranks.REFUSED.items()}
    wrong = {f"out {numel} {name}": "ValueError" for numel in tensor_ranks.SIZES for name in tensor_ranks.WRONG_OUTPUTS}
    expected = {name: (refused | wrong).get(name, "True") for name in one}
    assert {name: text.partition(":")[0] for name, text in one.items()} == expected, one
    assert len(one) == len(tensor_ranks.SUMMED) + len(refused) + 3 * len(tensor_ranks.OUTPUTS) + len(wrong) + 1
