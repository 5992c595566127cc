"""The backend keeps the contract of comm_core's hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from comm_core._testing.kit import Kit
from comm_core.testing import BackendConformance

if TYPE_CHECKING:
    from harness import Ranks


class TestShm(BackendConformance):
    backend = "shm"
    world_sizes = (3,)
    repeatable = equal_bits = True

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, ranks: Ranks) -> Kit:
        """The kit on the processes of the other tests, which have imported torch already."""
        return Kit(cls.backend, ranks, pytest.skip)
