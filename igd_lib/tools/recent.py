"""Tensors that were read or made a moment ago, in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor


class Recent:
    """The tensors last used, by key, up to `limit` bytes in all; a copy for another process is empty."""

    def __init__(self, limit: int):
        self.limit, self._held = limit, OrderedDict[Hashable, Tensor]()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.limit,)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of that key, if it is held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Hold a tensor, copied to host memory from a device, and let go of those not used for longest."""
        self._held[key] = tensor.cpu()
        self._held.move_to_end(key)
        while self.bytes > self.limit:
            self._held.popitem(last=False)
