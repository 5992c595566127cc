"""Messages that aren't what a rank sends: all ranks raise, and the text names the sender. Nobody hangs or crashes."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import faulty_plugins as faulty
import pytest
import torch
import torch.distributed as dist
from comm_core._control.stage import MESSAGE_NBYTES, StageAbortedError
from comm_core._group import create
from comm_core._plan.decide import Evidence, encode_answer
from comm_core._plan.parse import (
    parse_answers,
    parse_each,
    parse_evidence,
    read_failures,
    read_memory,
    read_prepared,
    read_recorded,
    read_shapes,
)
from comm_core.errors import NegotiationError
from comm_core.topology import Device, Host, Link, RankInfo
from comm_core.types import MAX_RANGES, Available, Range
from control_ranks import group_of, in_stage, in_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Ranks

NAN = float("nan")
HUGE = 10**4000


def evidence(version: str = "0.1.0") -> dict[str, Any]:
    """One rank's evidence as the others get it."""
    device = Device("cuda", "GPU-0", "H100", (9, 0), 80 << 30, links={"GPU-1": Link(18, True)})
    info = RankInfo(0, Host("node", "id"), device, versions={"comm_core": version}, plugins={"shm": "1.0"})
    sent: dict[str, Any] = json.loads(json.dumps(Evidence(info, {"COMM_CORE_DISABLE": []}).to_json()))
    return sent


def put(path: str, value: Any) -> dict[str, Any]:
    """Evidence with another value at a path such as "info.host"; `...` takes the field out."""
    changed = evidence()
    *parents, last = path.split(".")
    target = changed
    for name in parents:
        target = target[name]
    if value is ...:
        target.pop(last, None)
    else:
        target[last] = value
    return changed


NOT_OBJECTS = [None, True, 0, -1, 1.5, HUGE, "", "evidence", [], [[]], ["info"]]
EVIDENCE = [
    *NOT_OBJECTS,
    {},
    {"comm_core": "0.1.0"},
    *(put("comm_core", value) for value in (None, 1, [], {}, ...)),
    *(put("info", value) for value in (None, 1, "info", [], {}, ...)),
    *(put("policy", value) for value in (None, 7, [], "x")),
    *(put("failures", value) for value in (None, [], {"shm": None}, {"shm": 5}, {"shm": ["no"]}, {"shm": {}})),
    *(put("error", value) for value in (0, [], {}, True)),
    *(put("info.global_rank", value) for value in (None, "0", 1.0, True, -1, HUGE, ...)),
    *(put("info.host", value) for value in (None, "node", [], {}, {"name": "n"}, {"name": 1, "id": "i"}, ...)),
    *(put("info.host.id", value) for value in (None, 5, [], {})),
    *(put("info.device", value) for value in (1, "cuda", [], {}, {"type": "cuda"})),
    *(put("info.device.capability", value) for value in (None, 9, [9], [9, 0, 0], ["9", "0"], [9, -1])),
    *(put("info.device.memory_nbytes", value) for value in (None, -1, 1.5, "80", HUGE)),
    *(put("info.device.links", value) for value in (None, [], {"GPU-1": None}, {"GPU-1": {"p2p": 1}})),
    *(put("info.device.links.GPU-1.nvlinks", value) for value in ("18", -1, 1.5, True)),
    *(put("info.versions", value) for value in (None, [], "0.1.0", {"torch": None}, {"torch": 2.8})),
    *(put("info.plugins", value) for value in (None, [], ["shm"], {"shm": None}, {"shm": 1})),
    *(put("info.facts", value) for value in (None, [], 3, "facts")),
    *(put("info.unknown", value) for value in (None, [], {"nvml": None})),
]


def shown(value: object) -> str:
    return repr(value)[-60:]


@pytest.mark.parametrize("message", EVIDENCE, ids=shown)
def test_malformed_evidence_names_its_rank(message: Any) -> None:
    with pytest.raises(NegotiationError, match=r"^rank 1 sent a message that can't be read: \w") as raised:
        parse_evidence([evidence(), message, evidence()], lambda rank: f"rank {rank}")
    assert len(str(raised.value)) < 600
    assert str(raised.value).isprintable()


def test_the_table_of_malformed_evidence_is_long() -> None:
    assert len(EVIDENCE) > 84


@pytest.mark.parametrize(
    "message",
    [
        put("info.numa", 1),
        put("info.host.rack", {"a": 1}),
        put("info.device.links.GPU-1.speed", 5),
        put("news", [1]),
        put("info.device", None),
        put("info.device.capability", ...),
        put("info.unknown", ...),
        put("info.facts", {"shm": [1, {"a": None}]}),
    ],
    ids=shown,
)
def test_unknown_fields_are_ignored_and_optional_ones_may_be_missing(message: Any) -> None:
    found = parse_evidence([evidence(), message], str)
    assert found[1].info.host.name == "node"


