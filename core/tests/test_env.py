from __future__ import annotations

import dataclasses
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from comm_core.env import MAX_TIMEOUT_S, PREFIX, Settings, check_names, check_timeout_s
from hypothesis import given, settings
from hypothesis import strategies as st

VARIABLES = {
    "COMM_CORE_BACKENDS": "backends",
    "COMM_CORE_DISABLE": "disable",
    "COMM_CORE_PLUGINS": "plugins",
    "COMM_CORE_CONTROL_TIMEOUT_S": "control_timeout_s",
    "COMM_CORE_CONNECT_TIMEOUT_S": "connect_timeout_s",
    "COMM_CORE_WAIT_TIMEOUT_S": "wait_timeout_s",
    "COMM_CORE_IMPORT_TIMEOUT_S": "import_timeout_s",
    "COMM_CORE_MEMORY_BUDGET_NBYTES": "memory_budget_nbytes",
    "COMM_CORE_TUNE": "tune",
    "COMM_CORE_DETERMINISTIC": "deterministic",
    "COMM_CORE_WIRE": "wire",
    "COMM_CORE_DEBUG": "debug",
    "COMM_CORE_PROFILE": "profile",
    "COMM_CORE_CACHE_DIR": "cache_dir",
}


def test_these_variables_are_read_and_each_says_what_it_means() -> None:
    assert set(Settings.variables()) == set(VARIABLES)
    assert all(len(meaning) > 20 for meaning in Settings.variables().values())


def test_an_empty_environment_means_the_defaults() -> None:
    assert Settings.read({}) == Settings()
    assert Settings.read(dict.fromkeys(VARIABLES, " ")) == Settings()
    assert Settings().backends is None
    assert Settings().disable == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("nccl", ("nccl",)),
        (" nccl , shm ,", ("nccl", "shm")),
        ("shm,nccl,shm", ("nccl", "shm")),  # the order has no meaning, and ranks may write it differently
        ("a b", ("a b",)),
    ],
)
def test_names_are_separated_by_commas(text: str, names: tuple[str, ...]) -> None:
    assert Settings.read({"COMM_CORE_BACKENDS": text}).backends == names
    assert Settings.read({"COMM_CORE_DISABLE": text}).disable == names
    assert Settings.read({"COMM_CORE_PLUGINS": text}).plugins == names


def test_a_list_of_no_names_is_a_mistake() -> None:
    """Taken at its word, it would block every backend without a word."""
    for name in ("COMM_CORE_BACKENDS", "COMM_CORE_DISABLE", "COMM_CORE_PLUGINS"):
        with pytest.raises(ValueError, match=f"{name}=',' can't be read: it names no backend"):
            Settings.read({name: ","})


@pytest.mark.parametrize("name", [name for name in VARIABLES if name.endswith("_S")])
def test_seconds_are_positive_and_finite(name: str) -> None:
    assert getattr(Settings.read({name: "2.5"}), VARIABLES[name]) == 2.5
    for text in ("0", "-1", "inf", "nan", "soon", "5 s", "1e300", "2592001"):
        with pytest.raises(ValueError, match=f"{name}='{text}' can't be read"):
            Settings.read({name: text})
    assert Settings.read({name: "300"}) == Settings.read({name: "300.0"})
    with pytest.raises(ValueError, match="above 0 and at most 2592000 seconds, which are 30 days"):
        Settings.read({name: "1e300"})


@pytest.mark.parametrize("name", [name for name in VARIABLES if name.endswith("_S")])
def test_every_timeout_is_one_that_threads_and_stores_can_wait_for(name: str) -> None:
    longest = getattr(Settings.read({name: str(MAX_TIMEOUT_S)}), VARIABLES[name])
    # Core adds some of them up.
    event = threading.Event()
    event.set()
    assert event.wait(4 * longest)
    store = dist.HashStore()
    store.set("key", "")
    store.wait(["key"], timedelta(seconds=4 * longest))


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), 1e300, 10**400, MAX_TIMEOUT_S + 1])
def test_an_arguments_timeout_has_the_same_bounds(value: float) -> None:
    with pytest.raises(ValueError, match="30 days"):
        check_timeout_s(value)


def test_an_arguments_timeout_is_a_number() -> None:
    assert check_timeout_s(5) == 5
    assert check_timeout_s(MAX_TIMEOUT_S) == MAX_TIMEOUT_S
    for value in ("5", None, True, [5]):
        with pytest.raises(TypeError, match="expected a number of seconds"):
            check_timeout_s(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("text", ["a" * 100_000, "a," * 50_000, "1" * 100_000, "/" + "x" * 100_000])
def test_a_value_too_long_for_a_message_is_refused_in_a_short_text(name: str, text: str) -> None:
    with pytest.raises(
        ValueError, match=f"{name}=.*can't be read: it has 10000[01] bytes; the limit is 2048"
    ) as raised:
        Settings.read({name: text})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["a\x1b[2J", "a,b\udcff", "a\nb"])
