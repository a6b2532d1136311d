"""What the CUDA kernels may cost, held wherever nvcc is; benchmarks/budget.py counts."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas
import pytest

from benchmarks import budget, budget_kernels, sass
from benchmarks.render.kernels import BYTES_PER_S, at_best_ms

needs_nvcc = pytest.mark.skipif(not sass.nvcc(), reason=budget.without_cuda())
needs_both = pytest.mark.skipif(bool(budget.without_cuda()), reason=budget.without_cuda())

# 80 registers let 24 warps live on a multiprocessor, enough to hide the latency of their chains.
MOST_REGISTERS = 80
# Of Philox 8.5, of the sums 3, of the fewest instructions known for a normal 7 or 19; and the loop.
# Of signs, whose calls a warp shares, 3 for each one; the others are the loops and a call.
MOST_SLOTS_PER_NORMAL = {"fast": 19.5, "exact": 35.0, "rademacher": 4.8}
# Of the window 8, of a weight's conversions, restoring and step 6, of a root and a quotient 14.
MOST_SLOTS_OF_A_WEIGHT = {"fast": 31.5, "exact": 31.5, "rademacher": 21.5}
# Of Philox 8.5, 1.5 to begin it and 1 to have its keys at hand; of the rounding 5 more than of a
# conversion; and 1.5 to keep and to find where the window is.
MOST_SLOTS_TO_ROUND = 17.5


@needs_nvcc
@pytest.mark.parametrize("architecture", budget.ARCHITECTURES)
def test_nothing_is_spilled(architecture):
    found = budget.cuda_sums(architecture)
    assert len(found) == 12
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert 16 < kernel.registers <= MOST_REGISTERS, kernel


@needs_both
def test_issue_slots_of_a_normal():
    updates = [b for b in budget.cuda_sums("sm_90") if b.kernel.operation == "update"]
    assert {b.kernel.distribution for b in updates} == MOST_SLOTS_PER_NORMAL.keys()
    for counted in updates:
        most = MOST_SLOTS_PER_NORMAL[counted.kernel.distribution]
        # No fewer than two thirds either: then the count has lost sight of the loop.
        assert 2 / 3 * most < counted.per_normal <= most, counted
        most = MOST_SLOTS_OF_A_WEIGHT[counted.kernel.distribution]
        most += MOST_SLOTS_TO_ROUND * counted.kernel.stochastic
        assert 2 / 3 * most < counted.per_weight <= most, counted


@needs_both
def test_issue_slots_of_a_stochastic_store():
    """Only what is done once a weight may grow, by a quarter of a Philox call and the store."""
    found = {b.kernel: b for b in budget.cuda_sums("sm_90")}
    for kernel, counted in found.items():
        if kernel.stochastic:
            nearest = found[replace(kernel, stochastic=False)]
            assert counted.per_normal == nearest.per_normal, counted
            more = counted.per_weight - nearest.per_weight
            assert 2 / 3 * MOST_SLOTS_TO_ROUND < more <= MOST_SLOTS_TO_ROUND, counted


@needs_both
@pytest.mark.parametrize("architecture", budget.ARCHITECTURES)
def test_sixteen_bytes_at_a_time(architecture):
    """The way for whole chunks reads and writes a thread's 32 bytes of bfloat16 in two each."""
    for counted in budget.cuda_sums(architecture):
        assert (counted.accesses["LDG.E.128"], counted.accesses["STG.E.128"]) == (2, 2), counted


# Of a term 1, of the sums 3; of sixteen elements 5 reads of shared memory and what steps.
MOST_SLOTS_OF_A_TERM = 5.6


@needs_nvcc
@pytest.mark.parametrize("architecture", budget.ARCHITECTURES)
def test_low_rank_kernels(architecture):
    """Sixteen warps live on a multiprocessor. A thread reads and writes sixteen bytes at a time."""
    for kernel in budget.cuda_tiles(architecture):
        assert kernel.spilled_bytes == 0, kernel
        assert 16 < kernel.registers <= 128, kernel
        if not budget.without_cuda():
            assert (kernel.accesses["LDG.E.128"], kernel.accesses["STG.E.128"]) == (2, 2), kernel
            if kernel.kernel.operation == "update":
                most = MOST_SLOTS_OF_A_TERM
                assert 2 / 3 * most < kernel.per_normal <= most, kernel


# --- rules that keep numbers for each weight -----------------------------------------------------

# Of a direction 8.5 and 24.6; of a quotient or a root 10; of a rounding as above; and 27 of finding
# out where four elements of each array are, and whether they are one access.
MOST_SLOTS_OF_A_RULE = {
    ("perturb hizoo", "float32"): 96,
    ("perturb hizoo", "bfloat16"): 97,
    ("perturb adamu", "float32"): 112,
    ("perturb adamu", "bfloat16"): 112,
    ("perturb blend", ""): 102,
    ("update adam", "float32"): 113,
    ("update adam", "bfloat16"): 150,
    ("update hizoo", "float32"): 126,
    ("update hizoo", "bfloat16"): 145,
    ("update helene", "float32"): 104,
    ("update helene", "bfloat16"): 141,
    ("update adamu", "float32"): 141,
    ("update adamu", "bfloat16"): 161,
}


@needs_nvcc
@pytest.mark.parametrize("architecture", budget.ARCHITECTURES)
def test_nothing_of_a_rule_is_spilled(architecture):
    found = budget.cuda_rules(architecture)
    # Each for weights of three types.
    assert len(found) == 3 * sum(
        rule.has_direction + rule.updates for rule in budget_kernels.RULES.values()
    )
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert 16 < kernel.registers <= MOST_REGISTERS, kernel


