from __future__ import annotations

import copy
import pickle

import comm_core as comm
import pytest
from comm_core import errors

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS)
def test_one_except_catches_everything_that_core_raises(kind: type[Exception]) -> None:
    assert issubclass(kind, comm.CommError)
    assert getattr(comm, kind.__name__) is kind


def test_the_tree_in_the_documentation_is_the_one_that_is_built() -> None:
    tree = [line.split()[:2] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert sorted(name for _, name in tree) == sorted(kind.__name__ for kind in KINDS if kind is not comm.CommError)
    assert all(kind.__bases__[0] is comm.CommError for kind in KINDS if kind is not comm.CommError)


def test_a_timeout_is_also_the_built_in_and_names_the_ranks() -> None:
    error = comm.CommTimeoutError("rank 3 didn't come", ranks=(3,))
    assert isinstance(error, TimeoutError)
    assert (str(error), error.ranks) == ("rank 3 didn't come", (3,))
    assert comm.CommTimeoutError("nobody knows").ranks == ()


def test_a_timeout_survives_the_way_between_processes() -> None:
    error = comm.CommTimeoutError("rank 3 didn't come", ranks=(3,))
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - made in the line itself
        assert (type(other), str(other), other.ranks) == (comm.CommTimeoutError, str(error), (3,))