def test_names_that_cant_be_printed_are_refused_printably(text: str) -> None:
    with pytest.raises(ValueError, match="characters that can't be printed") as raised:
        Settings.read({"COMM_CORE_DISABLE": text})
    assert str(raised.value).isprintable()


def test_an_arguments_names_have_the_same_limits() -> None:
    assert check_names(["b", "a", "b"]) == ("a", "b")
    for names, words in ((["a" * 3000], "the names have 3000 bytes"), (["\x1b"], "can't be printed")):
        with pytest.raises(ValueError, match=words):
            check_names(names)
    with pytest.raises(TypeError, match="as strings"):
        check_names([1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("environ", "debug"),
    [
        ({}, False),
        ({"COMM_CORE_DEBUG": "1"}, True),
        ({"COMM_CORE_DEBUG": "True"}, True),
        ({"COMM_CORE_DEBUG": "YES"}, True),
        ({"COMM_CORE_DEBUG": "0"}, False),
        ({"COMM_CORE_DEBUG": "no"}, False),
        ({"COMM_CORE_DEBUG": "false"}, False),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, True),
        ({"TORCH_DISTRIBUTED_DEBUG": "INFO"}, False),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "COMM_CORE_DEBUG": "0"}, False),
    ],
)
def test_the_comparison_of_calls_is_a_switch_that_the_ranks_compare(environ: dict[str, str], debug: bool) -> None:
    found = Settings.read(environ)
    assert found.debug is debug
    assert found.shared()["COMM_CORE_DEBUG"] is debug


@pytest.mark.parametrize("text", ["2", "on", "maybe"])
def test_a_switch_is_yes_or_no(text: str) -> None:
    with pytest.raises(ValueError, match=r"COMM_CORE_DEBUG='.*' can't be read: expected 1, true or yes"):
        Settings.read({"COMM_CORE_DEBUG": text})


def test_bytes_are_a_whole_number() -> None:
    assert Settings.read({"COMM_CORE_MEMORY_BUDGET_NBYTES": "0"}).memory_budget_nbytes == 0
    assert Settings.read({"COMM_CORE_MEMORY_BUDGET_NBYTES": "65536"}).memory_budget_nbytes == 65536
    for text in ("-1", "1.5", "1GiB", "0x10"):
        with pytest.raises(ValueError, match="COMM_CORE_MEMORY_BUDGET_NBYTES"):
            Settings.read({"COMM_CORE_MEMORY_BUDGET_NBYTES": text})


def test_the_cache_is_an_absolute_path_of_each_hosts_own() -> None:
    found = Settings.read({"COMM_CORE_CACHE_DIR": "/scratch/me", "COMM_CORE_DISABLE": "shm"})
    assert found.cache_dir == "/scratch/me"
    assert found.shared() == {**Settings().shared(), "COMM_CORE_DISABLE": ("shm",)}
    assert set(found.shared()) == set(VARIABLES) - {"COMM_CORE_CACHE_DIR", "COMM_CORE_PROFILE"}
    with pytest.raises(ValueError, match="COMM_CORE_CACHE_DIR='cache' can't be read: it must be an absolute path"):
        Settings.read({"COMM_CORE_CACHE_DIR": "cache"})


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(VARIABLES)), st.text(max_size=12), max_size=3))
def test_every_value_of_a_variable_is_read_or_named_in_the_error(environ: dict[str, str]) -> None:
    try:
        found = Settings.read(environ)
    except ValueError as error:
        assert any(str(error).startswith(f"{name}=") for name in environ)  # noqa: PT017 - either outcome is right
    else:
        untouched = {field for name, field in VARIABLES.items() if not environ.get(name, "").strip()}
        assert all(getattr(found, field) == getattr(Settings(), field) for field in untouched)


def test_the_process_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMM_CORE_DISABLE", "shm")
    assert Settings.read().disable == ("shm",)
    monkeypatch.delenv("COMM_CORE_DISABLE")
    assert Settings.read().disable == ()


def test_misspelt_variables_are_found() -> None:
    environ = {"COMM_CORE_BACKEND": "a", "COMM_CORE_BACKENDS": "a", "COMMCORE_X": "", "PATH": "/bin", "COMM_CORE_": ""}
    assert Settings.unknown(environ) == ("COMM_CORE_", "COMM_CORE_BACKEND")
    assert PREFIX == "COMM_CORE_"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().disable = ("a",)  # type: ignore[misc]
