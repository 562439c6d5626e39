"""What the doctor says of machines, packages, kernels, folders and first steps: a table of each, with what must be said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.measure import return_freed_memory
from tests.pretrain.tiny import changed, digits_config
from vmf_bench.inputs import HeadInputs
from vmf_bench.peers.stored import published
from vmf_bench.variants import OURS, Variant
from vmf_kernels.backends.choice import BACKENDS
from vmf_pretrain.doctor import dry_run, kernels
from vmf_pretrain.doctor.dry_run import DryRun, Trial, rehearsed
from vmf_pretrain.doctor.finding import Finding, fine, note, problem, verdict
from vmf_pretrain.doctor.host import Host, judge_host, read_host
from vmf_pretrain.doctor.judge_dry_run import judge_dry_run, judge_settings, room_needed
from vmf_pretrain.doctor.kernels import check_kernels, judge_kernels
from vmf_pretrain.doctor.memory import PeakMemory, Sized, at_hand, fitting
from vmf_pretrain.doctor.packages import judge_versions, read_versions
from vmf_pretrain.doctor.place import judge_room, judge_run
from vmf_pretrain.storage.manifest import FORMAT, hash_of

pytestmark = pytest.mark.quick

GIB = 1 << 30
FACTS: dict[str, Any] = {"cpu": "a processor", "instruction_sets": ["avx2"], "torch": "2.13.0", "cuda": None}
LAPTOP = Host(
    FACTS, cores=4, quota=None, memory=8 * GIB, gpus=(), driver=False, shared=4 * GIB, wanted_threads=None, threads=4
)
GPU = (("a GPU", 24 * GIB),)
CUDA: dict[str, Any] = {**FACTS, "cuda": "13.0"}


def said(findings: list[Finding], severity: str, subject: str) -> str:
    """Words and advice of the findings of a severity about a subject."""
    return " ".join(
        f"{one.words} {one.advice}" for one in findings if (one.severity, one.subject) == (severity, subject)
    )


HOSTS = [
    (LAPTOP, "fine", "GPU", "none here"),
    (LAPTOP, "fine", "processor", "a processor, cores: 4, 8.0 GiB of memory (avx2)"),
    (replace(LAPTOP, driver=True), "note", "GPU", "torch 2.13.0 is built without CUDA"),
    (replace(LAPTOP, driver=True, facts=CUDA), "note", "GPU", "for CUDA 13.0 finds no GPU"),
    (replace(LAPTOP, driver=True, facts=CUDA, gpus=GPU), "fine", "GPU", "1 that torch can use: a GPU (24.0 GiB)"),
    (replace(LAPTOP, quota=1.5), "note", "processor", "set OMP_NUM_THREADS to 2"),
    (replace(LAPTOP, load=12.3), "note", "processor", "12 want one of 4 cores"),
    (replace(LAPTOP, wanted_threads="1"), "note", "threads", "uses 1 of 4 cores"),
    (replace(LAPTOP, wanted_threads="1", gpus=GPU), "fine", "threads", "is 1"),
    (replace(LAPTOP, wanted_threads="64"), "note", "threads", "set it to 4"),
    (replace(LAPTOP, wanted_threads="all"), "note", "threads", 'is "all", which is no number'),
    (replace(LAPTOP, shared=64 << 20), "note", "shared memory", "64 MiB are free"),
]


@pytest.mark.parametrize(("host", "severity", "subject", "words"), HOSTS)
def test_machine_is_judged(host: Host, severity: str, subject: str, words: str) -> None:
    assert words in said(judge_host(host), severity, subject)


def test_only_what_is_odd_about_a_machine_is_a_note() -> None:
    assert {one.severity for one in judge_host(LAPTOP)} == {"fine"}
    assert all(one.advice for host, *_ in HOSTS for one in judge_host(host) if one.severity == "note")


def test_this_machine_is_read() -> None:
    host = read_host()
    assert host.cores >= 1
    assert host.threads >= 1
    assert GIB // 4 < host.memory < 1 << 50, "not bytes"
    json.dumps(host.facts)


def test_missing_packages_are_named() -> None:
    versions = read_versions()
    assert versions["torch"] == torch.__version__
    assert {one.severity for one in judge_versions(versions)} == {"fine"}
    found = judge_versions({**versions, "timm": None, "tensorboard": None})
    assert "timm cannot be found" in said(found, "problem", "packages")
    assert "pip install tensorboard" in said(found, "note", "tensorboard")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return check_kernels(torch.device("cpu"))


def test_every_backend_is_checked_here(records: list[dict[str, Any]]) -> None:
    found = {one.subject.removeprefix("backend "): one for one in judge_kernels(records)}
    assert found.keys() >= set(BACKENDS)
    assert {one.severity for one in found.values()} == {"fine"}, "one is wrong here, or the compiled module is absent"
    assert "in float32 and bfloat16" in found["native"].words
    assert "needs an NVIDIA GPU" in found["cuda"].words


def test_absent_or_failing_kernels_are_said(records: list[dict[str, Any]]) -> None:
    absent = {"status": "not available", "reason": "its module was not built", "errors": {}, "budget": {}}
    without = [record | (absent if record["name"] == "native" else {}) for record in records]
    assert "not built; plain torch computes instead" in said(judge_kernels(without), "note", "backend native")
    on_gpu = [record | {"device": "cuda"} for record in records if record["name"] in ("triton", "cuda", "native")]
    on_gpu = [record | (absent if record["name"] == "native" else {}) for record in on_gpu]
    subjects = [(one.severity, one.subject) for one in judge_kernels([*records, *on_gpu])]
    assert subjects.count(("fine", "backend native")) == 1, "what is for processors was judged on the GPU"
    assert ("note", "backend triton") in subjects


def test_a_loss_that_is_wrong_by_a_percent_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: HeadInputs) -> torch.Tensor:
        return 1.01 * published(inputs)

    monkeypatch.setattr(kernels, "OURS", {"native": Variant("wrong", lambda inputs, compile_: wrong)})
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    assert "is off by" in said(judge_kernels(check_kernels(torch.device("cpu"))), "problem", "backend native")
    assert OURS["native"].title != "wrong"


STEPS = DryRun(
    steps=18,
    images=64,
    fewer=32,
    part=64,
    images_per_second=10.0,
    data_wait=0.05,
    memory=1 * GIB,
    fits=100,
    at_hand=8 * GIB,
    checkpoint=100,
    weights=10,
    not_finite=0,
    run_images=36_000,
)
FIRST_STEPS = [
    (STEPS, "fine", "time", "about 1.0 hours"),
    (STEPS, "fine", "speed", "18 steps of 64 images: 10 images/s"),
    (replace(STEPS, images=16), "fine", "speed", "16 of the run's 64 images"),
    (STEPS, "fine", "memory", "about 100 fit at once, by steps of 32 and 64"),
    (replace(STEPS, fits=None), "fine", "memory", "more images take hardly more"),
    (replace(STEPS, fits=20), "problem", "memory", "--train.accumulate 4,"),
    (replace(STEPS, fits=0), "problem", "memory", "smaller network"),
    (replace(STEPS, data_wait=0.3), "note", "data", "raise data.workers"),
    (replace(STEPS, data_wait=0.6), "note", "data", "copy them to a local disk"),
    (replace(STEPS, run_images=10**8), "note", "time", "lower train.epochs"),
    (replace(STEPS, not_finite=1), "note", "loss", "not finite in 1 step "),
    (replace(STEPS, not_finite=3), "problem", "loss", "not finite in 3 steps"),
]


@pytest.mark.parametrize(("steps", "severity", "subject", "words"), FIRST_STEPS)
def test_first_steps_are_judged(steps: DryRun, severity: str, subject: str, words: str) -> None:
    config = digits_config(data={"batch_size": 64})
    assert words in said(judge_dry_run(steps, config), severity, subject)
    assert {one.severity for one in judge_dry_run(STEPS, config)} == {"fine"}


def test_settings_and_room_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = digits_config(data={"workers": 9}, train={"keep_checkpoints": 2})
    assert "9, but there are 4 cores set data.workers to 3" in said(judge_settings(config, 4), "note", "workers")
    needed = room_needed(STEPS, config)
    assert needed == 3 * 100 + 2 * 10
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    assert judge_room(tmp_path / "not" / "yet", needed).severity == "problem"
    assert judge_room(tmp_path / "not" / "yet", needed - 1).severity == "fine"


def test_trial_leaves_out_what_would_stay_or_take_minutes() -> None:
    config = changed(
        digits_config(),
        train={"compile": True, "accumulate": 4},
        start_from={"weights": "timm:vit_small_patch16_224.dino"},
    )
    quick = rehearsed(config)
    assert (quick.train.compile, quick.train.accumulate, quick.start_from.weights) == (False, 1, None)
    assert rehearsed(changed(config, start_from={"weights": "a.pth"})).start_from.weights == "a.pth"


GROWTH = [
    ("all", 12, 40.0, 1 << 40, [2, 4, 8, 12]),
    ("short time", 64, 40.0, 1 << 40, [2, 4, 8, 16]),  # 10 steps of 32 images would last 42 seconds
    ("little memory", 64, 40.0, 1, [2, 4]),
    ("one image", 1, 40.0, 1 << 40, [1]),
]


@pytest.mark.parametrize(("name", "most", "seconds", "memory", "sizes"), GROWTH, ids=[row[0] for row in GROWTH])
def test_steps_grow_as_far_as_time_and_memory_allow(
    name: str, most: int, seconds: float, memory: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "at_hand", lambda device: memory)
    passed = [0.0]

    def step(number: int, images: int) -> list[object]:
        passed[0] += 1.0 + 0.1 * images
        return []

    loop: Any = SimpleNamespace(device=torch.device("cpu"), step=step)
    batches: Any = lambda images: SimpleNamespace(batch=lambda step: images)  # noqa: E731
    found = Trial(loop, lambda: passed[0]).growing(batches, most, seconds)
    assert [size.images for size in found] == sizes
    assert [size.seconds for size in found] == pytest.approx([1.0 + 0.1 * images for images in sizes])


def test_images_that_fit_lie_on_the_line_of_two_sizes() -> None:
    two, four = Sized(2, 0.1, 300), Sized(4, 0.1, 500)  # 100 bytes, and 100 an image
    assert fitting(two, four, memory=1000) == 8  # of 900 usable bytes
    assert fitting(two, four, memory=200) == 0
    assert fitting(two, Sized(4, 0.1, 300), memory=1000) is None


def test_peak_of_memory_is_that_since_the_reset() -> None:
    peak, device = PeakMemory(torch.device("cpu")), torch.device("cpu")
    large = torch.ones(1 << 25)  # 128 MiB
    del large
    return_freed_memory()
    peak.reset()
    before = peak.read()
    kept = torch.ones(1 << 24)
    assert 0.8 * kept.nbytes < peak.read() - before < 1.5 * kept.nbytes
    assert peak.read() < at_hand(device) < 1 << 50


def written(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A run whose checkpoint's description is changed."""
    folder = run / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    described = {
        "step": 7,
        "torch_version": "2",
        "files": {},
        "state": {},
        "format": FORMAT,
        "layout": "whole",
        "groups": [],
    }
    described = change(described)
    (folder / "state.json").write_text(json.dumps({**described, "sha256": hash_of(described)}))
    return run


RUNS = [
    ("whole", lambda values: values, "note", "holds a run at step 7"),
    ("newer", lambda values: values | {"format": FORMAT + 1}, "problem", "a newer vmf_kernels wrote"),
    ("damaged", lambda values: {"step": 7, "format": FORMAT}, "note", "is damaged"),
]


@pytest.mark.parametrize(("name", "change", "severity", "words"), RUNS, ids=[row[0] for row in RUNS])
def test_run_that_is_there_already_is_judged(
    name: str, change: Callable[[dict[str, Any]], dict[str, Any]], severity: str, words: str, tmp_path: Path
) -> None:
    found = judge_run(written(tmp_path / name, change))
    assert (found.severity, words in found.words) == (severity, True), found
    assert judge_run(tmp_path).severity == "problem", "a run without a checkpoint"


def test_verdict_names_what_is_in_the_way() -> None:
    assert verdict([fine("a", "b")]) == "Nothing is in the way of a run."
    assert "One note" in verdict([note("a", "b", "c")])
    assert verdict([problem("disk", "b"), problem("disk", "c"), note("a", "b", "c")]).startswith(
        "A run would fail: disk. "
    )
