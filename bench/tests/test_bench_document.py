"""The recorded document, its schema and its text."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from comm_bench import stats
from comm_bench.cases import OPS
from comm_bench.document import SCHEMA, footer, heading, preamble, read_rows, tables, with_partial_results
from comm_bench.results import header, summaries, with_ratios
from comm_core.types import DTYPES, MODES, TERMINAL
from made_up_bench import document, on_gpus, recorded, row


@pytest.fixture(scope="module")
def validator() -> Any:
    # From the installed package, where it lies beside the module.
    text = importlib.resources.files("comm_bench").joinpath("schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_documents_match_the_schema(validator: Any) -> None:
    found = recorded()
    validator.validate(found)
    on_gpus(found)
    validator.validate(found)
    found["settings"]["calls"] = None
    found["rows"][0]["wrong"] = None
    validator.validate(found)
    validator.validate(with_partial_results(found, read_rows(found)))


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of a document's objects that the schema describes field by field."""
    if isinstance(value, list):
        return [path for number, item in enumerate(value) for path in paths(item, (*above, number))]
    if not isinstance(value, dict):
        return []
    # Without the objects that may have any keys, and the error of an unreadable clock, which may be missing.
    named = above not in {("absent",), ("machine", "versions")} and value and set(value) != {"unknown"}
    return ([above] if named else []) + [path for key in value for path in paths(value[key], (*above, key))]


def reach(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("gpus", [False, True])
def test_the_schema_refuses_missing_and_surplus_fields(validator: Any, gpus: bool) -> None:
    found = recorded()
    if gpus:
        on_gpus(found)
    tried = 0
    for path in paths(found):
        for name in [*reach(found, path), "surplus"]:
            changed = copy.deepcopy(found)
            if name == "surplus":
                reach(changed, path)[name] = 1
            else:
                del reach(changed, path)[name]
            assert not validator.is_valid(changed), (path, name)
            tried += 1
    assert tried > 100


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *path_, value = path
    *above, name = path_

    def change(found: dict[str, Any]) -> None:
        reach(found, tuple(above))[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("schema", SCHEMA + 1),
        _set("started", "yesterday"),
        _set("rows", []),
        _set("wrong", -1),
        _set("machine", "device_type", "tpu"),
        _set("machine", "ranks", 0),
        _set("machine", "nvlinks", 18),
        _set("settings", "repetitions", 6),
        _set("settings", "confidence", 0.9),
        _set("settings", "checks", 1),
        _set("rows", 0, "kind", "winner"),
        _set("rows", 0, "op", "all_gather"),
        _set("rows", 0, "mode", "lazy"),
        _set("rows", 0, "place", "nowhere"),
        _set("rows", 0, "dtype", "half"),
        _set("rows", 0, "shape", [0]),
        _set("rows", 0, "shape", [1, 2, 3]),
        _set("rows", 0, "times_us", []),
        _set("rows", 0, "times_us", 0, "10"),
        _set("rows", 0, "time_us", 0),
        _set("rows", 0, "copy_us", -1),
        _set("rows", 0, "algbw", None),
        _set("rows", 3, "ratio", {"median": 1, "low": 1, "high": 1, "confidence": 0.98}),
        _set("rows", 0, "wrong", 0.5),
        _set("rows", 3, "wrong", 0),
        _set("rows", 3, "restarts", 1),
        _set("summaries", 0, "sizes", 0),
        _set("summaries", 0, "table", "op", "all_gather"),
        _set("absent", "away", None),
        _set("clocks", "before", []),
    ],
)
def test_the_schema_refuses_invalid_values(validator: Any, change: Callable[[dict[str, Any]], None]) -> None:
    found = recorded()
    validator.validate(found)
    change(found)
    assert not validator.is_valid(found)


