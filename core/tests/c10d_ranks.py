"""What runs in the ranks for test_c10d.py: programs for torch.distributed alone, on the backend "comm"."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Case = Callable[[], bool]


class Counting:
    """Counts the calls that the handle of a group serves; None: of the world."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        handle: Any = comm.get_backend(group)
        self._all_reduce = handle.all_reduce
        self.served = 0
        handle.all_reduce = self._counted

    def _counted(self, tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._all_reduce(tensor, out)
        self.served += 1
        return result


def world() -> Any:
    return dist.group.WORLD


def place() -> tuple[int, int, int]:
    """This rank, the number of ranks, and the sum of `mine` over all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return rank, size, size * (size + 1) // 2


def mine(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape or (8,), dist.get_rank() + 1).to(dtype)


def holds(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor == value).all())


def reduced(op: Any, value: float, dtype: torch.dtype = torch.float32) -> bool:
    x = mine(dtype=dtype)
    dist.all_reduce(x, op=op)
    return holds(x, value)


def asynchronous_sums() -> dict[str, Case]:
    _, _, total = place()

    def asynchronous() -> bool:
        x = mine()
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        work.wait()
        return holds(x, total) and work.is_completed()

    def meets_a_message() -> bool:
        """A sum that one rank begins before a message, and the other calls after it."""
        rank, x, y = dist.get_rank(), mine(), mine()
        if rank == 0:
            work = dist.all_reduce(x, async_op=True)
            dist.send(y, 1)
            assert work is not None
            work.wait()
        else:
            if rank == 1:
                dist.recv(y, 0)
            dist.all_reduce(x)
        return holds(x, total) and (rank > 1 or holds(y, 1))

    def several_in_flight() -> bool:
        xs = [mine() for _ in range(20)]
        works = [dist.all_reduce(x, async_op=True) for x in xs]
        x = mine()
        dist.all_reduce(x)
        for work in works:
            assert work is not None
            work.wait()
        return all(holds(each, total) for each in (*xs, x))

    def future() -> bool:
        work = dist.all_reduce(mine(), async_op=True)
        assert work is not None
        doubled = work.get_future().then(lambda done: done.value()[0] * 2).wait()
        return holds(doubled, 2 * total)

    return {
        "asynchronous": asynchronous,
        "a message between": meets_a_message,
        "several in flight": several_in_flight,
        "future": future,
    }


def reductions() -> dict[str, Case]:  # noqa: C901 - a function for each make of tensor
    _, size, total = place()
    ops = dist.ReduceOp

    def complex_numbers() -> bool:
        x = torch.complex(mine(), -mine())
        dist.all_reduce(x)
        return holds(x.real, total) and holds(x.imag, -total)

    def transposed() -> bool:
        x = mine(4, 6).t()
        dist.all_reduce(x)
        return holds(x, total)

    def empty() -> bool:
        x = torch.empty(0, 3)
        dist.all_reduce(x)
        return x.shape == (0, 3)

    def parameter() -> bool:
        x = torch.nn.Parameter(mine())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dist.all_reduce(x)
        return holds(x.detach(), total)

    def sparse() -> bool:
        x = torch.sparse_coo_tensor([[dist.get_rank()]], [1.0], (size,), check_invariants=True)
        dist.all_reduce(x)
        return holds(x.to_dense(), 1)

    def refuses(x: torch.Tensor, *, asynchronous: bool) -> bool:
        try:
            work = dist.all_reduce(x, async_op=asynchronous)
            if work is not None:
                work.wait()
        except ValueError as error:
            return "several elements at one address" in str(error)
        return False

    def overlapping() -> bool:
        xs = (mine(1).expand(4), torch.as_strided(mine(6), (3, 3), (1, 1)))
        return all(refuses(x, asynchronous=asynchronous) for x in xs for asynchronous in (False, True))

    def coalesced() -> bool:
        xs = [mine(), mine(3)]
        dist.all_reduce_coalesced(xs)
        return all(holds(x, total) for x in xs)

    def by_the_groups_method() -> bool:
        xs = [mine() for _ in range(3)]
        world().allreduce(xs[0]).wait()
        world().allreduce([xs[1]], ops.SUM).wait()
        options: Any = dist.AllreduceOptions()
        world().allreduce([xs[2]], options).wait()
        xs.append(mine())
        world().allreduce([xs[3]], op=ops.SUM).wait()
        return all(holds(x, total) for x in xs)

    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8)
    return {
        "sum": lambda: reduced(ops.SUM, total),
        **{f"sum of {str(dtype)[6:]}": lambda dtype=dtype: reduced(ops.SUM, total, dtype) for dtype in dtypes},  # type: ignore[misc]
        "average": lambda: reduced(ops.AVG, total / size),
        "maximum": lambda: reduced(ops.MAX, size),
        "minimum": lambda: reduced(ops.MIN, 1),
        "product": lambda: reduced(ops.PRODUCT, {2: 2, 3: 6}[size]),
        "bitwise or": lambda: reduced(ops.BOR, 3, torch.int32),
        "complex": complex_numbers,
        "transposed": transposed,
        "empty": empty,
        "parameter": parameter,
        "sparse": sparse,
        "overlapping": overlapping,
        "coalesced": coalesced,
        "by the group's method": by_the_groups_method,
    }


def other_collectives() -> dict[str, Case]:  # noqa: C901 - a function for each operation
    rank, size, total = place()
    after, before = (rank + 1) % size, (rank - 1) % size

    def broadcast() -> bool:
        x = mine()
        dist.broadcast(x, 0)
        return holds(x, 1)

    def reduce() -> bool:
        x = mine()
        dist.reduce(x, 0)
        return rank != 0 or holds(x, total)

    def all_gather() -> bool:
        parts = [torch.empty(8) for _ in range(size)]
        dist.all_gather(parts, mine())
        whole = torch.empty(8 * size)
        dist.all_gather_into_tensor(whole, mine())
        return all(holds(part, peer + 1) for peer, part in enumerate(parts)) and torch.equal(whole, torch.cat(parts))

    def gather_and_scatter() -> bool:
        x = torch.empty(2)
        dist.scatter(x, [torch.full((2,), float(peer)) for peer in range(size)] if rank == 0 else None, src=0)
        parts = [torch.empty(2) for _ in range(size)] if rank == 0 else None
        dist.gather(x, parts, dst=0)
        return holds(x, rank) and (parts is None or all(holds(part, peer) for peer, part in enumerate(parts)))

    def reduce_scatter() -> bool:
        x, y = torch.empty(8), torch.empty(8)
        dist.reduce_scatter(x, [mine() for _ in range(size)])
        dist.reduce_scatter_tensor(y, mine(8 * size))
        return holds(x, total) and holds(y, total)

    def all_to_all() -> bool:
        x = torch.empty(size)
        dist.all_to_all_single(x, mine(size))
        return torch.equal(x, torch.arange(1.0, size + 1))

    def barrier() -> bool:
        dist.barrier()
        work = dist.barrier(async_op=True)
        assert work is not None
        work.wait()
        return True

    def send_and_receive() -> bool:
        x = torch.empty(4)
        ops = [dist.P2POp(dist.isend, mine(4), after), dist.P2POp(dist.irecv, x, before)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        y = mine(4)
        if rank == 0:
            dist.send(y, after)
        elif rank == 1:
            dist.recv(y, before)
        return holds(x, before + 1) and (rank != 1 or holds(y, 1))

    def objects() -> bool:
        found: list[Any] = [None] * size
        dist.all_gather_object(found, {"rank": rank})
        shared = [rank]
        dist.broadcast_object_list(shared, 0)
        return [each["rank"] for each in found] == list(range(size)) and shared == [0]

    return {
        "broadcast": broadcast,
        "reduce": reduce,
        "all_gather": all_gather,
        "gather and scatter": gather_and_scatter,
        "reduce_scatter": reduce_scatter,
        "all_to_all_single": all_to_all,
        "barrier": barrier,
        "send and recv": send_and_receive,
        "objects": objects,
    }


def functional_collectives() -> dict[str, Case]:
    _, size, total = place()

    def all_reduce() -> bool:
        x = mine()
        y = functional.all_reduce(x, "sum", world())
        return holds(y + 0, total) and holds(x, dist.get_rank() + 1)

    def compiled(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        torch._dynamo.reset()
        return holds(torch.compile(function, fullgraph=True, backend="aot_eager")(mine()), 2 * total + 1)

    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    return {
        "functional.all_reduce": all_reduce,
        "functional average": lambda: holds(functional.all_reduce(mine(), "avg", world()) + 0, total / size),
        "functional.all_reduce_coalesced": lambda: all(
            holds(y + 0, total) for y in functional.all_reduce_coalesced([mine(), mine(3)], "sum", world())
        ),
        "functional.all_gather_tensor": lambda: (
            float((functional.all_gather_tensor(mine(), 0, world()) + 0).sum()) == 8 * total
        ),
        "compiled functional": lambda: compiled(lambda x: functional.all_reduce(x * 2, "sum", world()) + 1),
        "compiled all_reduce": lambda: compiled(in_place),
    }


def clients() -> dict[str, Case]:
    rank, size, total = place()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))

    def device_mesh() -> bool:
        x = mine()
        dist.all_reduce(x, group=mesh.get_group())
        return holds(x, total)

    def dtensor() -> bool:
        whole = DTensor.from_local(mine(4, 4), mesh, [Partial()]).redistribute(placements=[Replicate()])
        torch.manual_seed(0)
        a, b = torch.randn(4, 6 * size), torch.randn(6 * size, 4)
        product: Any = distribute_tensor(a, mesh, [Shard(1)]) @ distribute_tensor(b, mesh, [Shard(0)])
        return holds(whole.to_local(), total) and torch.allclose(product.full_tensor(), a @ b, atol=1e-4)

    def tensor_parallel() -> bool:
        torch.manual_seed(0)
        linear = torch.nn.Linear
        module = torch.nn.Sequential(linear(8, 6 * size, bias=False), linear(6 * size, 8, bias=False))
        x = torch.randn(2, 8)
        expected = module(x)
        parallelize_module(module, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        y = module(x)
        y.sum().backward()
        return torch.allclose(y, expected, atol=1e-5)

    def data_parallel(*, hook: bool) -> bool:
        torch.manual_seed(rank)
        module = torch.nn.Linear(8, 8)
        wrapped = DistributedDataParallel(module)
        if hook:
            wrapped.register_comm_hook(world(), allreduce_hook)
        for _ in range(3):
            wrapped.zero_grad()
            wrapped(torch.full((2, 8), float(rank + 1))).sum().backward()
        gradient = module.weight.grad
        assert gradient is not None
        return torch.allclose(gradient, torch.full((8, 8), 2 * total / size))

    def fully_sharded() -> bool:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))
        expected = module(torch.ones(2, 12)).detach()
        for layer in module:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        y = module(torch.ones(2, 12))
        y.sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        return torch.allclose(y, expected, atol=1e-6)

    return {
        "init_device_mesh": device_mesh,
        "DTensor": dtensor,
        "parallelize_module": tensor_parallel,
        "DistributedDataParallel": lambda: data_parallel(hook=False),
        "DistributedDataParallel, a hook": lambda: data_parallel(hook=True),
        "fully_shard": fully_sharded,
    }


def served_by_case() -> dict[str, int | str]:
    """Run every case; return the calls that the handle served, or what was wrong."""
    counting = Counting()
    found: dict[str, int | str] = {}
    for cases in (reductions(), asynchronous_sums(), other_collectives(), functional_collectives(), clients()):
        for name, case in cases.items():
            before = counting.served
            found[name] = counting.served - before if case() else "wrong"
    return found