@pytest.mark.parametrize("extra", [{}, {"news": 1}, {"info": {}}, {"info": None, "policy": 5}])
def test_another_release_is_named_before_anything_else_is_read(extra: dict[str, Any]) -> None:
    messages = [evidence(), evidence(), evidence("0.1.1") | extra]
    with pytest.raises(NegotiationError, match=r"comm-core differs between the ranks: \{2: '0.1.1', others: '0.1.0'\}"):
        parse_evidence(messages, str)
    with pytest.raises(NegotiationError, match=r"Install the same release on every rank$"):
        parse_evidence(messages, str)


YES = encode_answer(Available(300, (Range("all_reduce"),)))
ANSWERS = [
    *NOT_OBJECTS,
    {},
    {"b": YES},
    *({"a": value} for value in (None, 1, "no", [], {}, {"reason": None}, {"reason": 1}, {"reason": []})),
    *({"a": YES | {"priority": value}} for value in (None, "300", 0, -1, 1.5, True, HUGE)),
    *({"a": YES | {"checks_operands": value}} for value in (None, 1, "yes")),
    *({"a": YES | {"ranges": value}} for value in (None, [], {}, "all", [None], [1], [[]], [{}], [{"op": 1}])),
    *(
        {"a": YES | {"ranges": [{"op": "all_reduce"} | fields]}}
        for fields in (
            {"op": "all_gather"},
            {"modes": "eager"},
            {"modes": []},
            {"modes": [1]},
            {"dtypes": ["float7"]},
            {"device_types": ["x" * 1000]},
            {"min_nbytes": -1},
            {"max_nbytes": 1.5},
            {"max_nbytes": HUGE},
            {"multiple_nbytes": 0},
            {"prepared": 1},
            {"only_on_sundays": True},
        )
    ),
    {"a": YES | {"ranges": [{"op": "all_reduce"}] * (MAX_RANGES + 1)}},
    {"a": {"priority": 300}},
    {"a": YES | {"news": 1}},
]


@pytest.mark.parametrize("message", ANSWERS, ids=shown)
def test_malformed_answers_name_their_rank(message: Any) -> None:
    with pytest.raises(NegotiationError, match=r"^rank 1 sent a message that can't be read"):
        parse_answers([{"a": YES}, message], ["a"], lambda rank: f"rank {rank}")


@pytest.mark.parametrize(
    ("read", "right", "wrong"),
    [
        (read_memory, [0, 1 << 40], [None, "1", 1.5, -1, True, HUGE, [], {}]),
        (
            read_failures,
            [{}, {"3": [False, "wrong sums"]}],
            [None, [], 1, {"3": None}, {"3": "wrong sums"}, {"3": [1, "wrong sums"]}, {"3": [True, None]}],
        ),
        (read_recorded, [[], [-1], [0, 3]], [None, 0, {}, [None], ["0"], [-2], [HUGE]]),
        (read_shapes, [[True, 4, 8, "torch.int8"]], [None, [], [True], [1, 4, 8, "x"], [True, "4", 8, "x"], {}]),
        (read_prepared, [[0, None], [5, YES]], [None, [], [0], [None, None], [0, 1], [0, {}], [0, YES, 1]]),
    ],
    ids=["memory", "failures", "recorded", "shapes", "prepared"],
)
def test_malformed_votes_name_their_rank(read: Any, right: list[Any], wrong: list[Any]) -> None:
    assert len(parse_each(right, read, str)) == len(right)
    for value in wrong:
        with pytest.raises(NegotiationError, match=r"^rank 2 sent a message that can't be read"):
            parse_each([right[0], right[0], value], read, lambda rank: f"rank {rank}")


def packed(verdict: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(verdict).encode())).decode()