def test_the_schema_describes_every_field(validator: Any) -> None:
    def check(schema: Any, where: str) -> int:
        if not isinstance(schema, dict):
            return 0
        found = 0
        for name, each in schema.get("properties", {}).items():
            if isinstance(each, dict) and schema.get("additionalProperties") is False:
                assert "description" in each or "$ref" in each, f"{where}.{name}"
                found += 1
        return found + sum(
            check(item, f"{where}.{key}")
            for key, value in schema.items()
            for item in (value.values() if key in {"properties", "$defs"} else [value])
        )

    assert check(validator.schema, "") > 50


def test_the_schema_has_the_codes_names_and_limits(validator: Any) -> None:
    known = validator.schema["$defs"]
    assert known["op"]["enum"] == list(OPS)
    assert known["mode"]["enum"] == list(MODES)
    assert known["dtype"]["enum"] == list(DTYPES)
    assert validator.schema["properties"]["schema"]["const"] == SCHEMA
    assert known["settings"]["properties"]["repetitions"]["minimum"] == stats.MIN_SAMPLES
    assert known["settings"]["properties"]["confidence"]["minimum"] == stats.CONFIDENCE


def test_wrong_elements_are_added_up() -> None:
    rows = with_ratios([row(wrong=2), row("mine", wrong=3), row("peer", wrong=None), row("limit:copy")])
    found = document(rows)
    assert found["wrong"] == 5
    assert list(footer(found))[-1] == "# Wrong elements: 5"


def test_a_run_without_checks_says_so() -> None:
    found = document(with_ratios([row(wrong=None)]))
    found["settings"]["checks"] = False
    assert list(footer(found))[-1] == "# Wrong elements: 0 (nothing was compared: -c 0)"


def test_a_recorded_run_reads_as_it_was() -> None:
    original = with_ratios([row(), row("mine", 5.0), row("limit:copy", 2.0)])
    found = json.loads(json.dumps(document(original)))
    assert read_rows(found) == [
        dataclasses.replace(each, case=dataclasses.replace(each.case, device_type="cpu")) for each in original
    ]
    assert list(tables(read_rows(found))) == list(tables(original))


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"it has schema {SCHEMA + 1}; this release reads {SCHEMA}"):
        read_rows({**recorded(), "schema": SCHEMA + 1})
    with pytest.raises(ValueError, match="it has schema None"):
        read_rows({})


def test_another_programs_record_is_refused() -> None:
    with pytest.raises(ValueError, match="it isn't a file written by comm-core bench --json"):
        read_rows({"schema": SCHEMA, "results": []})


def test_the_header_has_the_conditions() -> None:
    found = recorded()
    text = "\n".join(preamble(found))
    for part in (
        "comm-core bench -n 5",
        "4 ranks on CPU",
        "torch 2.13.0",
        "not measured: away: it isn't here",
        "98.4%",
    ):
        assert part in text
    assert "clocks" not in text
    on_gpus(found)
    found["machine"]["versions"] |= {"nccl": "2.28.9", "driver": "580"}
    assert heading(found) == "4 ranks on NVIDIA H200; torch 2.13.0, nccl 2.28.9, driver 580"
    text = "\n".join(preamble(found))
    for part in ("L2 60 MiB, warm", "as each kernel asks for it", "clocks of rank 3: unknown NVMLError", "sm_mhz 1980"):
        assert part in text


def test_each_place_has_a_table_with_one_header() -> None:
    rows = [
        dataclasses.replace(row(), case=dataclasses.replace(row().case, place=place, shape=(count,)))
        for place in ("out", "in")
        for count in (8, 16)
    ]
    lines = list(tables(rows))
    assert [text for text in lines if text.startswith("# all")] == [
        "# all_reduce, eager, out of place",
        "# all_reduce, eager, in place",
    ]
    assert lines.count(header()) == 2
    assert sum(TERMINAL in text for text in lines if not text.startswith("#")) == 4


def test_a_case_without_the_fallback_has_no_ratios(validator: Any) -> None:
    found = with_ratios([row("mine", 5.0), row("limit:copy", 1.0)])
    assert [each.ratio for each in found] == [None, None]
    assert summaries(found) == []
    validator.validate(document(found))
