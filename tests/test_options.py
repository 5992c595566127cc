"""The options of this repository's pytest: by `--require-gpus` no run passes by skipping; `--fast` leaves tests out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CONFTEST = Path(__file__).parents[1] / "conftest.py"
MARKED = """
import pytest

@pytest.mark.gpus(2)
def test_two():
    {body}

def test_none():
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers = gpus(count): needs GPUs\naddopts = --strict-markers -ra\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return pytester


def test_without_the_option_gpu_tests_skip_and_are_listed(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="raise AssertionError"))
    result = run.runpytest()
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs 2 GPU(s)*--require-gpus 2*"])


def test_with_the_option_gpu_tests_run(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="pass"))
    run.runpytest("--require-gpus", "2").assert_outcomes(passed=2)


def test_fewer_gpus_than_promised_are_an_error(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="pass"))
    result = run.runpytest("--require-gpus", "4")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--require-gpus 4: torch can use only 2 on this machine*"])


def test_a_test_that_needs_more_than_promised_still_skips(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="pass") + "\n@pytest.mark.gpus(8)\ndef test_eight():\n    raise AssertionError\n")
    run.runpytest("--require-gpus", "2").assert_outcomes(passed=2, skipped=1)


@pytest.mark.parametrize("body", ["pytest.skip('no driver')", "pytest.importorskip('no_such_module')"])
def test_a_skip_inside_a_gpu_test_fails(run: pytest.Pytester, body: str) -> None:
    run.makepyfile(MARKED.format(body=body))
    result = run.runpytest("--require-gpus", "2")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*test_two skipped in a run that promises its GPUs: *"])


def test_the_conformance_kit_may_skip_what_a_backend_doesnt_claim(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="pytest.skip(\"'mine' doesn't claim this: repeatable\")"))
    run.runpytest("--require-gpus", "2").assert_outcomes(passed=1, skipped=1)


def test_a_skip_by_a_second_marker_or_in_a_fixture_fails(run: pytest.Pytester) -> None:
    run.makepyfile("""
        import pytest

        @pytest.fixture
        def device():
            pytest.skip("no device")

        @pytest.mark.gpus(1)
        def test_fixture(device):
            pass

        @pytest.mark.gpus(1)
        @pytest.mark.skipif(True, reason="not today")
        def test_marker():
            pass
    """)
    outcomes = run.runpytest("--require-gpus", "2").parseoutcomes()
    assert "passed" not in outcomes
    assert "skipped" not in outcomes


def test_a_whole_file_that_skips_fails(run: pytest.Pytester) -> None:
    run.makepyfile(test_a=MARKED.format(body="pass"), test_b="import pytest\npytest.importorskip('no_such_module')\n")
    result = run.runpytest("--require-gpus", "2")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*test_b.py skipped in a run that promises GPUs: *"])


def test_an_expected_failure_stays_one(run: pytest.Pytester) -> None:
    run.makepyfile("""
        import pytest

        @pytest.mark.gpus(1)
        @pytest.mark.xfail
        def test_known():
            raise AssertionError
    """)
    run.runpytest("--require-gpus", "1").assert_outcomes(xfailed=1)


def test_a_run_that_selects_no_gpu_test_is_an_error(run: pytest.Pytester) -> None:
    run.makepyfile(MARKED.format(body="pass"))
    result = run.runpytest("--require-gpus", "2", "-k", "none")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no test that was selected uses a GPU*"])


@pytest.mark.parametrize("marker", ["gpus", "gpus()", "gpus(0)", "gpus('2')", "gpus(count=2)"])
def test_a_marker_without_a_number_is_an_error(run: pytest.Pytester, marker: str) -> None:
    run.makepyfile(f"import pytest\n\n@pytest.mark.{marker}\ndef test_it():\n    pass\n")
    result = run.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it: write the marker as gpus(2)*"])


def test_a_run_is_shuffled_across_files_only_if_asked(run: pytest.Pytester) -> None:
    names = [f"test_{letter}{number}" for letter in "ab" for number in range(8)]
    bodies = {f"test_{letter}": "" for letter in "ab"}
    for name in names:
        bodies[name[:6]] += f"def {name}():\n    pass\n"
    run.makepyfile(**bodies)

    def order(*arguments: str) -> list[str]:
        lines = run.runpytest("-v", "-p", "no:xdist", *arguments).stdout.lines
        return [line.split("::")[1].split()[0] for line in lines if " PASSED" in line]

    assert order() == names
    shuffled = order("--random-order", "--random-order-seed=7")
    assert sorted(shuffled) == names
    assert [name[:6] for name in shuffled] not in (["test_a"] * 8 + ["test_b"] * 8, ["test_b"] * 8 + ["test_a"] * 8)
    result = run.runpytest("--random-order", "--random-order-seed=7")
    result.stdout.fnmatch_lines(["Using --random-order-bucket=global", "Using --random-order-seed=7"])


def test_the_fast_ones_start_no_process(run: pytest.Pytester) -> None:
    run.makepyfile(
        test_one="def test_plain(): pass\ndef test_ranks(ranks): pass\ndef test_more(pytester): pass\n",
        test_two="import subprocess\n\ndef test_plain(): pass\n",
    )
    result = run.runpytest("--fast", "-v")
    result.assert_outcomes(passed=1, deselected=3)
    result.stdout.fnmatch_lines(["test_one.py::test_plain PASSED*"])
