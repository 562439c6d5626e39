"""Copies of tensors in host memory, so that they can be written while training changes the tensors."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vmf_pretrain.storage.checkpoint import Groups


class HostCopies:
    """Buffers in host memory, pinned for tensors of a CUDA device, that are used again by the next copy.

    They take as much memory as one copy and keep it: fresh memory is slower to copy to, and pinning it slower still.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._ready: torch.cuda.Event | None = None

    def copy(self, groups: Groups) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors; a tensor that occurs twice is copied once. The copy before this one is overwritten.

        Copies from a CUDA device are under way when this returns: whatever the current stream does next comes after them, and
        the host must call ``wait`` before it reads them.

        Args:
            groups: by group, then by name; of a DTensor the local share is copied.
        """
        copied: dict[tuple[object, ...], Tensor] = {}
        on_device = False
        result: dict[str, dict[str, Tensor]] = {}
        for group, named in groups.items():
            result[group] = {}
            for name, tensor in named.items():
                local = _local(tensor)
                place = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
                if place not in copied or local.numel() == 0:
                    on_device |= local.is_cuda
                    copied[place] = self._buffer(group, name, local).copy_(local, non_blocking=True)
                result[group][name] = _as(tensor, copied[place])
        self._ready = None
        if on_device:
            self._ready = torch.cuda.Event()
            self._ready.record()
        return result

    def wait(self) -> None:
        """Return when the last copy has arrived in host memory; any thread may call it."""
        if self._ready is not None:
            self._ready.synchronize()

    def _buffer(self, group: str, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get((group, name))
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[group, name] = buffer
        return buffer


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as(tensor: Tensor, buffer: Tensor) -> Tensor:
    """``buffer`` with the place among the ranks that ``tensor`` has."""
    if not isinstance(tensor, DTensor):
        return buffer
    # not DTensor.from_local: it would move the share back to the mesh's device
    return DTensor(buffer, tensor._spec, requires_grad=False)
