"""The conformance kit: tests that a backend plugin keeps the contract of `comm_core.hookspecs`.

```python
from comm_core.testing import BackendConformance


class TestMine(BackendConformance):
    backend = "mine"
```

pytest runs the standard tests in real processes, the ranks of groups on this machine: on its GPUs if there are enough
for the group, else on CPUs. Tests of a group that the backend says it can't serve here are skipped, with its reason.

Requires the extra `testing` of comm-core, and the plugin installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from comm_core._testing import capture_cases, cases, fault_cases, padded_cases, variant_cases, wire_cases
from comm_core._testing.examine import describe_faults
from comm_core._testing.kit import WAIT_TIMEOUT_S, Kit
from comm_core._testing.ranks import DEAD, Ranks

__all__ = ["BackendConformance"]


class BackendConformance:
    """The standard tests of a backend; subclass it, and name the backend.

    A standard test can't be left out or replaced: a subclass that defines one must mark it with
    `pytest.mark.xfail(reason=...)`, which pytest's report lists (`pytest -rx`). It runs the standard test by `super()`.

    Attributes:
        backend: the name of the installed backend.
        world_sizes: the sizes of the groups in which sums are tested.
        repeatable: whether the backend promises the same bits for the same inputs.
        equal_bits: whether the backend promises the same bits on all ranks.
        huge_on_cpus: whether to sum a message beyond 2 GiB also on CPUs, where that takes up to a minute.

    Raises:
        TypeError: on definition of a subclass that has no `backend`, or that replaces a standard test.
    """

    backend: ClassVar[str]
    world_sizes: ClassVar[tuple[int, ...]] = (2, 3)
    repeatable: ClassVar[bool] = False
    equal_bits: ClassVar[bool] = False
    huge_on_cpus: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse a subclass that leaves standard tests out."""
        super().__init_subclass__(**keywords)
        if not isinstance(getattr(cls, "backend", None), str):
            raise TypeError(f'{cls.__name__} names no backend: set backend = "..."')
        for name, test in vars(cls).items():
            if name in vars(BackendConformance) and name.startswith("test_") and not _may_fail(test):
                raise TypeError(
                    f"{cls.__name__}.{name} replaces a standard test. If the backend can't keep this rule yet, mark it "
                    f"with pytest.mark.xfail(reason=...) and call super().{name}"
                )

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        """The processes of the class's tests."""
        ranks = Ranks(tmp_path_factory.mktemp("ranks"))
        yield Kit(cls.backend, ranks, pytest.skip)
        ranks.close()

    def test_it_serves_a_group_or_says_why_not(self, kit: Kit) -> None:
        """A group of two: the backend serves it, or its `is_available` refuses it; it doesn't fail."""
        kit.check_outcome(2)

    def test_it_answers_validly_about_every_topology(self, kit: Kit) -> None:
        """`comm-core check` finds no fault: `is_available` answers about each recorded topology, twice the same."""
        (faults,) = kit.run_anyway(describe_faults, world_size=1)
        assert not faults, "\n".join(faults)

    def test_sums_are_as_near_as_rounding_allows(self, kit: Kit) -> None:
        """Random numbers of every dtype, at sizes around the edges of every range and odd ones, against float64."""
        for world_size in self.world_sizes:
            kit.run(cases.sums_are_near_the_reference, world_size=world_size)

    def test_integers_are_summed_exactly(self, kit: Kit) -> None:
        """Integers that differ between all ranks and places, as an off-by-one at the end would show."""
        for world_size in self.world_sizes:
            kit.run(cases.integers_are_exact, world_size=world_size)

    def test_inputs_are_kept_and_only_outputs_written(self, kit: Kit) -> None:
        """Without `out`, with `out`, and in place."""
        kit.run(cases.outputs_go_where_they_should)

    def test_tensors_of_any_layout_are_summed(self, kit: Kit) -> None:
        """Strided, misaligned and empty tensors."""
        kit.run(cases.any_layout_is_summed)

    def test_messages_beyond_2_gib_are_summed(self, kit: Kit) -> None:
        """If a range takes so many bytes, and this machine has the memory: elements at the ends, and around 2 GiB."""
        for missing in kit.run(cases.a_huge_message_is_summed, self.huge_on_cpus):
            kit.require(not missing, missing)

    def test_a_rerun_gives_the_same_bits(self, kit: Kit) -> None:
        """If `repeatable`: two runs with the same inputs."""
        kit.require(self.repeatable, "repeatable")
        for first, second in zip(*(kit.run(cases.results, 1 << 18) for _ in range(2)), strict=True):
            assert [what for (what, bits), (_, others) in zip(first, second, strict=True) if bits != others] == []

    def test_all_ranks_get_the_same_bits(self, kit: Kit) -> None:
        """If `equal_bits`: the results of all ranks."""
        kit.require(self.equal_bits, "equal_bits")
        for world_size in self.world_sizes:
            first, *others = kit.run(cases.results, 1 << 18, world_size=world_size)
            for other in others:
                assert [what for (what, bits), (_, theirs) in zip(first, other, strict=True) if bits != theirs] == []

    def test_sums_have_the_bits_that_numerics_promise(self, kit: Kit) -> None:
        """If `Available.numerics` is "rank_order_fp32": sums in deterministic groups, in one piece and in several."""
        for world_size in self.world_sizes:
            for left_out in kit.run(cases.sums_are_in_rank_order, world_size=world_size):
                kit.require(not left_out, f"numerics ({left_out})")

    def test_sums_over_a_wire_are_within_its_bound(self, kit: Kit) -> None:
        """If a range has a wire, in groups that ask for it: errors, NaNs, equal bits on all ranks and in a rerun."""
        for world_size in self.world_sizes:
            for quantised in kit.run(wire_cases.sums_over_a_wire_are_within_its_bound, world_size=world_size):
                kit.require(quantised, "a range with a wire")

    def test_many_calls_in_a_row_are_right(self, kit: Kit) -> None:
        """Calls of changing sizes, without a pause; the ranks drift apart."""
        kit.run(cases.many_calls, 400)

    def test_a_rank_that_comes_late_is_waited_for(self, kit: Kit) -> None:
        """A delay below the wait's limit changes nothing."""
        kit.run(cases.a_rank_is_slow, 1.5, any_operation=True)

    def test_two_groups_dont_mix(self, kit: Kit) -> None:
        """Alternating calls in two groups of the same ranks."""
        kit.run(cases.groups_dont_mix)

    def test_sub_groups_are_served(self, kit: Kit) -> None:
        """Groups that leave out the first or the last of three ranks."""
        results = kit.run(cases.sub_groups_are_served, world_size=3, group_size=2)
        assert all(results), results

    def test_preparing_again_and_for_larger_shapes_works(self, kit: Kit) -> None:
        """`comm.pre_capture_init` for one shape twice, then for larger ones."""
        kit.run(cases.preparing_is_repeatable, any_operation=True)

    def test_captured_calls_are_replayed(self, kit: Kit) -> None:
        """Warm-ups inside `comm.capture()`; on GPUs, graphs of several sizes, replayed with other data, twice."""
        kit.run(capture_cases.captured_calls_are_replayed, any_operation=True)

    def test_a_capture_that_fails_on_one_rank_is_forgotten(self, kit: Kit) -> None:
        """The rank sees its own error, the others at most a CaptureError; the next capture works."""
        kit.run(capture_cases.a_capture_fails_on_one_rank, any_operation=True)

    def test_fused_calls_are_right(self, kit: Kit) -> None:
        """If the backend serves `all_reduce_add_rms_norm`: every shape that its ranges take, also in place."""
        kit.require("all_reduce_add_rms_norm" in kit.describe(2)["hooks"], "the hook all_reduce_add_rms_norm")
        kit.run(capture_cases.fused_calls_are_right, any_operation=True)

    def test_variants_give_the_same_bits(self, kit: Kit) -> None:
        """If the backend has the hooks `variants` and `use_variants`: sums and fused calls by each of them."""
        kit.require("variants" in kit.describe(2)["hooks"], "the hooks variants and use_variants")
        kit.run(variant_cases.variants_give_the_same_bits, any_operation=True)

    def test_padded_batches_are_summed(self, kit: Kit) -> None:
        """If the backend has `padded_session`: the number of real rows changes between calls and replays; no wire."""
        kit.require("padded_session" in kit.describe(2)["hooks"], "the hook padded_session")
        kit.run(padded_cases.padded_batches_are_summed, any_operation=True)

    def test_closed_groups_leave_nothing(self, kit: Kit) -> None:
        """Descriptors, threads, shared mappings, segments and GPU memory, over six handles; `close` twice."""
        kit.run(cases.closed_groups_leave_nothing, 6, any_operation=True)

    def test_suspended_groups_resume(self, kit: Kit) -> None:
        """If the backend has the hooks `suspend` and `resume`: three times, with right sums afterwards."""
        kit.require("suspend" in kit.describe(2)["hooks"], "the hooks suspend and resume")
        kit.run(cases.suspended_and_resumed, any_operation=True)

    def test_a_fault_in_connect_is_agreed_and_leaves_nothing(self, kit: Kit) -> None:
        """`connect` raises on one rank, at its begin and in each exchange, then hangs: all ranks drop the backend."""
        kit.run(fault_cases.connect_fails, kit.release_s, any_operation=True)

    def test_a_rank_that_is_slow_in_connect_is_waited_for(self, kit: Kit) -> None:
        """A delay at its begin and before each exchange changes nothing."""
        kit.run(fault_cases.connect_is_slow, 0.3, any_operation=True)

    def test_a_rank_killed_in_connect_releases_the_others(self, kit: Kit) -> None:
        """The peers of a process that dies in `connect` get an error, and keep nothing."""
        results = kit.run(fault_cases.a_rank_is_killed_in_connect, kit.release_s, dying=[1], any_operation=True)
        assert results[1] == DEAD

    def test_a_fault_in_preparation_is_agreed_and_leaves_nothing(self, kit: Kit) -> None:
        """If the backend has `pre_capture_init`: it raises on one rank, and all ranks drop the backend."""
        kit.require("pre_capture_init" in kit.describe(2)["hooks"], "the hook pre_capture_init")
        kit.run(fault_cases.preparing_fails, kit.release_s, any_operation=True)

    def test_a_fault_in_suspension_stops_the_handle(self, kit: Kit) -> None:
        """If the backend has `suspend`: it, and then `resume`, raises on one rank."""
        kit.require("suspend" in kit.describe(2)["hooks"], "the hooks suspend and resume")
        kit.run(fault_cases.suspending_fails, kit.release_s, any_operation=True)

    def test_a_call_that_raises_on_one_rank_ends_the_others_calls(self, kit: Kit) -> None:
        """All ranks get an error, and at every later call; the closed group leaves nothing."""
        kit.run(fault_cases.a_call_fails, False, kit.release_s, any_operation=True)

    def test_a_call_without_one_rank_ends(self, kit: Kit) -> None:
        """One rank doesn't call: the others' calls end by the wait's limit, and then that rank's, too."""
        kit.run(fault_cases.a_call_fails, True, kit.release_s, any_operation=True)

    def test_a_group_recovers_with_the_same_handle(self, kit: Kit) -> None:
        """`comm.recover`: after a misuse the backend is connected again, after a call that raised it is dropped."""
        kit.run(fault_cases.a_group_recovers, kit.release_s)

    def test_a_killed_rank_ends_the_others_calls(self, kit: Kit) -> None:
        """The peers of a process that died get an error soon after the wait's limit, and in every later call."""
        results = kit.run(cases.a_peer_is_killed, dying=[1], any_operation=True)
        kind, text, waited_s = results[0]
        assert results[1] == DEAD
        assert waited_s < WAIT_TIMEOUT_S + 60, f"{kind} came after {waited_s:.0f} s: {text}"


def _may_fail(test: Callable[..., Any] | None) -> bool:
    """Return whether a test is marked as one that may fail, with a reason."""
    marks = getattr(test, "pytestmark", [])
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
