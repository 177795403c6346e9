"""generate() of transformers over recurrent states: every strategy equal to one without a cache, or refused by name."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from whimbrel.errors import UnsupportedError
from whimbrel.infer import generate
from whimbrel.integrations.hf import WhimbrelCache
from whimbrel.integrations.hf.fixtures.models import MODELS, left_padded, pair, tokens
from whimbrel.integrations.hf.model import CACHE_NAME

NEW = 12


def run(model, ids, **options):
    defaults = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **(defaults | options))


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    own, model = pair(MODELS[request.param])
    return own.double(), model.double()


def test_greedy_is_ours_with_and_without_a_cache(models):
    own, model = models
    ids = tokens(3, 37)
    expected = generate(own, ids, max_new_tokens=NEW).tokens
    assert torch.equal(run(model, ids)[:, 37:], expected)
    assert torch.equal(run(model, ids, use_cache=False)[:, 37:], expected)
    assert len(expected.unique()) > 5


def test_left_padded_rows_are_those_of_the_rows_alone(models):
    model = models[1]
    rows = [tokens(1, n, seed=n)[0] for n in (31, 12, 3)]
    ids, mask = left_padded(rows)
    together = run(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 31:], run(model, row[None])[0, len(row) :])
    assert torch.equal(together, run(model, ids, attention_mask=mask, use_cache=False))


def test_beams_take_their_states_along(models):
    model = models[1]
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (9, 5)])
    options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7}
    assert torch.equal(run(model, ids, **options), run(model, ids, **options, use_cache=False))
    out = run(model, ids, **options, return_dict_in_generate=True, output_scores=True)
    order = out.beam_indices[:, :NEW]
    assert bool((order[:, 1:] != order[:, :-1]).any())  # else the test shows nothing


def test_samples_follow_the_seed_and_the_distribution(models):
    model = models[1]
    ids = tokens(2, 8)

    def sample(**options):
        torch.manual_seed(0)
        return run(model, ids, do_sample=True, top_k=20, temperature=2.0, num_return_sequences=2, **options)

    drawn = sample()
    assert torch.equal(drawn, sample(use_cache=False))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_may_come_in_pieces(models, chunk):
    model = models[1]
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (33, 20)])
    whole = run(model, ids, attention_mask=mask)
    assert torch.equal(whole, run(model, ids, attention_mask=mask, prefill_chunk_size=chunk))


def test_a_conversation_goes_on_from_its_cache(models):
    model = models[1]
    ids, mask = left_padded([tokens(1, n, seed=n)[0] for n in (14, 9)])
    first = run(model, ids, attention_mask=mask, return_dict_in_generate=True)
    seen = first.past_key_values.get_seq_length()
    assert seen == first.sequences.shape[1] - 1
    longer = torch.cat((first.sequences, tokens(2, 6, seed=5)), 1)
    mask = torch.nn.functional.pad(mask, (0, longer.shape[1] - mask.shape[1]), value=1)
    alone = run(model, longer, attention_mask=mask)
    assert torch.equal(alone, run(model, longer, attention_mask=mask, past_key_values=first.past_key_values))


def test_an_own_cache_may_be_brought(models):
    model = models[1]
    cache = WhimbrelCache(model.config)
    ids = tokens(1, 6)
    assert torch.equal(run(model, ids, past_key_values=cache), run(model, ids))
    assert cache.get_seq_length() == 6 + NEW - 1


def test_rows_of_a_cache_are_repeated_and_chosen(models):
    model = models[1]
    ids = tokens(2, 9)
    cache = model(ids).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    with torch.no_grad():
        got = model(tokens(2, 1, seed=3), past_key_values=cache).logits
        expected = model(torch.cat((ids[[1, 0]], tokens(2, 1, seed=3)), 1)).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}])
def test_assisted_decoding_is_refused_by_name(options):
    _, model = pair()
    options = {key: model if value is None else value for key, value in options.items()}
    with pytest.raises(ValueError, match=r"assisted generation is not supported .* such as WhimbrelForCausalLM"):
        run(model, tokens(1, 8), **options)


def test_assisted_decoding_serves_models_without_a_recurrent_state():
    _, model = pair(MODELS["softmax"])
    ids = tokens(1, 8).repeat(1, 3)
    # Without an end token 5.6.2 fails here for any model.
    assert torch.equal(run(model, ids, prompt_lookup_num_tokens=2, eos_token_id=0), run(model, ids, eos_token_id=0))


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_other_caches_are_refused_by_name(kind):
    _, model = pair()
    with pytest.raises(UnsupportedError, match=f"cache_implementation = '{kind}' is not available"):
        run(model, tokens(1, 8), cache_implementation=kind)


def test_padding_on_the_right_is_refused():
    _, model = pair()
    with pytest.raises(UnsupportedError, match="pad on the left"):
        run(model, tokens(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_either_name(name):
    """transformers calls it `cache` since 5.24; both are ours at any version."""
    _, model = pair()
    ids = tokens(1, 9)
    cache = WhimbrelCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], **{name: cache})
        out = model(ids[:, 5:], **{name: cache})
        torch.testing.assert_close(out.logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)
    assert out[CACHE_NAME] is cache
    with pytest.raises(UnsupportedError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=cache)


def test_generation_raises_no_warning_of_names_that_go(caplog, capfd):
    """A model with the cache under another name than the library's was warned about at each token."""
    _, model = pair()
    first = run(model, tokens(1, 9), return_dict_in_generate=True)
    model.train()(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    run(model.eval(), tokens(2, 5), num_beams=2)
    assert first[CACHE_NAME].get_seq_length() == 9 + NEW - 1
    said = caplog.text + "".join(capfd.readouterr())
    assert "past_key_values" not in said


def test_blocks_that_run_twice_write_to_no_cache():
    _, model = pair()
    ids = tokens(1, 9)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    cache = WhimbrelCache(model.config)
    out = model(ids, labels=ids, use_cache=True, **{CACHE_NAME: cache})
    out.loss.backward()
    assert cache.get_seq_length() == 0
    assert out.get(CACHE_NAME) is None
