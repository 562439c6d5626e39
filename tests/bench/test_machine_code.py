"""The loops with products in machine code, and how many instructions of a turn are issued while no product runs."""

from __future__ import annotations

import pytest

from bench.machine_code import Instruction, Loop, loops, parsed

PRODUCT = "HGMMA.64x128x16.F32.BF16 R152, gdesc[UR20], R152"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
# A turn: a product, what runs beside it, a wait, the softmax step with a part that is mostly jumped over, a product, the rest.
TURN = f"""
.L_x_1:
    FADD R1, R2, R3
    {PRODUCT}
    FADD R1, R2, R3
    @!P1 BRA `(.L_x_9)
.L_x_3:
    {WAIT}
    MUFU.EX2 R1, R2
    @P0 BRA `(.L_x_2)
    FMUL R1, R2, R3
    FMUL R1, R2, R3
.L_x_2:
    {PRODUCT}
    IADD3 R1, R2, R3
    @!P0 BRA `(.L_x_1)
"""
SPIN = """
.L_x_4:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR60], R3
    @!P0 BRA `(.L_x_4)
"""
WAY_BACK = """
.L_x_9:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR60], R3
    @!P1 BRA `(.L_x_9)
    BRA `(.L_x_3)
"""


def disassembly(text: str) -> str:
    """As nvdisasm prints it: every instruction with its address."""
    lines = [
        line if line.startswith(".") else f"        /*{i:04x}*/  {line} ;" for i, line in enumerate(text.split("\n"))
    ]
    return "\n".join(line for line in lines if "/*" not in line or line.split("*/")[1].strip(" ;"))


def found(text: str) -> tuple[Loop, ...]:
    return loops(parsed(disassembly(text)))


def test_a_turn_is_counted() -> None:
    assert found(TURN) == (Loop(instructions=12, skippable=2, exposed=4, matrix=2),)


def test_other_loops_are_none_and_a_way_back_makes_none() -> None:
    around = f"{SPIN}{TURN}\n    FADD R1, R2, R3\n{WAY_BACK}\n    EXIT"
    assert found(around) == found(TURN)


def test_every_loop_counts_in_order_and_of_nested_ones_the_inner() -> None:
    second = TURN.replace(".L_x_1", ".L_x_11").replace(".L_x_2", ".L_x_12").replace("    MUFU.EX2 R1, R2\n", "")
    nested = f".L_x_0:\n{TURN}{second}    @P3 BRA `(.L_x_0)\n"
    first, other = found(nested)
    assert (first.instructions, other.instructions) == (12, 11)


@pytest.mark.parametrize(
    ("old", "new", "exposed"),
    [
        (f"    {WAIT}\n", "", 0),
        ("gsb0, 0x0", "gsb0, 0x1", 0),
        ("    IADD3", f"    {WAIT}\n    IADD3", 7),
    ],
    ids=["no wait", "a product stays in flight", "a wait at the end of the turn reaches into the next"],
)
def test_only_a_wait_for_all_products_exposes(old: str, new: str, exposed: int) -> None:
    assert old in TURN
    (loop,) = found(TURN.replace(old, new))
    assert loop.exposed == exposed, f"{loop}"


def test_code_without_products_has_no_loop() -> None:
    assert found(TURN.replace(PRODUCT, "FFMA R1, R2, R3, R4")) == ()


@pytest.mark.parametrize(
    ("operation", "operands", "expected"),
    [
        ("HGMMA.64x128x16.F32.BF16", " R152, gdesc[UR20], R152", True),
        ("HGMMA.64x8x16.F32.BF16", " RZ, gdesc[UR20], RZ", False),
        ("HMMA.16816.F32.BF16", " R4, R8, R12, R4", True),
        ("UTCHMMA", " gdesc[UR4], gdesc[UR6]", True),
        ("FFMA", " R1, R2, R3, R4", False),
    ],
)
def test_products_are_known(operation: str, operands: str, expected: bool) -> None:
    """A commit of no products is one without a result."""
    assert Instruction(operation, operands).is_product is expected
