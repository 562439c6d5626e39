"""Cases of every public function, chosen and made smaller by hypothesis; more of them where ``VMF_FUZZ_CASES`` says how many.

``VMF_FUZZ_CASES=2000 pytest tests/fuzz`` runs so many of each function, others every time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pairwise_distance

import vmf_kernels
from tests.fuzz.__main__ import main
from tests.fuzz.cases import Case, affordable, drawn, simplest
from tests.fuzz.inputs import laid_out
from tests.fuzz.runner import cases_of, faults_of, kind_of, run
from tests.fuzz.statements.vmf import log_normalizer, mean_resultant_length
from tests.fuzz.subjects.subject import Subject
from tests.fuzz.subjects.table import SUBJECTS

CASES = 12  # of each function, every time the same
CHEAP = 1 << 14  # rows x prototypes x dim
WITHIN = 80  # cases in which a planted fault has to be found
MORE = os.environ.get("VMF_FUZZ_CASES")
# Triton's interpreter takes seconds where the others take milliseconds; of 16-bit products p and q are rounded: test_triton.py
INTERPRETED: dict[str, tuple[object, ...]] = {
    "images": (1, 2),
    "teacher_views": (1, 2),
    "student_views": (1, 2),
    "prototypes": (2, 17, 33),
    "dim": (2, 16, 17),
    "teacher_dim": (0,),
    "dtype": ("fp32",),
    "stored": ("same",),
    "again": ("no",),
}


def cases(name: str, subject: Subject) -> st.SearchStrategy[Case]:
    """Cases of a function, each field simple more often than not."""
    fields = {
        field: st.sampled_from(
            [*([simplest(field)] * (len(values) - 1)), *values] if simplest(field) in values else values
        )
        for field, values in subject.choices.items()
    }
    seeds = st.integers(0, 1 << 16)
    built = st.builds(Case, st.just(name), st.sampled_from(subject.backends), seeds, **fields)
    return built.map(lambda case: case if MORE else affordable(case, CHEAP)).map(affordable)


@pytest.mark.parametrize("name", SUBJECTS)
def test_results_are_those_of_the_formulas(name: str) -> None:
    @settings(
        max_examples=int(MORE or CASES),
        derandomize=MORE is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(name, SUBJECTS[name]))
    def judge(case: Case) -> None:
        found = faults_of(case)
        assert not found, f"python -m tests.fuzz --case '{case}'\n" + "\n".join(found)

    judge()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter
@pytest.mark.parametrize("seed", range(2))
def test_interpreted_kernels_give_the_formulas_results(seed: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here: tests/gpu")
    choices = dict(SUBJECTS["prototype_cross_entropy"].choices) | INTERPRETED
    case = drawn("prototype_cross_entropy", "triton", choices, random.Random(seed))
    found = faults_of(case)
    assert not found, f"python -m tests.fuzz --case '{case}'\n" + "\n".join(found)


# what is under test by another's name, or has no numbers of its own
ELSEWHERE = {
    "AssignmentStatistics": "prototype_cross_entropy",
    "CenteringRule": "centers",
    "CrossEntropy": "prototype_cross_entropy",
    "DINOHead": "heads",
    "DINOvMFHead": "heads",
    "DistributedKoLeoLoss": "KoLeoLoss",
    "LogitCenter": "centers",
    "ProbabilityCenter": "centers",
    "PrototypeLayer": "heads",
    "UniquePrototypes": "unique_prototypes",
    "fuse_head": "heads",
    "linear_prototypes": "Prototypes",
    "normalized_prototypes": "Prototypes",
    "vmf_mean_resultant_length": "log_vmf_constant",
    "vmf_prototypes": "Prototypes",
    "weight_norm_prototypes": "Prototypes",
    "weight_norm_vmf_prototypes": "Prototypes",
}


@pytest.mark.quick
def test_every_public_name_is_under_test() -> None:
    left_out = [name for name in vmf_kernels.__all__ if ELSEWHERE.get(name, name) not in SUBJECTS]
    assert not left_out, f"{left_out} have no cases: add a subject"


def scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda *args, **named: function(*args, **named) * factor


@pytest.fixture(
    params=[
        ("prototype_cross_entropy", "vmf_kernels.backends.streaming.LOG2_E", 1.4426950408889634 * (1 + 1e-4)),
        ("prototype_cross_entropy", "vmf_kernels.prototypes.vmf_mean_resultant_length", lambda kappa, dim: kappa / dim),
        ("logit_cross_entropy", "vmf_kernels.backends.stored.streaming.LN_2", 0.6931471805599453 * (1 + 1e-4)),
        ("log_vmf_constant", "vmf_kernels.bessel.DEBYE_TERMS", {torch.float32: 1, torch.float64: 1}),
        ("centers", "vmf_kernels.centering.running_mean.RunningMean._step", lambda self, center, batch: (center + batch) / 2),
        ("KoLeoLoss", "vmf_kernels.losses.koleo.functional.pairwise_distance", scaled(pairwise_distance, 1.001)),
        ("DINOLoss", "vmf_kernels.losses.dino.multi_crop_weights", lambda g, v, device: torch.full((g, v), 1 / (g * v))),
        ("compat.lightly.IBOTPatchLoss", "vmf_kernels.compat.lightly._patch_weights", lambda mask, *_: mask[mask] / 2),
        ("SinkhornKnopp", "vmf_kernels.centering.log_sums.LogSums.new_offsets", lambda self: torch.arange(len(self.logits))),
    ],
    ids=lambda planted: planted[1].rsplit(".", 1)[-1],
)  # fmt: skip
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The function in which a fault is planted."""
    function, place, wrong = request.param
    monkeypatch.setattr(place, wrong)
    return function  # type: ignore[no-any-return]


