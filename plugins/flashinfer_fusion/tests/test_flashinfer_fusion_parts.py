"""The parts that need no device: the kernel's limits, memory, exchanged messages, FlashInfer's interface, streams."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import comm_core as comm
import pytest
import torch
from comm_plugin_flashinfer_fusion import channel, library, policy, session


@pytest.mark.parametrize("hidden_size", [8, 96, 1024, 2880, 4096, 5120, 7168, 8192, 16384, 32768, 4088])
def test_hidden_sizes_that_the_kernel_takes(hidden_size: int) -> None:
    assert policy.fits_kernel(hidden_size)


# Not a multiple of a vector; more threads than the blocks that divide them evenly can have; none at all.
@pytest.mark.parametrize("hidden_size", [1001, 4, 4104, 8200, 16384 + 8, 32768 + 64, 1 << 20, 0])
def test_other_hidden_sizes(hidden_size: int) -> None:
    assert not policy.fits_kernel(hidden_size)


def test_the_most_tokens() -> None:
    assert policy.max_tokens(2, 4096, 2048) == 1024
    assert policy.max_tokens(2, 4096, 100) == 100
    assert policy.max_tokens(8, 7168, 512) == 73
    assert policy.max_tokens(4, 8200, 512) == 0


def test_a_workspaces_memory() -> None:
    # Two ranks' messages once and three times, flags: each with its padding, in whole 2 MiB.
    assert policy.workspace_nbytes(2, 4 << 20) == (16 + 2 + 2 + 48 + 2) << 20
    assert policy.workspace_nbytes(8, 8) == 6 << 20


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "text", b"\0\xff", [1, (b"", "x")], (), [[]], ("a", [None])])
def test_exchanged_values_arrive_unchanged(value: Any) -> None:
    arrived = channel.decode(channel.encode(value))
    assert arrived == value
    assert type(arrived) is type(value)


def test_a_value_that_cant_be_exchanged_is_named_by_its_type() -> None:
    with pytest.raises(TypeError, match="exchanges a set, which"):
        channel.encode([{1}])


def made_up(**functions: Any) -> Any:
    def create(*, backend, world_size, rank, max_token_num, hidden_dim, dtype, comm_backend, group) -> Any:  # type: ignore[no-untyped-def] # noqa: ANN001
        raise AssertionError

    module = SimpleNamespace(
        create_allreduce_fusion_workspace=create,
        allreduce_fusion=lambda **kwargs: kwargs,
        AllReduceFusionPattern=SimpleNamespace(kARResidualRMSNorm=1),
    )
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def test_a_release_with_another_interface_is_refused_by_what_it_lacks() -> None:
    details = SimpleNamespace()
    library.Library(made_up(), details)
    with pytest.raises(RuntimeError, match=r"has no flashinfer\.comm\.allreduce_fusion"):
        library.Library(made_up(allreduce_fusion=None), details)
    with pytest.raises(RuntimeError, match=r"allreduce_fusion without .*fp32_acc, .*weight_bias, workspace"):
        library.Library(made_up(allreduce_fusion=lambda input, pattern: (input, pattern)), details)  # noqa: A006


def test_the_module_imports_no_flashinfer() -> None:
    assert "flashinfer" not in sys.modules


class Stream:
    """Records what it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.capturing = False
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Streams:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = Stream(1)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current.capturing)

    def using(self, stream: Stream) -> Any:
        streams, before = self, self.current

        class Using:
            def __enter__(self) -> None:
                streams.current = stream

            def __exit__(self, *_: object) -> None:
                streams.current = before

        return Using()


def test_calls_on_two_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    calls: list[Any] = []
    context: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=2)
    made: Any = SimpleNamespace(fuse=lambda *arguments: calls.append(arguments))
    own = session.Session(made, context)
    own._workspace = session._Workspace(object(), 1 << 20, 0)
    x, weight = torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)

    def call(stream: Stream) -> None:
        streams.current = stream
        own.all_reduce_add_rms_norm(x, x, weight, 1e-6, 0.0, None, None)

    one, two, capture = Stream(1), Stream(2), Stream(3)
    for stream in (one, one, two, one):
        call(stream)
    assert one.waited == [two]
    assert two.waited == [one]
    # A recorded call runs when the graph is replayed: the caller orders it.
    capture.capturing = True
    call(capture)
    assert capture.waited == []
    assert own._workspace.recorded
    call(one)
    assert one.waited == [two]
    one.capturing = True
    with pytest.raises(comm.CommError, match="is being captured by now"):
        call(two)
    assert len(calls) == 6
