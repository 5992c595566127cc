"""What native code says of a fused call's operands, by operands.h: what core's own look says."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from comm_core._handle import operands
from fake_handle import aligned, fused_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_native_code_takes_what_core_would_hand_over_as_it_is(native: Any, data: st.DataObject) -> None:
    room = aligned(256, torch.float16)
    num_tokens, hidden_size = data.draw(st.integers(1, 3)), 8

    def view(*shape: int) -> torch.Tensor:
        spread = data.draw(st.sampled_from([1, 1, 1, 1, 2]))
        strides = [hidden_size * spread, spread][-len(shape) :]
        # Mostly multiples of 16 bytes, and mostly apart.
        offset = 8 * data.draw(st.integers(0, 24)) + data.draw(st.sampled_from([0] * 9 + [1]))
        return room.as_strided(shape, strides, offset)

    x, residual, weight = view(num_tokens, hidden_size), view(num_tokens, hidden_size), view(hidden_size)
    out = data.draw(st.sampled_from([x, view(num_tokens, hidden_size)]))
    total = data.draw(st.sampled_from([residual, view(num_tokens, hidden_size)]))
    asked = (x, residual, weight, out, total)
    try:
        handed = operands.stage_operands(*asked)
    except ValueError:  # the outputs share memory
        assert not native.fit(*asked)
        return
    # A view of its own that is where its input is may be written to like the input, which core doesn't look for.
    same = out.data_ptr() == x.data_ptr() or total.data_ptr() == residual.data_ptr()
    if all(given is wanted for given, wanted in zip(handed, asked, strict=True)):
        assert native.fit(*asked)
    elif not same:
        assert not native.fit(*asked)


def test_native_code_refuses_what_is_of_another_kind(native: Any) -> None:
    tensors = fused_inputs()
    assert native.fit(*tensors.values())
    for name in tensors:
        tensor = tensors[name]
        others = [tensor.double(), tensor.bfloat16(), tensor.int(), tensor[..., :4], tensor[:1], tensor.unsqueeze(0)]
        others += [torch.empty(0), torch.empty(0, 8), torch.tensor(1.0), tensor.view(-1), torch.empty(4, 8, 1)]
        with FakeTensorMode():
            others.append(torch.empty(tensor.shape))
        for other in others:
            if other.shape != tensor.shape or other.dtype != tensor.dtype or isinstance(other, FakeTensor):
                assert not native.fit(*(tensors | {name: other}).values()), (name, other.shape, other.dtype)


def test_native_code_takes_an_output_that_is_its_input_and_no_other_overlap(native: Any) -> None:
    room, begins = aligned(1024, torch.float16), {"x": 64, "residual": 192, "weight": 320, "out": 448, "sum": 576}

    def fits(begins: dict[str, int]) -> bool:
        views = {name: room[at:].as_strided((4, 8), (8, 1)) for name, at in begins.items()}
        return bool(native.fit(*(views | {"weight": views["weight"][0]}).values()))

    assert fits(begins)
    for moved, other, by in itertools.product(("out", "sum"), begins, (-8, 0, 8)):
        if moved != other:
            itself = by == 0 and (moved, other) in (("out", "x"), ("sum", "residual"))
            behind = by == 8 and other == "weight"
            assert fits(begins | {moved: begins[other] + by}) == (itself or behind), (moved, other, by)


def test_native_code_refuses_what_is_on_another_device(native: Any) -> None:
    tensors = fused_inputs().values()
    cpu, cuda = 1, 2  # as DLPack numbers them
    assert native.fit_on(cpu, 0, *tensors)
    assert not native.fit_on(cpu, 1, *tensors)
    assert not native.fit_on(cuda, 0, *tensors)
