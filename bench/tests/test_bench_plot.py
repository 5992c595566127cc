"""The line in the picture that no all-reduce can beat."""

from __future__ import annotations

from comm_bench.plot import _limit
from made_up_bench import row, sized


def test_the_limit_is_drawn_from_what_there_is() -> None:
    hop, push = row("limit:hop", 2.0), row("limit:push", 3.0)
    nbytes = [2 * count for count in (1000, 2000)]
    # At 1.5 us for the smaller message's bytes, the way takes longer; of the larger one nobody knows the way.
    found = _limit([sized(hop, 1000), sized(push, 1000), sized(push, 2000)])
    assert found == {nbytes[0]: 2.0, nbytes[1]: 3.0}
    assert _limit([sized(hop, 1000)]) == {}
    assert _limit([row()]) == {}
