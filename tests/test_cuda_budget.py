"""What the CUDA kernels may cost, held wherever nvcc is; benchmarks/budget_cuda.py counts."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks import budget_code, budget_cuda

needs_nvcc = pytest.mark.skipif(budget_code.nvcc() is None, reason=budget_cuda.missing())
needs_both = pytest.mark.skipif(bool(budget_cuda.missing()), reason=budget_cuda.missing())

# 80 registers let 24 warps live on a multiprocessor, enough to hide the latency of their chains.
MOST_REGISTERS = 80
# Of Philox 8.5, of the sums 3, of the fewest instructions known for a normal 7 or 19; and the loop.
MOST_SLOTS_PER_NORMAL = {"fast": 19.5, "exact": 35.0, "rademacher": 12.0}
# Of Philox 8.5, 1.5 to begin it and 1 to have its keys at hand; of the rounding 5 more than of a
# conversion; and 1.5 to keep and to find where the window is.
MOST_SLOTS_TO_ROUND = 17.5


@needs_nvcc
@pytest.mark.parametrize("architecture", budget_cuda.ARCHITECTURES)
def test_nothing_is_spilled(architecture):
    found = budget_cuda.budgets(architecture)
    assert len(found) == 12
    for budget in found:
        assert budget.spilled_bytes == 0, budget
        assert 16 < budget.registers <= MOST_REGISTERS, budget


@needs_both
def test_issue_slots_of_a_normal():
    updates = [b for b in budget_cuda.budgets("sm_90") if b.operation == "update"]
    assert {b.distribution for b in updates} == MOST_SLOTS_PER_NORMAL.keys()
    for budget in updates:
        most = MOST_SLOTS_PER_NORMAL[budget.distribution]
        # No fewer than two thirds either: then the count has lost sight of the loop.
        assert 2 / 3 * most < budget.per_normal <= most, budget


@needs_both
def test_issue_slots_of_a_stochastic_store():
    """Only what is done once a weight may grow, by a quarter of a Philox call and the store."""
    found = {(b.operation, b.distribution, b.stochastic): b for b in budget_cuda.budgets("sm_90")}
    for (operation, distribution, stochastic), budget in found.items():
        if stochastic:
            nearest = found[operation, distribution, False]
            assert budget.per_normal == nearest.per_normal, budget
            more = budget.per_weight - nearest.per_weight
            assert 2 / 3 * MOST_SLOTS_TO_ROUND < more <= MOST_SLOTS_TO_ROUND, budget


@needs_both
@pytest.mark.parametrize("architecture", budget_cuda.ARCHITECTURES)
def test_sixteen_bytes_at_a_time(architecture):
    """The way for whole chunks reads and writes a thread's 32 bytes of bfloat16 in two each."""
    for budget in budget_cuda.budgets(architecture):
        assert (budget.accesses["LDG.E.128"], budget.accesses["STG.E.128"]) == (2, 2), budget


# --- rules that keep numbers for each weight -----------------------------------------------------

# Of a direction 8.5 and 24.6; of a quotient or a root 10; of a rounding as above; and 26 of finding
# out where four elements of each array are, and whether they are one access.
MOST_SLOTS_OF_A_RULE = {
    ("perturb hizoo", "float32"): 95,
    ("perturb hizoo", "bfloat16"): 95,
    ("perturb adamu", "float32"): 112,
    ("perturb adamu", "bfloat16"): 112,
    ("perturb blend", ""): 102,
    ("update adam", "float32"): 113,
    ("update adam", "bfloat16"): 150,
    ("update hizoo", "float32"): 124,
    ("update hizoo", "bfloat16"): 144,
    ("update helene", "float32"): 104,
    ("update helene", "bfloat16"): 141,
    ("update adamu", "float32"): 141,
    ("update adamu", "bfloat16"): 161,
}


@needs_nvcc
@pytest.mark.parametrize("architecture", budget_cuda.ARCHITECTURES)
def test_nothing_of_a_rule_is_spilled(architecture):
    found = budget_cuda.rule_kernels(architecture)
    assert len(found) == 21
    for kernel in found:
        assert kernel.spilled_bytes == 0, kernel
        assert 16 < kernel.registers <= MOST_REGISTERS, kernel


@needs_both
@pytest.mark.parametrize("architecture", budget_cuda.ARCHITECTURES)
def test_four_elements_of_an_array_are_one_access(architecture):
    """Of 16 bytes or of 8, and each of them in the device's memory for certain (LDG, not LD)."""
    for kernel in budget_cuda.rule_kernels(architecture):
        operation, rule = kernel.operation.split()
        arrays = 1 + budget_cuda.RULES[rule][1]
        written = arrays if operation == "update" else 1
        assert kernel.accesses["LDG.E.128"] == arrays, kernel
        assert kernel.accesses["LDG.E.64"] >= arrays, kernel  # and addresses
        assert kernel.accesses["STG.E.128"] == kernel.accesses["STG.E.64"] == written, kernel
        assert not any(re.match(r"(LD|ST)\.", name) for name in kernel.accesses), kernel


@needs_both
def test_issue_slots_of_a_rule():
    found = {(b.operation, b.kept): b for b in budget_cuda.rule_budgets("sm_90")}
    assert found.keys() == MOST_SLOTS_OF_A_RULE.keys()
    for kind, budget in found.items():
        most = MOST_SLOTS_OF_A_RULE[kind]
        assert 2 / 3 * most < budget.per_weight <= most, budget


def test_a_prediction_is_bounded_by_memory_and_by_issue():
    def budget(direction, once):
        kind = ("CUDA", "sm_90", "update", "exact", False, 80, 0)
        return budget_code.Budget(*kind, Counter(direction), Counter(once))

    idle = budget({"alu": 0}, {"alu": 16})
    assert idle.seconds(1) == pytest.approx(4 * 1.3e9 / budget_code.BYTES_PER_S)
    busy = budget({"alu": 16 * 33}, {"alu": 0})
    # 33 slots for 32 elements, 132 * 4 of them a cycle
    assert busy.seconds(10) == pytest.approx(33 * 10 * 1.3e9 / 32 / (132 * 4) / 1.7e9)
    special = budget({"special": 16 * 5}, {"alu": 0})
    assert special.seconds(10) == pytest.approx(8 * 5 * 10 * 1.3e9 / 32 / (132 * 4) / 1.7e9)
