from __future__ import annotations

import dataclasses

import pytest
from comm_core.env import PREFIX, Settings
from hypothesis import given, settings
from hypothesis import strategies as st

VARIABLES = {
    "COMM_CORE_BACKENDS": "backends",
    "COMM_CORE_DISABLE": "disable",
    "COMM_CORE_CONTROL_TIMEOUT_S": "control_timeout_s",
    "COMM_CORE_CONNECT_TIMEOUT_S": "connect_timeout_s",
    "COMM_CORE_WAIT_TIMEOUT_S": "wait_timeout_s",
    "COMM_CORE_IMPORT_TIMEOUT_S": "import_timeout_s",
    "COMM_CORE_MEMORY_BUDGET_NBYTES": "memory_budget_nbytes",
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
        ("shm,nccl,shm", ("shm", "nccl")),
        ("a b", ("a b",)),
    ],
)
def test_names_are_separated_by_commas(text: str, names: tuple[str, ...]) -> None:
    assert Settings.read({"COMM_CORE_BACKENDS": text}).backends == names
    assert Settings.read({"COMM_CORE_DISABLE": text}).disable == names


def test_a_list_of_no_names_is_a_mistake() -> None:
    """Taken at its word, it would block every backend without a word."""
    for name in ("COMM_CORE_BACKENDS", "COMM_CORE_DISABLE"):
        with pytest.raises(ValueError, match=f"{name}=',' can't be read: it names no backend"):
            Settings.read({name: ","})


@pytest.mark.parametrize("name", [name for name in VARIABLES if name.endswith("_S")])
def test_seconds_are_positive_and_finite(name: str) -> None:
    assert getattr(Settings.read({name: "2.5"}), VARIABLES[name]) == 2.5
    for text in ("0", "-1", "inf", "nan", "soon", "5 s"):
        with pytest.raises(ValueError, match=f"{name}='{text}' can't be read"):
            Settings.read({name: text})


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
    assert set(found.shared()) == set(VARIABLES) - {"COMM_CORE_CACHE_DIR"}
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
