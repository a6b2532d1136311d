"""A prefix is the keys and values of tokens in front of the text."""

from __future__ import annotations

import pytest
import torch

from adamezo.adapters import adapt, adapters_of
from helpers.families import VOCABULARY, make, tokens

CAUSAL = ("llama", "qwen2", "qwen3", "opt")
LENGTH, SEED = 4, 7


def prefix_tokens(rows):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(VOCABULARY, (1, LENGTH), generator=generator).expand(rows, -1)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_it_begins_as_the_tokens_that_it_is_made_of(family):
    """Before training, a text behind the prefix is a text behind its tokens. Logits of order 1 and
    more, computed from the same numbers in matrices of other sizes: sums of 40 terms or fewer."""
    ids = tokens()
    whole = torch.cat([prefix_tokens(len(ids)), ids], dim=1)
    expected = make(family)(input_ids=whole).logits[:, LENGTH:]
    model = adapt(make(family), "prefix", length=LENGTH, seed=SEED)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    for cached in (True, False):
        found = model(ids, torch.ones_like(ids), use_cache=cached).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        (logits, *rest) = model(ids, use_cache=cached, return_dict=False)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert len(rest) == cached
        assert (model(ids, use_cache=cached).past_key_values is not None) == cached
    embedded = model.get_input_embeddings()(ids)
    found = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (make(family)(input_ids=ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(family):
    model = adapt(make(family), "prefix", length=LENGTH, seed=SEED)
    ids, pad = tokens(), 3
    padded = torch.cat([torch.zeros(len(ids), pad, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= pad).long().expand(len(ids), -1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(found[:, pad:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_generate_reads_it_at_every_token(family):
    model = adapt(make(family), "prefix", length=LENGTH, seed=SEED)
    for p in adapters_of(model).values():
        p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a row that is padded on the left
    options = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    with_cache = model.generate(ids, attention_mask=mask, **options)
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache, without)
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **options)
    without = model.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **options)
    assert torch.equal(beams, without)
    expected = ids[1:]  # and one token after the other, by hand
    for _ in range(5):
        following = model(input_ids=expected).logits[:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(with_cache[1:], expected)
    assert not torch.equal(with_cache, make(family).generate(ids, attention_mask=mask, **options))


def test_a_model_without_a_cache_is_refused():
    model = make("roberta")
    with pytest.raises(ValueError, match="a RobertaForSequenceClassification takes no past_key"):
        adapt(model, "prefix")
    assert not hasattr(model, "prefix")


def test_a_mask_of_another_form_is_refused():
    model = adapt(make("llama"), "prefix")
    with pytest.raises(ValueError, match=r"attention_mask: got the shape \(3, 1, 7, 7\)"):
        model(input_ids=tokens(), attention_mask=torch.ones(3, 1, 7, 7))


def test_the_training_mode_is_left():
    model = make("llama").train()
    adapt(model, "prefix")
    assert model.training
    assert model.model.layers[0].training


@torch.no_grad()
def test_a_cache_that_was_filled_without_it_is_refused():
    """The text after it would be read without the prefix."""
    ids = tokens()
    foreign = make("llama")(ids[:, :4], use_cache=True).past_key_values
    model = adapt(make("llama"), "prefix", length=LENGTH, seed=SEED)
    with pytest.raises(ValueError, match="got a cache of 4 tokens without a prefix"):
        model(ids[:, 4:], past_key_values=foreign)
    own = model(ids[:, :4], use_cache=True)
    found = model(ids[:, 4:], past_key_values=own.past_key_values).logits
    torch.testing.assert_close(found, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_gradient_checkpointing_which_drops_it_is_refused(family):
    model = adapt(make(family), "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        model(input_ids=tokens())
    model.eval()  # in which transformers does no checkpointing
    expected = model(input_ids=tokens()).logits
    model.gradient_checkpointing_disable()
    assert torch.equal(model(input_ids=tokens()).logits, expected)
