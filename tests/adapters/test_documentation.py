"""docs/adapters.md names every scheme and family, and what it says of others is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


def test_every_scheme_and_family_has_its_row():
    from adamezo.adapters import FAMILIES, SCHEMES

    text = PAGE.read_text()
    for name, scheme in SCHEMES.items():
        (row,) = re.findall(rf'^\| `"{name}"` \|.*$', text, re.MULTILINE)
        for option, default in scheme.defaults.items():
            assert f"{option}={default}".replace("'", '"') in row.replace('="', "=").replace(
                '"`', "`"
            )
    assert all(f"`{family}`" in text for family in FAMILIES)


def test_peft_has_no_place_for_a_kind_of_adapters_of_ours():
    """The reason why tensor trains do not go through peft: look again when this fails."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.utils import register_peft_method

    with pytest.raises(ValueError, match="Unknown PEFT type TENSORTRAIN"):
        register_peft_method(name="tensortrain", config_cls=LoraConfig, model_cls=LoraModel)
    assert "_custom_modules" not in LoraConfig().to_dict()
