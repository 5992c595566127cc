"""The launch shapes among which `comm-core tune` chooses, and tables with its choices. Pure.

Sums have the same bits in every launch shape, and so have fused calls in every one but "separate", which isn't offered.
A shape's message may be larger than a slot of the connected session: it then takes several launches.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from comm_core.tuning import VariantChoice, overlay

from comm_plugin_customar_v2 import norm_policy, policy
from comm_plugin_customar_v2.norm_policy import NormRow
from comm_plugin_customar_v2.policy import Row

__all__ = ["Tables", "tables_for", "variants_of", "with_choices"]

_FUSED = "all_reduce_add_rms_norm"
_K, _M = 1 << 10, 1 << 20
# The shapes to offer, by algorithm: from bytes, to bytes, vectors per thread, threads, blocks and pipeline depths, the
# most promising values first.
_GRIDS = {
    "oneshot_push": (
        (0, 64 * _K, (1,), (64, 128, 256, 512, 32), (264,), (0,)),
        (0, 64 * _K, (2,), (64, 128), (264,), (0,)),
        (64 * _K + 1, 4 * _M, (1,), (128, 256, 512, 64, 1024, 192, 384, 768), (264, 132), (0,)),
        (64 * _K + 1, 4 * _M, (2, 4), (128, 256, 512), (264, 132), (0,)),
        (4 * _M + 1, 64 * _M, (4,), (512,), (264, 132), (0,)),
    ),
    "twoshot_push": (
        (0, 4 * _M, (1,), (128, 64), (264,), (0,)),
        (64 * _K + 1, 4 * _M, (1,), (512, 256), (264, 132), (0, 1, 2)),
        (4 * _M + 1, 64 * _M, (1,), (512, 256, 128), (264, 132), (2, 1, 0)),
        (4 * _M + 1, 64 * _M, (2,), (512, 256), (264, 132), (2, 1)),
        (4 * _M + 1, 64 * _M, (4,), (512,), (264, 132), (2,)),
    ),
    "oneshot_stream": (
        (512 * _K, _M - 1, (1, 2), (512, 256), (132,), (1,)),
        (_M, 64 * _M, (2, 4), (512,), (264, 132), (2, 1, 4)),
    ),
}
# The same for fused messages, with clusters in place of threads.
_NORM_GRIDS = {
    "oneshot_push_norm": (
        (0, 512 * _K, (1, 2, 4), (8, 4, 2, 1), (1056,), (0,)),
        (512 * _K + 1, 8 * _M, (1, 2, 4), (2, 1, 4), (1056,), (0,)),
    ),
    "twoshot_push_norm": (
        (0, 2 * _M, (2, 1), (8, 2, 1, 4), (1056,), (0, 1)),
        (2 * _M + 1, 64 * _M, (2, 1), (1, 2), (528, 1056, 264), (0, 1)),
    ),
}
# With more than two ranks, one-shot sends a message to each peer. It isn't offered where it sends so many bytes in all:
# two-shot, with fewer, is then faster.
_ONE_SHOT_NBYTES = 8 * _M
# A cluster with fewer threads in a block has more blocks than it can use.
_MIN_NORM_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables by which a group's messages are served.

    Attributes:
        major: the major version of the devices' compute capability.
        world_size: the number of ranks.
        rows: the table of plain messages.
        norm_rows: the table of fused messages.
        is_forced: whether the option forces the plain table's one row; choices don't change it.
    """

    major: int
    world_size: int
    rows: tuple[Row, ...]
    norm_rows: tuple[NormRow, ...]
    is_forced: bool = False


def tables_for(major: int, world_size: int, forced: Row | None = None) -> Tables:
    """Return a group's own tables; see `policy.rows_for`."""
    rows, norm_rows = policy.rows_for(major, world_size, forced), norm_policy.rows_for(major, world_size)
    return Tables(major, world_size, rows, norm_rows, forced is not None)


def with_choices(tables: Tables, choices: Sequence[VariantChoice]) -> Tables:
    """Return the tables with these choices in place of their rows.

    Raises:
        ValueError: a text isn't one of a launch shape, or the operation has none of its own.
    """
    plain, fused = ([choice for choice in choices if choice.op == op] for op in ("all_reduce", _FUSED))
    other = next((choice.op for choice in choices if choice not in plain and choice not in fused), None)
    if other is not None:
        raise ValueError(f"{other} has no launch shapes of its own: it follows those of {_FUSED}")
    rows = overlay(tables.rows, plain, policy.parse_row)
    norm_rows = overlay(tables.norm_rows, fused, norm_policy.parse_row)
    return dataclasses.replace(tables, rows=tables.rows if tables.is_forced else rows, norm_rows=norm_rows)