@needs_both
@pytest.mark.parametrize("architecture", budget.ARCHITECTURES)
def test_four_elements_of_an_array_are_one_access(architecture):
    """Of 16 bytes or of 8, and each of them in the device's memory for certain (LDG, not LD). Words
    may be among the parameters: the first direction, all of them, first, second, step, numbers."""
    for kernel in budget.cuda_rules(architecture):
        arrays = 1 + budget_kernels.RULES[kernel.kernel.rule].buffers
        written = arrays if kernel.kernel.operation == "update" else 1
        assert kernel.accesses["LDG.E.128"] == arrays, kernel
        assert kernel.accesses["LDG.E.64"] >= arrays, kernel  # and addresses
        assert kernel.accesses["STG.E.128"] == kernel.accesses["STG.E.64"] == written, kernel
        unknown = {k: n for k, n in kernel.accesses.items() if re.match(r"(LD|ST)\.", k)}
        assert unknown.keys() <= {"LD.E"}, kernel
        assert kernel.accesses["LD.E"] <= 6, kernel


@needs_both
def test_issue_slots_of_a_rule():
    found = {(b.kernel.what, b.kernel.kept): b for b in budget.cuda_rules_counted()}
    assert found.keys() == MOST_SLOTS_OF_A_RULE.keys()
    for kind, counted in found.items():
        most = MOST_SLOTS_OF_A_RULE[kind]
        assert 2 / 3 * most < counted.per_weight <= most, counted


def test_a_prediction_is_bounded_by_memory_and_by_issue():
    def kernel(per_normal, per_weight):
        counts = {"instructions a normal": per_normal, "instructions a weight": per_weight}
        return pandas.Series({**counts, "bytes moved a weight": 4})

    assert at_best_ms(kernel(0, 1), 1) == pytest.approx(1e3 * 4 * 1.3e9 / BYTES_PER_S)
    # 33 instructions a normal for 32 elements each, 132 * 4 of them a cycle, at 1.7 GHz
    slots = 1.3e9 * (33 * 10 + 41) / 32
    assert at_best_ms(kernel(33, 41), 10) == pytest.approx(1e3 * slots / (132 * 4) / 1.7e9)


LOOPS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD R2, R2, R3, R4 ;
        /*0020*/                   FFMA R5, R5, R6, R7 ;
        /*0030*/                   FFMA R5, R5, R6, R7 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/               @P1 BRA 0x80 ;
        /*0060*/                   LDG.E.U16 R8, [R2.64] ;
        /*0070*/                   BRA 0x90 ;
        /*0080*/                   LDG.E.128 R8, [R2.64] ;
        /*0090*/              @!P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
"""


def test_instructions_are_counted_by_loop_and_without_rare_blocks():
    code = list(sass.instructions(LOOPS))
    assert [i.address for i in code] == list(range(0, 0xB0, 0x10))
    assert code[4] == (0x40, "BRA", " 0x20 ", True)
    # The window's loop is 0x10 to 0x90 without the two instructions for a single element; the
    # directions' loop in it is 0x20 to 0x40.
    window, loop, inner = sass.loop_cycles(code, whole_program=False)
    assert (window[0], loop[0], inner[0]) == (7, 3, 0)
    # Of the loop, two multiply floats; of the window beside it, one multiplies integers.
    assert dict(zip(sass.PIPES, window, strict=True)) == dict(
        issue=7, multiplier=2, fma=3, alu=0, special=0, access=4
    )
    program, loop, _ = sass.loop_cycles(code, whole_program=True)
    assert (program[0], loop[0]) == (9, 7)


@pytest.mark.parametrize(
    ("name", "pipes"),
    [
        ("IMAD.WIDE.U32", dict(multiplier=4, fma=2)),
        ("IMAD.SHL.U32", dict(multiplier=2, fma=1)),
        ("FADD.FTZ", dict(fma=1)),
        ("LOP3.LUT", dict(alu=2)),
        ("FSETP.GE.AND", dict(alu=2)),
        ("FCHK", dict(alu=2)),
        ("I2FP.F32.S32", dict(alu=2)),
        ("MUFU.RSQ", dict(special=8)),
        ("I2F.U32.RP", dict(special=8)),
        ("LDS.128", dict(access=4)),
        ("LDC.64", dict(access=4)),
        ("LEA.HI.X", dict(alu=2)),
        ("ULDC.64", {}),
        ("BSSY", {}),
    ],
)
def test_what_an_instruction_takes_time_of(name, pipes):
    cycles = sass.cycles([sass.Instruction(0, name, " R0, R1", False)])
    assert dict(zip(sass.PIPES, cycles, strict=True)) == dict.fromkeys(sass.PIPES, 0) | pipes | {
        "issue": 1
    }


ASIDE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD R2, R2, R3, R4 ;
        /*0020*/                   BRA.DIV UR4, 0xa0 ;
        /*0030*/                   FFMA R5, R5, R6, R7 ;
        /*0040*/               @P0 BRA 0x30 ;
        /*0050*/               @P1 BRA 0x80 ;
        /*0060*/                   FCHK P2, R5, R6 ;
        /*0070*/                   FADD R5, R5, R6 ;
        /*0080*/              @!P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   WARPSYNC.COLLECTIVE R8, 0x30 ;
        /*00b0*/                   BRA 0x30 ;
"""


def test_warps_that_diverge_and_what_is_aside_are_not_counted():
    code = list(sass.instructions(ASIDE))
    for besides, window in (("", 8), ("FCHK", 6)):
        found = sass.loop_cycles(code, whole_program=False, besides=besides)
        assert [cycles[0] for cycles in found] == [window, 2, 0]
