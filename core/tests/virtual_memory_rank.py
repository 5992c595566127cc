"""One of two ranks that map each other's memory: virtual_memory_rank.py RANK FOLDER, for test_virtual_memory.py.

The folder has the driver's stand-in and the header's binding.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch.distributed as dist
import tvm_ffi
from comm_core._control.mailbox import Mailbox

NBYTES = (1 << 16) + 7


def main(rank: int, folder: Path) -> None:
    create, export_file, import_file, map_, close = tvm_ffi.load_module(str(folder / "binding.so")).virtual_memory(0)
    number = create(NBYTES)
    addresses = {rank: map_(number, NBYTES)}
    text = f"what rank {rank} has".encode()
    ctypes.memmove(addresses[rank], text, len(text))

    def take(source: int, _: str, file: int) -> None:
        addresses[source] = map_(import_file(file), NBYTES)
        os.close(file)

    store = dist.FileStore(str(folder / "store"), 2)
    with contextlib.closing(Mailbox()) as box:
        store.set(str(rank), box.path)
        peer = store.get(str(1 - rank)).decode()
        box.exchange_files(rank, [peer], {"buffer": lambda: export_file(number)}, [(1 - rank, "buffer")], take, 60.0)
        # A box stays until the peer has sent everything to it.
        store.set(f"swapped by {rank}", "")
        store.wait([f"swapped by {1 - rank}"])
    seen = [ctypes.string_at(addresses[source], len(text)) for source in range(2)]
    assert seen == [b"what rank 0 has", b"what rank 1 has"], seen
    close()
    sys.stdout.write("right\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
