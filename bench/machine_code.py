"""Machine code as ``nvdisasm -c -ndf`` prints it: the instructions of a kernel, and the loops that hold its products.

What is counted is what a warp issues: each of a multiprocessor's four schedulers issues one instruction of one warp a clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LINE = re.compile(
    r"^(?:(?P<label>\.\w+):|\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<operation>[A-Z0-9_.]+)(?P<operands>[^;]*))"
)
TARGET = re.compile(r"`\((\.\w+)\)")
RESULTLESS = re.compile(r"\S*\s+RZ,")  # after the operation up to its shape
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "QGMMA", "IMMA")
WAIT = "WARPGROUP.DEPBAR"  # for products of sm_90, until no more than its last operand are in flight
ALL_DONE = "0x0"


class Instruction(NamedTuple):
    """One instruction, without its predicate."""

    operation: str
    operands: str

    @property
    def is_product(self) -> bool:
        """On the tensor cores; a commit of no products is one of sm_90's without a result."""
        return self.operation.startswith(MATRIX) and not (
            self.operation.startswith("HGMMA") and RESULTLESS.match(self.operands) is not None
        )


@dataclass(frozen=True)
class Loop:
    """One turn of an innermost loop with products, in instructions of a warp."""

    instructions: int  # from the target of the branch back up to that branch, with it
    skippable: int  # of these, what conditional branches may jump over inside the loop
    exposed: (
        int  # of these, from a wait for all products (sm_90) to the next product: nothing else of the warp runs then
    )
    matrix: int  # of these, tensor-core instructions


class Code(NamedTuple):
    """The instructions of one kernel, and where its branches lead."""

    instructions: list[Instruction]
    branches: list[tuple[int, int]]  # positions of a branch and of its target


def parsed(disassembly: str) -> Code:
    """One kernel's code."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for found in filter(None, map(LINE.match, disassembly.splitlines())):
        if found["label"]:
            labels[found["label"]] = len(instructions)
        else:
            instructions.append(Instruction(found["operation"], found["operands"]))
    branches = []
    for i, each in enumerate(instructions):
        target = TARGET.search(each.operands) if each.operation.startswith("BRA") else None
        if target is not None and target[1] in labels:
            branches.append((i, labels[target[1]]))
    return Code(instructions, branches)


def loops(code: Code) -> tuple[Loop, ...]:
    """The innermost loops that have products, in the order of the code; none of a kernel without tensor cores."""
    spans = {(target, branch + 1) for branch, target in code.branches if target <= branch}
    found = [span for span in spans if any(each.is_product for each in code.instructions[slice(*span)])]
    innermost = [span for span in found if not any(_is_inside(other, span) or _leaves(span, other) for other in found)]
    return tuple(_loop(code, *span) for span in sorted(innermost))


def _is_inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _leaves(span: tuple[int, int], loop: tuple[int, int]) -> bool:
    """Whether it begins in a loop and ends behind it: the way back from a long wait, which compilers put behind all else."""
    return loop[0] < span[0] < loop[1] < span[1]


def _loop(code: Code, first: int, end: int) -> Loop:
    body = code.instructions[first:end]
    return Loop(
        instructions=len(body),
        skippable=len(set(_skippable(code.branches, first, end))),
        exposed=_exposed(body),
        matrix=sum(each.is_product for each in body),
    )


def _skippable(branches: Sequence[tuple[int, int]], first: int, end: int) -> Iterator[int]:
    """Positions between a branch forward and its target, both in the loop."""
    for branch, target in branches:
        if first <= branch < target < end:
            yield from range(branch + 1, target)


def _exposed(body: Sequence[Instruction]) -> int:
    """Instructions behind a wait for all products and before the next product, of which a turn may begin with some."""
    in_flight, count = True, 0
    for _ in range(2):  # the first time only says how a turn finds the tensor cores
        count = 0
        for each in body:
            if each.is_product:
                in_flight = True
            elif not in_flight:
                count += 1
            if each.operation.startswith(WAIT) and each.operands.split(",")[-1].strip() == ALL_DONE:
                in_flight = False
    return count
