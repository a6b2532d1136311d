"""The list of rules, which Python and C++ each have once; their bits are in test_buffered.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from adamezo_kernels import RULES, PhiloxState, Plan, Terms, perturb_, sample_, update_terms_
from adamezo_kernels.backends import native
from adamezo_kernels.rules import Rule
from adamezo_kernels.terms import RULE_NUMBERS
from helpers.backends import needs_native

STATE = PhiloxState(3, 7)


@needs_native
def test_both_languages_have_the_same_rules_in_one_order():
    """A rule goes to the compiled module as its place in the list."""
    assert native.compiled.rules() == list(RULES)


@needs_native
def test_a_rule_that_the_compiled_module_lacks_is_refused():
    terms = Terms.of([STATE], rule="hizoo")
    names = ("operation", "distribution", "table", "segments", "elements", "type", "seed", "offset")
    names += ("buffer_type", "with_second", "scale", "eps", "rounding", "carried")
    job = dict.fromkeys(names, 0) | {"words": terms.words.data_ptr(), "horizon": 1, "rank": 1}
    for rule in range(len(RULES)):
        native.compiled.Job(rule=rule, **job)
    for rule in (-1, len(RULES)):
        with pytest.raises(ValueError, match="no such rule: is the compiled module older"):
            native.compiled.Job(rule=rule, **job)


def test_a_compiled_module_of_other_sources_is_not_used():
    """Its numbers of rules would be those of others: a forgotten build must not go on silently."""
    program = (
        "import sys, types\n"
        "old = types.ModuleType('adamezo_kernels._native')\n"
        "old.rules = lambda: ['moments', 'adam']\n"
        "sys.modules['adamezo_kernels._native'] = old\n"
        "from adamezo_kernels.backends import native\n"
        "print(*native.availability())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("False the compiled module cannot be imported"), done.stderr
    assert "built with the rules ['moments', 'adam']" in done.stdout


def test_there_is_room_for_the_numbers_of_every_rule():
    assert max(len(rule.numbers) for rule in RULES.values()) <= RULE_NUMBERS


def test_the_reference_takes_a_rule_from_its_record(monkeypatch):
    """It knows none by name: a rule of one line is there with its entry."""

    def doubled(z, b, n):
        return 2 * z[0]

    def step(z, b, n, eps):
        return n[0] * z[0], b[0] + 1

    rule = Rule(1, 1, ("number",), direction=doubled, step=step, bound=lambda z, b, n: 2 * z)
    monkeypatch.setitem(RULES, "doubled", rule)
    assert rule.has_direction
    assert rule.updates
    w, kept, z = torch.zeros(100), torch.full((100,), 3.0), sample_(torch.empty(100), STATE)
    plan = Plan([w]).with_buffers([[kept]])
    terms = Terms.of([STATE], minus_lr=-0.5, rule="doubled", numbers=[3.0])
    perturb_(plan, terms, 0.25, backend="reference")
    torch.testing.assert_close(w, 0.5 * z, rtol=0, atol=0)
    update_terms_(plan, terms, restore=-0.25, backend="reference")
    torch.testing.assert_close(w, -0.5 * (3 * z), rtol=0, atol=0)
    assert (kept == 4).all()


def test_a_rule_with_a_direction_has_a_bound():
    """So that a perturbation which might overflow is refused; nothing knows such rules by name."""
    with pytest.raises(TypeError, match="a rule with a direction needs a bound"):
        Rule(1, 0, (), direction=lambda z, b, n: z[0])
