"""How FlashInfer's ranks find each other: its `CommBackend`, over the group's control channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["Channel", "decode", "encode"]


class Channel:
    """The methods that FlashInfer calls while it makes a workspace; ranks and roots are the group's.

    Collective, inside `pre_capture_init` alone. A rank that fails makes the others' calls raise.
    """

    def __init__(self, context: comm.GroupContext) -> None:
        self._context = context

    def Get_rank(self) -> int:  # noqa: N802 - the library's names
        """This rank's place in the group."""
        return self._context.rank

    def Get_size(self) -> int:  # noqa: N802
        """Ranks in the group."""
        return self._context.world_size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Every rank's `data`, by group rank."""
        return tuple(decode(value) for value in self._context.control.all_gather(encode(data)))

    def bcast(self, data: Any, root: int) -> Any:
        """What the group rank `root` has."""
        mine = encode(data) if root == self._context.rank else None
        return decode(self._context.control.all_gather(mine)[root])

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._context.control.barrier()

    def Split(self, color: int, key: int) -> Channel:  # noqa: N802
        """Refused: a workspace belongs to the whole group.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"a workspace is its whole group's, which can't be split (color {color}, key {key})")


def encode(value: Any) -> Any:
    """A value as JSON from which `decode` makes it again.

    Raises:
        TypeError: it has parts other than numbers, texts, bytes, None, lists and tuples.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes() | bytearray() | memoryview():
            return {"bytes": bytes(value).hex()}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [encode(item) for item in value]}
    raise TypeError(f"FlashInfer exchanges a {type(value).__name__}, which can't be sent between its ranks")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    match value:
        case {"bytes": text}:
            return bytes.fromhex(text)
        case {"list": items}:
            return [decode(item) for item in items]
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
    return value
