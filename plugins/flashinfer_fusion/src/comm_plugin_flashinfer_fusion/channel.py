"""FlashInfer's `CommBackend`, by which its ranks exchange handles, over the group's control channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import comm_core as comm

__all__ = ["Channel", "decode", "encode"]


class Channel:
    """The methods that FlashInfer calls while it creates a workspace. Ranks and roots are group ranks.

    Collective; only called inside `pre_capture_init`. If a rank fails, the other ranks' calls raise.
    """

    def __init__(self, context: comm.GroupContext) -> None:
        self._context = context

    def Get_rank(self) -> int:  # noqa: N802 - FlashInfer's names
        """Return this group rank."""
        return self._context.rank

    def Get_size(self) -> int:  # noqa: N802
        """Return the number of ranks in the group."""
        return self._context.world_size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """Return every rank's `data`, by group rank."""
        return tuple(decode(value) for value in self._context.control.all_gather(encode(data)))

    def bcast(self, data: Any, root: int) -> Any:
        """Return the `data` of the group rank `root`."""
        mine = encode(data) if root == self._context.rank else None
        return decode(self._context.control.all_gather(mine)[root])

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._context.control.barrier()

    def Split(self, color: int, key: int) -> Channel:  # noqa: N802
        """Refuse to split: a workspace belongs to the whole group.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"a workspace belongs to its whole group, which can't be split (color {color}, key {key})")


def encode(value: Any) -> Any:
    """Return a value as JSON, for `decode`.

    Raises:
        TypeError: it contains something other than numbers, strings, bytes, None, lists and tuples.
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
    """Return the value that `encode` got."""
    match value:
        case {"bytes": text}:
            return bytes.fromhex(text)
        case {"list": items}:
            return [decode(item) for item in items]
        case {"tuple": items}:
            return tuple(decode(item) for item in items)
    return value
