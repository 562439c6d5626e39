"""A thin trainer for self-distillation on top of vmf_kernels; importing it imports nothing heavy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmf_pretrain.call import Finished, pretrain
    from vmf_pretrain.config.errors import PretrainError
    from vmf_pretrain.start_evaluation import Answer, evaluate

__all__ = ["Answer", "Finished", "PretrainError", "evaluate", "pretrain"]

_PLACES = {
    "Answer": "start_evaluation",
    "Finished": "call",
    "PretrainError": "config.errors",
    "evaluate": "start_evaluation",
    "pretrain": "call",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from vmf_kernels import __version__  # one distribution; here, because it imports torch

        return __version__
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
