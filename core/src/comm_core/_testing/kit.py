"""Runs conformance tests of one backend on ranks of this machine: on GPUs if it can use them, else on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from comm_core._testing.handles import FUSED, describe
from comm_core._testing.ranks import Ranks

__all__ = ["WAIT_TIMEOUT_S", "Kit"]

#: The limit of a hot-path wait in the tests, in seconds.
WAIT_TIMEOUT_S = 10.0


class Kit:
    """The backend under test, and processes for its ranks.

    Args:
        backend: the backend's name.
        ranks: the processes.
        skip: raises an exception that says why a test doesn't apply to the backend, such as `pytest.skip`.
        path: folders in which every rank finds the backend; None: it is installed.
        release_s: how long what a fault left may take to go away, in seconds: threads end after their deadlines.
    """

    def __init__(
        self,
        backend: str,
        ranks: Ranks,
        skip: Callable[[str], NoReturn],
        path: Sequence[Path] | None = None,
        release_s: float = 20.0,
    ) -> None:
        self.backend = backend
        self.release_s = release_s
        self._path = path
        self._ranks = ranks
        self._skip = skip

    def run(
        self,
        case: Callable[..., Any],
        *arguments: Any,
        world_size: int = 2,
        group_size: int | None = None,
        dying: Collection[int] = (),
        any_operation: bool = False,
    ) -> list[Any]:
        """Run a function of the `cases` modules on every rank; return the results by rank.

        Skip the test if the backend doesn't serve a group of this size, or sums in no other way than fused.

        Args:
            case: the function.
            arguments: its arguments after the backend's name.
            world_size: the number of ranks.
            group_size: the size of the groups, each of neighbouring ranks, that the backend serves; None: all ranks.
            dying: the ranks that are killed.
            any_operation: whether the function also tests backends that serve the fused operation alone.
        """
        group_size = group_size or world_size
        outcome = self.describe(group_size)
        if outcome["verdict"] != "serves":
            self._skip(f"'{self.backend}' doesn't serve {group_size} ranks here: {outcome['reason']}")
        self.require(any_operation or not outcome["fused_only"], f"another operation than {FUSED}")
        return self.run_anyway(case, *arguments, world_size=world_size, group_size=group_size, dying=dying)

    def require(self, condition: bool, claim: str) -> None:
        """Skip a test of something that the backend doesn't claim."""
        if not condition:
            self._skip(f"'{self.backend}' doesn't claim this: {claim}")

    @functools.cache  # noqa: B019 - a kit lives as long as its tests
    def describe(self, world_size: int) -> dict[str, Any]:
        """Return the outcome of a negotiation for the backend."""
        found: dict[str, Any] = self.run_anyway(describe, world_size=world_size)[0]
        return found

    def check_outcome(self, world_size: int) -> None:
        """The backend serves a group, or its `is_available` refuses it; anything else is an `AssertionError`."""
        outcome = self.describe(world_size)
        verdict = outcome["verdict"]
        assert verdict != "absent", f"'{self.backend}' isn't installed, or can't be loaded: comm-core doctor"
        assert verdict in ("serves", "unavailable"), f"{verdict}: {outcome['reason']}"
        if "is_available" in outcome["hooks"]:  # without it, the backend claims no dtype
            assert not outcome["dropped"], f"the admission test found faults: {outcome['dropped']}"

    def run_anyway(
        self,
        case: Callable[..., Any],
        *arguments: Any,
        world_size: int,
        group_size: int | None = None,
        dying: Collection[int] = (),
    ) -> list[Any]:
        """Run a function on every rank, whether or not the backend can serve; see `run`."""
        settings = {
            "COMM_CORE_BACKENDS": self.backend,
            "COMM_CORE_WAIT_TIMEOUT_S": str(WAIT_TIMEOUT_S),
            # Otherwise torch ends the process when a peer of its NCCL communicator, the fallback's, is killed.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        }
        gpus = torch.cuda.device_count()
        on_gpus = gpus >= (group_size or world_size)
        return self._ranks.run(
            case,
            self.backend,
            *arguments,
            world_size=world_size,
            backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            env=settings,
            path=[self._path or ()] * world_size,
            installed=self._path is None,
            deadline_s=240.0,
            dying=dying,
            # Ranks that are in no group together may share a GPU.
            devices=[rank % gpus for rank in range(world_size)] if on_gpus else None,
        )
