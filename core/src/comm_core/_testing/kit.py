"""Runs conformance tests of one backend on ranks of this machine: on GPUs if it can use them, else on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from comm_core._testing import cases
from comm_core._testing.ranks import Ranks

__all__ = ["Kit"]

#: The limit of a hot-path wait in the tests, in seconds.
WAIT_TIMEOUT_S = 20.0


class Kit:
    """The backend under test, and processes for its ranks.

    Args:
        backend: the backend's name.
        ranks: the processes.
        path: folders in which every rank finds the backend; None: it is installed.
    """

    def __init__(self, backend: str, ranks: Ranks, path: Sequence[Path] | None = None) -> None:
        self._backend = backend
        self._path = path
        self._ranks = ranks

    def run(
        self,
        case: Callable[..., Any],
        *arguments: Any,
        world_size: int = 2,
        dying: Collection[int] = (),
    ) -> list[Any]:
        """Run a function of `cases` on every rank; return the results by rank. Skips if the backend can't serve."""
        outcome = self.describe(world_size)
        if outcome["verdict"] != "serves":
            pytest.skip(f"'{self._backend}' doesn't serve {world_size} ranks here: {outcome['reason']}")
        return self._run(case, *arguments, world_size=world_size, dying=dying)

    @functools.cache  # noqa: B019 - a kit lives as long as its tests
    def describe(self, world_size: int) -> dict[str, Any]:
        """Return the outcome of a negotiation for the backend."""
        found: dict[str, Any] = self._run(cases.describe, world_size=world_size)[0]
        return found

    def _run(
        self,
        case: Callable[..., Any],
        *arguments: Any,
        world_size: int,
        dying: Collection[int] = (),
    ) -> list[Any]:
        settings = {"COMM_CORE_BACKENDS": self._backend, "COMM_CORE_WAIT_TIMEOUT_S": str(WAIT_TIMEOUT_S)}
        on_gpus = torch.cuda.device_count() >= world_size
        return self._ranks.run(
            case,
            self._backend,
            *arguments,
            world_size=world_size,
            backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            env=settings,
            path=[self._path or ()] * world_size,
            installed=self._path is None,
            deadline_s=240.0,
            dying=dying,
        )
