"""Measurements that run on ranks, and what their documents say."""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.resources
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jsonschema
import pytest
import torch.distributed as dist
from bench_faults import AT, BESIDE, PLAIN, Honest, name_of
from comm_bench import session
from comm_bench.cases import BenchCase, shapes
from comm_bench.document import Listener
from comm_bench.measure import Procedure
from comm_bench.session import measure_all
from comm_core.types import DTYPES, TERMINAL

HIDDEN_SIZE = 128
FLOATS = tuple(name for name in DTYPES if "float" in name)


def measured(
    dtypes: Sequence[str] = ("bfloat16",),
    ops: Sequence[str] = (PLAIN,),
    places: Sequence[str] = ("out", "in"),
    nbytes: Sequence[int] = (BESIDE, AT),
    modes: Sequence[str] = ("eager",),
    **settings: Any,
) -> dict[str, Any]:
    """Measure these cases and return the document, equal on all ranks."""

    def cases(device_type: str) -> list[BenchCase]:
        return [
            BenchCase(op, mode, place, dtype, device_type, shape)
            for op in ops
            for mode in modes
            for place in places
            for dtype in dtypes
            if op == PLAIN or dtype in FLOATS
            for shape in shapes(op, dtype, nbytes, (), (HIDDEN_SIZE,))
        ]

    defaults = Procedure(calls=5, launches=1, warmup=2, repetitions=7, checks=True)
    document, rows = measure_all(cases, ["test"], dataclasses.replace(defaults, **settings), (), Listener())
    assert [row.to_json() for row in rows] == document["rows"]
    return document


class Clock(dt.datetime):
    """A clock that each rank has set to another hour."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Any:
        return super().now(tz) + dt.timedelta(hours=dist.get_rank())


def measured_with(arguments: dict[str, Any]) -> dict[str, Any]:
    with mock.patch.object(session, "dt", SimpleNamespace(datetime=Clock, timezone=dt.timezone)):
        return measured(**arguments)


def measured_nothing() -> str:
    procedure = Procedure(calls=1, launches=1, warmup=1, repetitions=1, checks=True)
    with pytest.raises(ValueError, match="no size to measure") as caught:
        measure_all(lambda _: [], ["test"], procedure, (), Listener())
    return str(caught.value)


def schema() -> jsonschema.Draft202012Validator:
    text = importlib.resources.files("comm_bench").joinpath("schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def by_case(document: dict[str, Any], kind: type[Honest] | None = None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return a contender's rows by operation, place, dtype and bytes; the terminal fallback's for None."""
    name = TERMINAL if kind is None else name_of(kind)
    found = {
        (row["op"], row["place"], row["dtype"], row["nbytes"]): row for row in document["rows"] if row["name"] == name
    }
    assert found, document["absent"]
    return found


def wrong_by(document: dict[str, Any], kind: type[Honest]) -> dict[tuple[str, int], bool]:
    """Return whether a backend had a wrong element, by place and bytes."""
    return {(place, nbytes): row["wrong"] > 0 for (_, place, _, nbytes), row in by_case(document, kind).items()}