RAW = [
    "",
    "nothing",
    "\x00\x01",
    "[",
    "null",
    "5",
    "{}",
    "[]",
    '["all_gather"]',
    '["all_gather",1,2]',
    '[1,"all_gather"]',
    '[["all_gather"],1]',
    '[{"a":1},1]',
    '["all_gather",NaN]',
    '["all_gather",1e999]',
    '["all_gather",' + "1" * 5000 + "]",
    '["all_gather",' + "[" * 80 + "]" * 80 + "]",
    '["all_gather",' + "[" * 20_000 + "]" * 20_000 + "]",
    '["all_gather","' + "x" * (MESSAGE_NBYTES + 64) + '"]',
]
VERDICTS = [
    "verdict",
    "\u00e4",
    base64.b64encode(b"no zlib").decode(),
    packed(None),
    packed([]),
    packed({}),
    packed({"values": 5}),
    packed({"values": [1]}),
    packed({"abort": None}),
    packed({"abort": {"reason": 1, "rank": 0, "absent": None}}),
    packed({"abort": {"reason": "no", "rank": "0", "absent": None}}),
    packed({"abort": {"reason": "no", "rank": 0}}),
    packed({"abort": {"reason": "no", "rank": 7, "absent": None}}),
    packed({"abort": {"reason": "no", "rank": 0, "absent": [9]}}),
    base64.b64encode(zlib.compress(b"[" * 100_000)).decode(),
    packed({"values": [1, 2, 3]})[:-8],
]


class Replaces:
    """A store whose user sends another text for each key that ends in `end`."""

    def __init__(self, store: dist.Store, end: str, text: str) -> None:
        self._store, self._end, self._text = store, end, text

    def clone(self) -> Replaces:
        return Replaces(self._store.clone(), self._end, self._text)

    def set(self, key: str, value: str) -> None:
        self._store.set(key, self._text if key.endswith(self._end) else value)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self._store, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", RAW, ids=shown)
def test_a_message_that_cant_be_parsed_aborts_the_stage_by_its_rank(text: str) -> None:
    store = dist.HashStore()
    members = group_of([store, Replaces(store, "/step/0/1", text), store], 3)
    got = in_threads(members, lambda member: in_stage(member, "step", lambda stage: stage.all_gather(member.rank)))
    for error in got:
        assert isinstance(error, StageAbortedError)
        assert error.rank == 1
        assert "can't be read" in error.reason or "exchanges don't match" in error.reason
        assert str(error) == str(got[0])
        assert len(str(error)) < 500


@pytest.mark.parametrize("text", VERDICTS, ids=shown)
def test_a_verdict_that_cant_be_read_aborts_the_stage_alike_on_all_ranks(text: str) -> None:
    store = dist.HashStore()
    members = group_of(store, 3)
    store.set(f"{members[0].prefix}/step/0/verdict", text)
    got = in_threads(members, lambda member: in_stage(member, "step", lambda stage: stage.all_gather(member.rank)))
    for error in got:
        assert isinstance(error, StageAbortedError)
        assert str(error) == str(got[0])
        assert error.rank is None
    for member in members:
        member.finish()


@pytest.mark.parametrize("note", ["", "{}", "[1]", "[" * 50_000, '["other/software"]'])
def test_a_note_that_cant_be_read_deletes_nothing_of_others(note: str) -> None:
    store = dist.HashStore()
    store.set("other/software/verdict", "theirs")
    members = group_of(store, 2)
    store.set(f"{members[0].prefix}/left/0", note)
    for member in members:
        member.finish()
    assert store.get("other/software/verdict") == b"theirs"


def negotiate(end: str, text: str, prepares: bool) -> tuple[str, str]:
    """Get a backend while the last rank sends `text` in place of its message; runs in every rank of the job."""
    rank = dist.get_rank()
    original = create.store_of
    if rank == dist.get_world_size() - 1:
        create.store_of = lambda group: Replaces(original(group), f"{end}/{rank}", text)
    try:
        comm.get_backend()
        if prepares:
            comm.pre_capture_init(max_tokens=4, hidden_size=8, dtype=torch.float32)
    except comm.CommError as error:
        return type(error).__name__, str(error)
    finally:
        create.store_of = original
        comm.close()
    return "", ""


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("/probe/0", "no JSON"),
        ("/probe/0", '["all_gather",null]'),
        ("/probe/0", '["all_gather",' + "[" * 20_000),
        ("/probe/0", '["all_gather",{"comm_core":"9.9","info":7}]'),
        ("/ask/0", '["all_gather",{"first":{"priority":1e999}}]'),
        ("/ask/0", '["all_gather",[1,2]]'),
        ("/connect first/1", '["vote","much"]'),
        ("/admit first 0/0", '["vote",[1]]'),
        ("/prepare 1: shapes/0", '["all_gather",5]'),
    ],
    ids=lambda item: item[:40],
)
def test_one_rank_sends_something_else(ranks: Ranks, tmp_path: Path, end: str, text: str) -> None:
    first = faulty.install_kind(tmp_path, faulty.Good, "first", 300)
    results = ranks.run(negotiate, end, text, end.startswith("/prepare"), world_size=3, path=[[first]] * 3)
    for kind, words in results:
        assert kind == "NegotiationError"
        assert "rank 2" in words or "{2: '9.9', others: " in words
        assert words == results[0][1]
