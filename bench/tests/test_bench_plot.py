"""The lower bound in the picture."""

from __future__ import annotations

from comm_bench.plot import _limit
from made_up_bench import row, sized


def test_the_lower_bound_comes_from_the_limits_that_were_measured() -> None:
    hop, push = row("limit:hop", 2.0), row("limit:push", 3.0)
    nbytes = [2 * count for count in (1000, 2000)]
    # At the larger message's bandwidth, the smaller one's bytes take 1.5 us, less than its hop. The larger has no hop.
    found = _limit([sized(hop, 1000), sized(push, 1000), sized(push, 2000)])
    assert found == {nbytes[0]: 2.0, nbytes[1]: 3.0}
    assert _limit([sized(hop, 1000)]) == {}
    assert _limit([row()]) == {}
