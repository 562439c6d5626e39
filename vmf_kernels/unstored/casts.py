"""Changes of dtype and device for objects that stand for a tensor which is not stored."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor


class Casts:
    """``to`` and its short forms, for a class with ``dtype``, ``device`` and the hook ``_moved``."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the stored values would have."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device that the stored values would be on."""
        raise NotImplementedError

    def _moved(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same rows on a device, their values in a floating dtype."""
        raise NotImplementedError

    def to(self, *args: Any, **options: Any) -> Self:
        """As ``Tensor.to``; with another dtype, the values are those of a head whose features have that dtype."""
        probe = self._probe().to(*args, **options)  # torch itself interprets the many forms of arguments
        return self._moved(probe.device, probe.dtype)

    def type(self, dtype: Any = None) -> Any:
        """As ``Tensor.type``."""
        if dtype is None:
            return self._probe().type()
        probe = self._probe().type(dtype)
        return self._moved(probe.device, probe.dtype)

    def cpu(self) -> Self:
        """On the CPU."""
        return self._moved(torch.device("cpu"), self.dtype)

    def cuda(self, device: Any = None) -> Self:
        """On a GPU."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def float(self) -> Self:
        """Values in fp32."""
        return self._moved(self.device, torch.float32)

    def double(self) -> Self:
        """Values in fp64."""
        return self._moved(self.device, torch.float64)

    def half(self) -> Self:
        """Values in fp16."""
        return self._moved(self.device, torch.float16)

    def bfloat16(self) -> Self:
        """Values in bf16."""
        return self._moved(self.device, torch.bfloat16)

    def type_as(self, other: Any) -> Self:
        """Values in the dtype, and on the device, of another tensor."""
        return self._moved(other.device, other.dtype)

    def _probe(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)
