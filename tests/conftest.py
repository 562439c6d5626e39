"""What every test starts from: one seed, and one thread, for two that wait for each other on a busy machine crawl.

Without a GPU, Triton's kernels run under its interpreter, which is chosen before any of them is imported; tests that need one
are left out, in one line of the report.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_ranks import preload_server

gc.disable()  # until all is collected: what is imported stays, and looking through it is a quarter of the time
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for
else:
    os.environ["TRITON_INTERPRET"] = "1"

LEFT_OUT = pytest.StashKey[int]()  # tests that need a GPU
QUICK_CASES = 3  # of a parametrised test
COUNT = "tests that need a GPU"  # the same, as a worker of pytest-xdist tells it


def why_no_gpu() -> str | None:
    """Why tests that need a GPU cannot run, or None."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    from vmf_kernels.backends.triton.launch import unsupported_device

    return unsupported_device(torch.device("cuda", torch.cuda.current_device()))


def pytest_report_header() -> str:
    from vmf_kernels.backends.native import module

    return f"native backend: {', '.join(module.instruction_sets()) if module.native() is not None else 'not built'}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The quick loop does not import files that have nothing of it: collection is a third of its time."""
    if config.getoption("markexpr") == "quick" and collection_path.suffix == ".py":
        return "mark.quick" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)  # what -m leaves out afterwards is counted neither way
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and why_no_gpu() is not None:
        leave_out(config, items, for_gpu)
        config.stash[LEFT_OUT] = len(for_gpu)
    if config.getoption("markexpr") == "quick":
        leave_out(config, items, [item for item in items if item.get_closest_marker("thorough")])
        leave_out(config, items, beyond_a_few(items))


def pytest_collection_finish() -> None:
    gc.freeze()  # no test's garbage is in what was imported
    gc.enable()


def leave_out(config: pytest.Config, items: list[pytest.Item], these: list[pytest.Item]) -> None:
    """Take some tests off the list, in place."""
    ids = {id(item) for item in these}
    items[:] = [item for item in items if id(item) not in ids]
    config.hook.pytest_deselected(items=these)


def beyond_a_few(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases that the quick loop leaves to the suite: of a parametrised test all but ``QUICK_CASES``, evenly spread."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        cases.setdefault((str(item.path), getattr(item, "originalname", item.name)), []).append(item)
    beyond = []
    for group in cases.values():
        kept = {round(i * (len(group) - 1) / (QUICK_CASES - 1)) for i in range(QUICK_CASES)}
        beyond += [item for i, item in enumerate(group) if len(group) > QUICK_CASES and i not in kept]
    return beyond


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[COUNT] = session.config.stash.get(LEFT_OUT, 0)


def pytest_configure() -> None:
    preload_server()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """One thread for each worker of ``pytest -n``: numpy's products run in Triton's interpreter."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``pytest -n``, tests of a file stay on one worker, for they share what they set up; files go in the usual order."""
    if config.getvalue("dist") != "load":
        return None  # asked for by name
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    config.option.loadscopereorder = False  # the files with the fewest tests would go last, which may take the longest
    return LoadFileScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects all tests: the last one's count is the count."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get(COUNT, 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} GPU tests did not run: {why_no_gpu()}")


@pytest.fixture(autouse=True, scope="session")
def _quicker_interpreter() -> None:
    if "TRITON_INTERPRET" in os.environ and "triton" in sys.modules:  # some test may launch a kernel
        from tests.backends.quicker_interpreter import install

        install()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Every tensor of ``torch.empty`` and its kin starts as NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all(), "torch no longer fills uninitialised memory"
    yield
    torch.use_deterministic_algorithms(False)
