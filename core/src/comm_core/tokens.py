"""The number of real tokens of a padded batch on each rank: one function, for capture and for replay.

A batch of `num_tokens` real tokens is padded at its end to a bucket, the size for which a graph was captured. Ranks
that share its rows have a chunk of `bucket / world_size` rows each. The count that a captured kernel reads, and the
count that chose the kernel, must come from the same arithmetic: if one is the whole batch's and the other a rank's
share, kernels take padding for tokens.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeVar

from comm_core._control.guard import raise_if_capturing

if TYPE_CHECKING:
    import torch

__all__ = ["TokenCounts", "local_num_tokens_non_padded"]

Count = TypeVar("Count", int, "torch.Tensor")


def local_num_tokens_non_padded(num_tokens: Count, bucket: int, rank: int, world_size: int) -> Count:
    """Return this rank's share of the real tokens: `min(max(num_tokens - rank * c, 0), c)`, `c = bucket / world_size`.

    Local, without synchronisation. Over all ranks the shares add up to `num_tokens`.

    Args:
        num_tokens: real tokens in the batch, 0 to `bucket`: a number, or an integer tensor of any shape and device. A
            tensor's values aren't checked.
        bucket: rows of the padded batch, a multiple of `world_size`.
        rank: this rank within the group, 0 to `world_size - 1`.
        world_size: ranks in the group.

    Returns:
        A number; for a tensor, a tensor of the same shape, dtype and device. A captured graph may compute it.

    Raises:
        TypeError: `num_tokens` is neither an integer nor a tensor of integers.
        ValueError: the bucket doesn't divide among the ranks, or a number is out of its range.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} isn't one of {world_size}")
    chunk, left = divmod(bucket, world_size)
    if bucket < 0 or left:
        raise ValueError(f"a bucket of {bucket} rows doesn't divide among {world_size} ranks")
    given: Any = num_tokens
    result: Any
    if not hasattr(given, "clamp"):  # no tensor
        number = operator.index(given)
        if not 0 <= number <= bucket:
            raise ValueError(f"{number} tokens don't fit into a bucket of {bucket}")
        result = min(max(number - rank * chunk, 0), chunk)
    else:
        _check_integers(given)
        is_wide = given.dtype.is_signed and given.dtype.itemsize >= 4
        # A narrow integer may not hold the rows of the ranks before, and without a sign the difference wraps around.
        wide = given if is_wide else given.long()
        result = (wide - rank * chunk).clamp(0, chunk).to(given.dtype)
    return result  # type: ignore[no-any-return]


def _check_integers(num_tokens: Any) -> None:
    if num_tokens.is_floating_point() or num_tokens.is_complex():
        raise TypeError(f"expected a tensor of integers as num_tokens; got {num_tokens.dtype}")


class TokenCounts:
    """The token counts that the kernels of one captured graph read, at fixed addresses.

    Create it before the capture. Pass it to the handle's calls as `num_tokens`, and `total` and `local` to other
    kernels. Call `fill` before the capture and before each replay. If no rank has a share of its own,
    `TokenCounts(bucket, 0, 1, device)` takes any bucket.

    Attributes:
        bucket: rows of the padded batch.
        total: the batch's real tokens: int32, `[1]`, on the device.
        local: this rank's share of them: int32, `[1]`, on the device.
    """

    def __init__(self, bucket: int, rank: int, world_size: int, device: torch.device | str) -> None:
        import torch

        # Invalid arguments raise here rather than at the first batch.
        local_num_tokens_non_padded(0, bucket, rank, world_size)
        self.bucket = bucket
        self.total = torch.zeros(1, dtype=torch.int32, device=device)
        self.local = torch.zeros(1, dtype=torch.int32, device=device)
        self._rank = rank
        self._world_size = world_size

    def fill(self, num_tokens: int | torch.Tensor) -> None:
        """Set both counts for a batch. Local; queued on the current stream, without waiting for it.

        Args:
            num_tokens: real tokens in the batch, 0 to `bucket`: a number, or an integer tensor of one element.

        Raises:
            CaptureError: `num_tokens` is a number and a stream is capturing: every replay would use that number. A
                tensor on the device is read again at each replay.
            TypeError, ValueError: as in `local_num_tokens_non_padded`, or a tensor has several elements.
        """
        given: Any = num_tokens
        if not hasattr(given, "clamp"):
            raise_if_capturing(
                "a number of tokens, which every replay would use again, can't be filled in",
                "Call fill before the capture, or pass a tensor on the device",
            )
            number = operator.index(given)
            local = local_num_tokens_non_padded(number, self.bucket, self._rank, self._world_size)
            self.total.fill_(number)
            self.local.fill_(local)
        else:
            _check_integers(given)
            if given.numel() != 1:
                raise ValueError(f"expected one number of tokens; got a tensor {list(given.shape)}")
            self.total.copy_(given.reshape(1))
            self.local.copy_(local_num_tokens_non_padded(self.total, self.bucket, self._rank, self._world_size))
