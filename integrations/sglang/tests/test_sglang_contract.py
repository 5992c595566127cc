"""The recorded names of SGLang: every supported release has them, and this package and the stand-in fit them."""

from __future__ import annotations

import ast
import itertools

import pytest
import sglang_parts
import torch
from comm_core import TokenCounts, local_num_tokens_non_padded
from comm_sglang import communicator, door, groups
from sglang_contract import CONTRACT, CUSTOM, GROUP_NAMES
from sglang_ranks import STAND_IN

# SGLang asks for these only on AMD's GPUs, or whether the object has them.
FOR_AMD = {
    *("all_gather_reg", "all_gather_unreg", "custom_fused_ar_rms", "custom_fused_ar_rms_per_group_quant"),
    *("fused_allreduce_rmsnorm", "fused_ar_rms", "reduce_scatter", "should_custom_ag"),
}
# Groups in which SGLang doesn't all-reduce: all ranks, pipelines, and a second stream's gathers.
NOT_REDUCED = {"world", "pp", "self_pp", "attn_cp_overlap"}


def test_every_supported_release_is_recorded_for_every_name() -> None:
    patches = range(door.OLDEST[2], door.NEWEST[2] + 1)
    assert CONTRACT.releases() == {f"0.5.{patch}" for patch in patches}
    for name, forms in CONTRACT.load().items():
        listed = [*itertools.chain.from_iterable(names.split() for names in forms.values())]
        assert sorted(listed) == sorted(CONTRACT.releases()), name
    recorded = {f"{path}: {name}" for path, names in CONTRACT.names.items() for name in names}
    assert {*CONTRACT.load()} == recorded | {CUSTOM, GROUP_NAMES}


def test_a_changed_signature_is_found() -> None:
    name = "sglang/srt/distributed/parallel_state.py: GroupCoordinator.destroy"
    assert CONTRACT.differences({name: "(self)"}) == []
    (difference,) = CONTRACT.differences({name: "(self, orderly)"})
    assert "GroupCoordinator.destroy: (self, orderly)" in difference


def test_the_stand_in_has_the_functions_that_are_hooked() -> None:
    texts = {path: (STAND_IN / path).read_text() for path in CONTRACT.names if (STAND_IN / path).exists()}
    assert len(texts) == 8
    found = CONTRACT.extract(lambda path: texts.get(path, ""), [])
    compared = 0
    for name in ("all_reduce", "destroy", "_all_reduce_out_place", "dispatch_custom_allreduce", "apply_hooks"):
        for key, form in found.items():
            if key.endswith((f".{name}", f": {name}")):
                names = [argument.arg for argument in arguments(form)]
                assert names in [[one.arg for one in arguments(recorded)] for recorded in CONTRACT.load()[key]], key
                compared += 1
    assert compared == 5


def arguments(form: str) -> list[ast.arg]:
    function = ast.parse(f"def function{form.partition(' -> ')[0]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args.args


def test_the_object_in_ca_comm_has_what_sglang_reads() -> None:
    handle, coordinator = FakeHandle(), FakeCoordinator()
    ours = communicator.CommAllReduce(coordinator, handle)  # type: ignore[arg-type]
    used = {name for form in CONTRACT.forms_of(CUSTOM) for name in form.split(", ")}
    assert len(used) > len(FOR_AMD)
    assert {name for name in used - FOR_AMD if not hasattr(ours, name)} == set()
    assert {name for name in FOR_AMD if hasattr(ours, name)} == set()
    # SGLang compares the size of a gathered batch with it.
    assert ours.max_size == 16 * 1024**2


class FakeHandle:
    device = torch.device("cpu")


class FakeCoordinator:
    cpu_group = device_group = device = None
    rank_in_group, world_size = 0, 2


def test_every_group_of_sglang_is_served_or_known_not_to_reduce() -> None:
    names = {name for form in CONTRACT.forms_of(GROUP_NAMES) for name in form.split(", ")}
    assert names == groups.SERVED | NOT_REDUCED


@pytest.mark.parametrize(
    "release", sglang_parts.releases() or [pytest.param("", marks=pytest.mark.skip(reason="no parts of SGLang here"))]
)
def test_token_counts_are_sglangs(release: str) -> None:
    """One function feeds captures and replays; SGLang's gives the same on a grid of inputs."""
    source = (sglang_parts.FOLDER / release / "sglang/srt/model_executor/forward_batch_info.py").read_text()
    wanted = ("compute_local_num_token_non_padded", "_attn_tp_local_shard_bounds")
    functions = [node for node in ast.parse(source).body if getattr(node, "name", "") in wanted]
    names: dict[str, object] = {"torch": torch, "_attn_tp_sequence_sharded_predicate": None}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *functions], []), "forward_batch_info.py", "exec"), names)  # noqa: S102 - SGLang's
    (function,) = (node for node in functions if getattr(node, "name", "") == wanted[0])
    options = {"sharded": True} if "sharded" in ast.unparse(function) else {}  # from 0.5.20 on
    compared = 0
    for world_size in (1, 2, 4, 8):
        for bucket in (8, 16, 64):
            for rank, tokens in itertools.product(range(world_size), range(bucket + 1)):
                parallel = type("Parallel", (), {"attn_tp_size": world_size, "attn_tp_rank": rank})
                names |= {
                    "get_parallel": lambda parallel=parallel: parallel,
                    "get_attention_tp_rank": lambda rank=rank: rank,
                    "get_attention_tp_size": lambda size=world_size: size,
                }
                total = torch.tensor([tokens], dtype=torch.int32)
                theirs = names[wanted[0]](total, bucket, **options)  # type: ignore[operator]
                counts = TokenCounts(bucket, rank, world_size, "cpu")
                counts.fill(tokens)  # at capture
                assert counts.local.tolist() == theirs.tolist()
                counts.fill(total)  # at replay
                assert counts.local.tolist() == theirs.tolist()
                assert local_num_tokens_non_padded(tokens, bucket, rank, world_size) == theirs.item()
                compared += 1
    assert compared > 500
