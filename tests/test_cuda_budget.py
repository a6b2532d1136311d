"""What the CUDA kernels may cost, held wherever nvcc is; benchmarks/cuda_budget.py counts."""

from __future__ import annotations

import pytest

from benchmarks import cuda_budget

needs_nvcc = pytest.mark.skipif(cuda_budget.nvcc() is None, reason=cuda_budget.missing())
needs_both = pytest.mark.skipif(bool(cuda_budget.missing()), reason=cuda_budget.missing())

# 80 registers let 24 warps live on a multiprocessor, enough to hide the latency of their chains.
MOST_REGISTERS = 80
# Of Philox 8.5, of the sums 3, of the fewest instructions known for a normal 7 or 19; and the loop.
MOST_SLOTS_PER_NORMAL = {"fast": 19.5, "exact": 35.0, "rademacher": 12.0}


@needs_nvcc
@pytest.mark.parametrize("architecture", cuda_budget.ARCHITECTURES)
def test_nothing_is_spilled(architecture):
    found = cuda_budget.budgets(architecture)
    assert len(found) == 6
    for budget in found:
        assert budget.spilled_bytes == 0, budget
        assert 16 < budget.registers <= MOST_REGISTERS, budget


@needs_both
def test_issue_slots_of_a_normal():
    slots = {
        b.distribution: b.slots_per_normal
        for b in cuda_budget.budgets("sm_90")
        if b.operation == "update"
    }
    assert slots.keys() == MOST_SLOTS_PER_NORMAL.keys()
    for name, most in MOST_SLOTS_PER_NORMAL.items():
        # No fewer than two thirds either: then the count has lost sight of the loop.
        assert 2 / 3 * most < slots[name] <= most, slots


@needs_both
def test_sixteen_bytes_at_a_time():
    """The way for whole chunks reads and writes a thread's 32 bytes of bfloat16 in two each."""
    for budget in cuda_budget.budgets("sm_90"):
        if budget.operation == "perturb":
            # 8 fields of the segment, a stream, two loads and two stores, and little else.
            assert budget.window["memory"] <= 20, budget


def test_a_prediction_is_bounded_by_memory_and_by_issue():
    from collections import Counter

    def budget(direction, window):
        return cuda_budget.Budget(
            "sm_90", "update", "x", 80, 0, Counter(direction), Counter(window)
        )

    idle = budget({"alu": 0}, {"alu": 16})
    assert idle.seconds(1) == pytest.approx(4 * 1.3e9 / cuda_budget.BYTES_PER_S)
    busy = budget({"alu": 16 * 33}, {"alu": 0})
    # 33 slots for 32 elements, 132 * 4 of them a cycle
    assert busy.seconds(10) == pytest.approx(33 * 10 * 1.3e9 / 32 / (132 * 4) / 1.7e9)
    special = budget({"special": 16 * 5}, {"alu": 0})
    assert special.seconds(10) == pytest.approx(8 * 5 * 10 * 1.3e9 / 32 / (132 * 4) / 1.7e9)
