"""When the Triton backend is chosen, and its message when it cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vmf_kernels.backends import choice
from vmf_kernels.backends.triton import launch, tiles
from vmf_kernels.backends.triton.tiles import Tile

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here: tests/gpu"),
]


def test_auto_never_takes_the_interpreter() -> None:
    x = torch.randn(2, 4)
    assert choice.choose_backend("auto", x, x) is not choice.BACKENDS["triton"]


@pytest.mark.parametrize(
    ("rows", "weight", "said"),
    [
        (
            torch.empty(2, 4, dtype=torch.float64),
            torch.empty(3, 4),
            "bfloat16, float16 or float32, but the features are",
        ),
        (torch.empty(2, 1025), torch.empty(3, 1025), "the embedding dim is 1025; it goes up to 1024"),
        (torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta"), "but the tensors are on meta"),
    ],
)
def test_what_it_cannot_run_is_said(rows: Tensor, weight: Tensor, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run here: .*{said}"):
        choice.choose_backend("triton", rows, weight)


def test_a_part_that_no_tile_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_TILES", {"student": Tile(16, 16)})
    with pytest.raises(RuntimeError, match="no tile of ieee products at embedding dim 4 fits compute"):
        choice.choose_backend("triton", torch.empty(2, 4), torch.empty(3, 4))


def test_without_interpreter_or_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="it runs on NVIDIA GPUs, but the tensors are on the CPU"):
        choice.choose_backend("triton", torch.empty(2, 4), torch.empty(3, 4))
