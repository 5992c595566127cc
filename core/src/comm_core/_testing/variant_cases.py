"""What ranks do in the conformance test of a backend's variants; see `cases`."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

import comm_core as comm
from comm_core._testing.handles import FUSED, FusedCall, eager_cells, fused_cells, open_handle
from comm_core._testing.inputs import largest_error, make_inputs
from comm_core.tuning import VariantChoice

__all__ = ["variants_give_the_same_bits"]

_Call = Callable[[str], Sequence[torch.Tensor]]


def variants_give_the_same_bits(name: str) -> None:
    """Serve messages of every kind by every variant that is offered for one of them, and compare the results' bits."""
    checked = 0
    with open_handle(name) as backend:
        for device, dtype, sizes in eager_cells(backend, name):
            texts = _offered(backend, name, "all_reduce", [(numel * dtype.itemsize, 0) for numel in sizes])
            calls: dict[str, _Call] = {
                f"{numel} elements of {dtype} on {device}": functools.partial(_sum, backend, device, dtype, numel)
                for numel in sizes[:: max(1, len(sizes) // 6)]
            }
            checked += _compare(backend, name, "all_reduce", texts, calls)
        for dtype_name, cells in itertools.groupby(fused_cells(backend, name), key=lambda cell: cell[0].dtype):
            dtype, shapes = getattr(torch, dtype_name), [shape for _, shape in cells]
            messages = [(num_tokens * hidden * dtype.itemsize, num_tokens) for num_tokens, hidden in shapes]
            texts = _offered(backend, name, FUSED, messages)
            calls = {
                f"{list(shape)} of {dtype}": functools.partial(_fused, backend, dtype, shape) for shape in shapes[::3]
            }
            checked += _compare(backend, name, FUSED, texts, calls)
        assert checked, "the backend offers no choice for any message"
        try:
            backend.use_variants({name: (VariantChoice("all_reduce", "no such variant"),)})
        except ValueError:
            return
        raise AssertionError("use_variants takes a text that isn't one of its variants")


def _sum(
    backend: comm.Backend, device: torch.device, dtype: torch.dtype, numel: int, what: str
) -> Sequence[torch.Tensor]:
    every = [make_inputs(rank, numel, dtype) for rank in range(dist.get_world_size())]
    result = backend.all_reduce(every[dist.get_rank()].to(device))
    error = largest_error(result, every)
    assert error <= 1, f"{what}: {error:.3g} times the error of rounding"
    return (result,)


def _fused(backend: comm.Backend, dtype: torch.dtype, shape: tuple[int, int], what: str) -> Sequence[torch.Tensor]:
    call = FusedCall(backend, dtype, shape)
    results = call()
    call.check_results(results, what)
    return results


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


def _compare(backend: comm.Backend, name: str, op: str, texts: Sequence[str], calls: Mapping[str, _Call]) -> int:
    """Make each call by each variant; return the number of comparisons."""
    expected: dict[str, list[torch.Tensor]] = {}
    for text in texts if len(texts) > 1 else ():
        backend.use_variants({name: (VariantChoice(op, text),)})
        for what, call in calls.items():
            bits = [result.cpu().contiguous().view(torch.uint8) for result in call(f"{what} by {text!r}")]
            same = all(map(torch.equal, bits, expected.setdefault(what, bits)))
            assert same, f"{what} have other bits by the variant {text!r} than by {texts[0]!r}"
    backend.use_variants({name: ()})
    return len(expected)
