"""Cases that failed once, each a line as the command prints it."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.cases import Case
from tests.fuzz.runner import faults_of
from vmf_kernels.backends.native import module

FOUND = {
    "prototypes that are one row, expanded": "function=target_cross_entropy,backend=native,layout=expanded,option=unstored",
    "prototypes stored with the other sign": "function=prototype_cross_entropy,backend=native,layout=negated,dim=3",
    "the same in kernels of Triton": "function=prototype_cross_entropy,backend=triton,layout=negated,dim=3,kind=weight_norm",
    "fp64 prototypes whose gain leaves fp32": "function=matched_prototype_cross_entropy,backend=reference,kind=normalized,"
    "stored=fp64,norms=denormal",
    "a target that is NaN": "function=target_cross_entropy of stored,backend=streaming,images=2,rows=nan,option=probabilities",
    "prototypes too short for normalize": "function=unique_prototypes,seed=36877,prototypes=16,dim=3,dtype=bf16,norms=tiny,"
    "option=euclidean",
    "a row of zeros, which is no row's nearest": "function=KoLeoLoss,seed=27341,prototypes=7,dim=8,norms=some_zero,"
    "option=koleo",
}


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter
@pytest.mark.parametrize("line", FOUND.values(), ids=FOUND)
def test_what_failed_once_does_not_fail_again(line: str) -> None:
    case = Case.parse(line)
    if case.backend == "triton" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here: tests/gpu")
    if case.backend == "native" and module.native() is None:
        pytest.skip("vmf_kernels._native was not built")
    found = faults_of(case)
    assert not found, f"python -m tests.fuzz --case '{case}'\n" + "\n".join(found)
