"""What ranks do in the conformance test of a backend's variants; see `cases`."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing.handles import FUSED, FusedCall, SumCall, eager_cells, fused_cells, open_handle
from comm_core._testing.inputs import largest_error, make_inputs
from comm_core.tuning import VariantChoice

__all__ = ["variants_give_the_same_bits"]


class _RandomSum(SumCall):
    """A sum of random numbers, whose bits depend on the order of the ranks."""

    def fill(self, salt: int) -> None:
        numel, dtype = self._tensor.numel(), self.dtype
        self._every = [make_inputs(rank, numel, dtype, salt) for rank in range(dist.get_world_size())]
        self._tensor.copy_(self._every[dist.get_rank()])

    def check_results(self, result: Any, what: str) -> None:
        error = largest_error(result, self._every)
        assert error <= 1, f"{what}: {result.numel()} elements of {result.dtype}: {error:.3g} times the rounding error"


def variants_give_the_same_bits(name: str) -> None:
    """Serve messages of every kind by every variant that is offered for one of them, and compare the results' bits."""
    checked = 0
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name):
            texts = _offered(backend, name, "all_reduce", [(numel * dtype.itemsize, 0) for numel in sizes])
            numels = sizes[:: max(1, len(sizes) // 6)]
            calls: list[SumCall | FusedCall] = [_RandomSum(backend, device, dtype, numel) for numel in numels]
            checked += _compare(backend, name, "all_reduce", texts, calls)
        for dtype_name, cells in itertools.groupby(fused_cells(backend, name), key=lambda cell: cell[0].dtype):
            dtype, shapes = getattr(torch, dtype_name), [shape for _, shape in cells]
            messages = [(num_tokens * hidden * dtype.itemsize, num_tokens) for num_tokens, hidden in shapes]
            texts = _offered(backend, name, FUSED, messages)
            calls = [FusedCall(backend, dtype, shape) for shape in shapes[::3]]
            checked += _compare(backend, name, FUSED, texts, calls)
        assert checked, "the backend offers no choice for any message"
        try:
            backend.use_variants({name: (VariantChoice("all_reduce", "no such variant"),)})
        except ValueError:
            return
        raise AssertionError("use_variants takes a text that isn't one of its variants")


def _offered(backend: comm.Backend, name: str, op: str, messages: Iterable[tuple[int, int]]) -> list[str]:
    """Return all variants that the backend offers for some of the messages, the same on every rank."""
    texts: dict[str, None] = {}
    for nbytes, num_tokens in messages:
        texts.update(dict.fromkeys(backend.variants(op, nbytes, num_tokens).get(name, ())))
    digest = torch.tensor([zlib.crc32("\n".join(texts).encode())], device=backend.device)
    every = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(every, digest)
    assert all(torch.equal(other, digest) for other in every), f"the variants of {op} differ between the ranks"
    return list(texts)


def _compare(
    backend: comm.Backend, name: str, op: str, texts: Sequence[str], calls: Sequence[SumCall | FusedCall]
) -> int:
    """Make each call by each variant; return the number of calls that were compared."""
    if len(texts) < 2:
        return 0
    expected: list[list[torch.Tensor]] = []
    for text in texts:
        backend.use_variants({name: (VariantChoice(op, text),)})
        for number, call in enumerate(calls):
            results = call()
            whole = results if isinstance(results, tuple) else (results,)
            bits = [result.cpu().contiguous().view(torch.uint8) for result in whole]
            if text == texts[0]:
                call.check_results(results, f"the variant {text!r}")
                expected.append(bits)
            same = all(map(torch.equal, bits, expected[number]))
            shape = list(whole[0].shape)
            assert same, f"{op} of {shape} of {call.dtype} has other bits by the variant {text!r} than by {texts[0]!r}"
    backend.use_variants({name: ()})
    return len(calls)
