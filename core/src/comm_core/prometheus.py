"""The numbers of this process's groups for Prometheus; needs the extra `prometheus` of comm-core.

```python
from comm_core.prometheus import Collector
from prometheus_client import REGISTRY, start_http_server

REGISTRY.register(Collector())
start_http_server(9100)
```

| metric | labels | meaning |
|---|---|---|
| `comm_core_calls_total` | `group`, `rank`, `op`, `mode`, `device`, `dtype`, `backend`, `wire` | calls |
| `comm_core_bytes_total` | the same | bytes of the reduced tensors; both by `Backend.stats` |
| `comm_core_waits_total` | `group`, `rank`, `backend`, `peer` | waits for a peer, by `Backend.waits` |
| `comm_core_wait_seconds_total` | the same | their time |
| `comm_core_longest_wait_seconds` | the same | the longest one |
| `comm_core_up` | `group`, `rank`, `backend` | 0 once the group's handle has failed, else 1; of `Backend.name` |

`group` is the process group's name, `rank` this process's rank in the group, and `peer` the group rank waited for.
`wire` is the quantised wire of the calls; "" for exact ones, which to Prometheus is the same as no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as _Collector

from comm_core._group.states import GroupState, all_states

if TYPE_CHECKING:
    from comm_core._handle.backend import Backend

__all__ = ["Collector"]

_GROUP = ("group", "rank")
_CALL = (*_GROUP, "op", "mode", "device", "dtype", "backend", "wire")
_WAIT = (*_GROUP, "backend", "peer")


class Collector(_Collector):
    """Collects the numbers of every group that has a handle. Local; may run in another thread than the calls."""

    def describe(self) -> list[Metric]:
        """Return nothing: registering the collector then needs no group yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all groups; see the module's table."""
        calls = CounterMetricFamily("comm_core_calls", "Calls by route and backend.", labels=_CALL)
        nbytes = CounterMetricFamily("comm_core_bytes", "Bytes of the reduced tensors.", labels=_CALL)
        waits = CounterMetricFamily("comm_core_waits", "Waits for a peer.", labels=_WAIT)
        seconds = CounterMetricFamily("comm_core_wait_seconds", "Time of the waits for a peer.", labels=_WAIT)
        longest = GaugeMetricFamily("comm_core_longest_wait_seconds", "The longest wait for a peer.", labels=_WAIT)
        up = GaugeMetricFamily("comm_core_up", "Whether the group's handle serves calls.", labels=(*_GROUP, "backend"))
        for state, backend in _handles():
            group = (state.name, str(state.control.rank if state.control is not None else 0))
            up.add_metric((*group, backend.name), 0.0 if backend.failure else 1.0)
            for item in backend.stats():
                labels = (*group, item.op, item.mode, item.device_type, item.dtype, item.backend, item.wire)
                calls.add_metric(labels, item.calls)
                nbytes.add_metric(labels, item.nbytes)
            for wait in backend.waits():
                pair = (*group, wait.backend, str(wait.rank))
                waits.add_metric(pair, wait.waits)
                seconds.add_metric(pair, wait.total_us / 1e6)
                longest.add_metric(pair, wait.longest_us / 1e6)
        yield from (calls, nbytes, waits, seconds, longest, up)


def _handles() -> Iterator[tuple[GroupState, Backend]]:
    for state in all_states():
        backend = state.backend
        if backend is not None:
            yield state, backend