def variants_of(tables: Tables, op: str, nbytes: int, num_tokens: int) -> list[str]:
    """Return the texts of the launch shapes that can serve a message: the one in use first, then by promise.

    Args:
        tables: the tables in use.
        op: the operation; that with FP8 out follows the fused one's tables.
        nbytes: the message's size, in bytes; one above the tables' largest has none.
        num_tokens: the number of its rows, if it is fused.
    """
    if nbytes > tables.rows[-1].up_to_nbytes:
        return []
    if op == "all_reduce":
        in_use: Row | NormRow = next(row for row in tables.rows if nbytes <= row.up_to_nbytes)
        by_algorithm: list[Sequence[Row | NormRow]] = (
            [] if tables.is_forced else [_plain(tables, name, nbytes) for name in _GRIDS]
        )
    elif op == _FUSED:
        in_use = next(row for row in tables.norm_rows if nbytes <= row.up_to_nbytes)
        by_algorithm = [_fused(tables, name, nbytes, num_tokens) for name in _NORM_GRIDS]
    else:
        return []
    # The algorithms take turns: the first few shapes have some of each.
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_algorithm))
    return list(dict.fromkeys([str(in_use), *(str(row) for row in turns if row is not None)]))


def _plain(tables: Tables, algorithm: str, nbytes: int) -> list[Row]:
    """Return an algorithm's launch shapes for a plain message, without those that give the same launch."""
    world_size, num_vecs = tables.world_size, -(-nbytes // policy.VEC_NBYTES)
    is_two_shot = algorithm.startswith("twoshot")
    # `two_shot_vecs` in csrc/params.cuh: smaller messages are served in one shot.
    if (is_two_shot and num_vecs < world_size**2) or (not is_two_shot and _sends_much(world_size, nbytes)):
        return []
    work = -(-num_vecs // world_size) if is_two_shot else num_vecs
    found: dict[tuple[int, ...], Row] = {}
    for vecs, threads, blocks, depth in _shapes(_GRIDS[algorithm], nbytes):
        if vecs > (4 if world_size == 2 else 1) or threads > _max_threads(world_size, vecs):
            continue
        grid = min(blocks, -(-work // (threads * vecs)))
        rounds = -(-work // (threads * vecs * grid))
        found.setdefault((vecs, threads, grid, min(depth, rounds)), Row(0, algorithm, vecs, threads, blocks, depth))
    return list(found.values())


def _fused(tables: Tables, algorithm: str, nbytes: int, num_tokens: int) -> list[NormRow]:
    """Return an algorithm's launch shapes for a fused message, without those that give the same launch."""
    world_size, row_vecs = tables.world_size, nbytes // num_tokens // policy.VEC_NBYTES
    is_two_shot = algorithm.startswith("twoshot")
    if (is_two_shot and num_tokens < world_size) or (not is_two_shot and _sends_much(world_size, nbytes)):
        return []
    groups = -(-num_tokens // world_size) if is_two_shot else num_tokens
    most_vecs = 4 if world_size == 2 and not is_two_shot else 2  # `max_norm_vecs` in csrc/norm.cuh
    found: dict[tuple[int, ...], NormRow] = {}
    for vecs, cluster, blocks, depth in _shapes(_NORM_GRIDS[algorithm], nbytes):
        threads = -(-row_vecs // (vecs * cluster))
        if (
            not (1 if world_size == 2 else 2) <= vecs <= most_vecs
            or threads > 1024
            or (cluster > 1 and (tables.major < 9 or threads < _MIN_NORM_THREADS))
        ):
            continue
        clusters = min(blocks // cluster, groups)
        key = (vecs, cluster, clusters, min(depth, -(-groups // clusters)))
        found.setdefault(key, NormRow(0, algorithm, vecs, cluster, blocks, depth))
    return list(found.values())


def _shapes(
    grids: Sequence[tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]], nbytes: int
) -> Iterator[tuple[int, int, int, int]]:
    for low, high, *values in grids:
        if low <= nbytes <= high:
            yield from itertools.product(*values)


def _sends_much(world_size: int, nbytes: int) -> bool:
    return world_size > 2 and (world_size - 1) * nbytes > _ONE_SHOT_NBYTES


def _max_threads(world_size: int, vecs: int) -> int:
    """Return the most threads of a block: `max_threads` in csrc/params.cuh."""
    if world_size == 2:
        return 512 if vecs >= 4 else 1024
    return 256 if (world_size - 1) * vecs >= 5 else 512
