"""The base class of contenders: memory for chains, and closing."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from comm_bench.cases import BenchCase
from comm_bench.contenders import Contender, State
from comm_bench.roster import Roster


class Idle(Contender):
    """Does nothing; its `close` raises `error`."""

    def __init__(self, name: str = "idle", error: Exception | None = None) -> None:
        super().__init__(name)
        self.error = error
        self.closed = False

    def supports(self, case: BenchCase) -> bool:
        return bool(case)

    def call(self, state: State, weight: torch.Tensor | None, *, in_place: bool) -> State:
        assert weight is None or in_place
        return state

    def close(self) -> None:
        self.closed = True
        if self.error is not None:
            raise self.error

    @property
    def held_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._inputs)


@pytest.mark.parametrize("op", ["all_reduce", "all_reduce_add_rms_norm"])
def test_inputs_of_a_sweep_in_small_steps_take_a_few_times_the_largests_memory(op: str) -> None:
    contender = Idle()
    for rows in range(1, 1001):
        case = BenchCase(op, "eager", "out", "bfloat16", "cpu", (rows, 64))
        state = contender.inputs(case)
        assert [tensor.shape for tensor in state] == [(rows, 64)] * (1 + case.fused)
        assert all(tensor.dtype is torch.bfloat16 and not tensor.data_ptr() % 64 for tensor in state)
        assert len(state) == 1 or state[0].data_ptr() + case.nbytes <= state[1].data_ptr()
    assert contender.held_nbytes < 5 * sum(tensor.nbytes for tensor in state)
    contender.release()
    assert not contender.held_nbytes


def test_a_contender_that_cannot_be_closed_stops_no_other_from_closing(caplog: pytest.LogCaptureFixture) -> None:
    contenders = [Idle("one"), Idle("two", RuntimeError("the driver is gone")), Idle("three")]
    roster = Roster(list(contenders), {}, cast("Any", None))
    roster.close()
    assert all(contender.closed for contender in contenders)
    assert not roster.contenders
    (record,) = caplog.records
    assert "two can't be closed" in record.getMessage()
    assert "the driver is gone" in caplog.text