def test_a_planted_fault_is_found_made_small_and_told_in_a_line(
    planted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Negative control."""
    report = run(cases_of({planted: SUBJECTS[planted]}, seed=0), count=WITHIN, seconds=60)
    assert report.failures, f"not found in {WITHIN} cases"
    case, found = report.failures[0]
    assert main(["--case", str(case)]) == 1, f"{case} does not fail again"
    assert kind_of(capsys.readouterr().out.splitlines()) & kind_of(found)


def test_a_line_is_the_case_it_came_from() -> None:
    for case, _ in zip(cases_of(SUBJECTS, seed=3), range(100), strict=False):
        assert Case.parse(str(case)) == case
    with pytest.raises(ValueError, match="case has a field 'colour'; expected one of function, backend, seed"):
        Case.parse("function=centers,colour=red")


def test_the_same_seed_gives_the_same_cases() -> None:
    first, second, other = (
        [str(case) for case, _ in zip(cases_of(SUBJECTS, seed=seed), range(60), strict=False)] for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "negated"])
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    values = torch.randn(3, 5)
    other = laid_out(values, layout)
    assert torch.equal(other, values)
    assert other.stride() != values.stride() or other.storage_offset() or other.is_neg()


@pytest.mark.parametrize("dim", [2, 3, 31, 512])
def test_the_normaliser_s_statement_is_that_of_bessel_functions(dim: int) -> None:
    kappa = torch.tensor([1e-6, 1e-2, 3.0, 100.0, 599.0, 601.0, 1e4, 1e6, 3e7], dtype=torch.float64)
    values, lengths = log_normalizer(kappa, dim), mean_resultant_length(kappa, dim)
    with mpmath.workdps(40):
        order = mpmath.mpf(dim) / 2 - 1
        for k, value, length in zip(map(mpmath.mpf, kappa.tolist()), values.tolist(), lengths.tolist(), strict=True):
            lower, upper = mpmath.besseli(order, k), mpmath.besseli(order + 1, k)
            exact = order * mpmath.log(k / 2) - mpmath.loggamma(order + 1) - mpmath.log(lower)
            assert abs(value / exact - 1) < 1e-12, f"log C at {k}: {value}, expected {exact}"
            assert abs(length * lower / upper - 1) < 1e-12, f"A at {k}: {length}"
