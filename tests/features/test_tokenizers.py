"""The tokenizer is chosen by measurement, and texts or features that are all alike end the run."""

import numpy as np
import pytest

from configs import amazon
from tests.data.sources.test_amazon import item18, review18, write18
from tpad_jax.data import sources, text
from tpad_jax.errors import InputError
from tpad_jax.features import bases, tokenizers
from tpad_jax.job import job
from tpad_jax.models.builtin import files

TITLES = ('<span class="a-size-medium a-color-secondary"', '#productTitle {', '&nbsp;-',
          'var aPageStart = (new Date()).getTime();')
WORDS = 'guitar violin marmalade telescope umbrella notebook scissors thermostat'.split()


def category(folder, describe):
    """A category of 2018 whose titles are debris."""
    folder.mkdir(exist_ok=True)
    items = [f'B{k}' for k in range(40)]
    write18(folder, [item18(asin, title=TITLES[k % 4], category=[], description=[describe(k)])
                     for k, asin in enumerate(items)],
            [review18(f'U{u}', items[(u + step) % 40], 1_529_193_600 + 86_400 * u)
             for u in range(60) for step in range(3)])
    c = amazon.get_config('tiny')
    c.data.update(raw_dir=str(folder), core=1)
    c.stages, c.parallel = 'knowledge', 'jit'
    return c


def different(k):
    return f'{WORDS[k % 8]} with {WORDS[k // 8]} and {WORDS[(k + 3) % 8]} in a sturdy cardboard box'


def test_items_with_debris_titles_are_read_by_their_descriptions(tmp_path):
    c = category(tmp_path / 'raw', different)
    data = sources.load(c, tmp_path)
    assert data.lines['unused'] == {'title_page_code': 40}
    assert len(set(data.texts)) == 41
    own = tmp_path / 'own'
    fitted, where, facts = tokenizers.fitted(c, data.texts, files.DEFAULT, own)
    tokens = text.tokenize(data.texts, where, fitted.mllm.text_length)
    assert len(np.unique(tokens[1:], axis=0)) == 40
    assert (where, fitted.mllm.tokenizer, facts['tokenizer']) == (own, 'own', 'own')
    assert facts['tokens_per_word'] < 1.5
    assert facts['share_that_fit'] == 1
    # what the config sets stays, what it leaves follows the tokenizer
    assert fitted.stage.knowledge.steps == c.stage.knowledge.steps == 8
    assert fitted.stage.knowledge.train == tokenizers.TRAIN
    # 4096 tokens in place of 1280, none of the shipped weights
    base = bases.read(fitted)
    assert (base.module.vocab, base.given, base.load({})) == (4096, (), {})


def test_the_planted_catalogue_keeps_the_shipped_tokenizer(tmp_path):
    c = amazon.get_config('tiny')
    data = sources.load(c, tmp_path)
    fitted, where, facts = tokenizers.fitted(c, data.texts, files.DEFAULT, tmp_path / 'own')
    assert where == files.DEFAULT
    assert facts['tokens_per_word'] == pytest.approx(1.6, abs=0.1)
    assert not (tmp_path / 'own').exists()
    c.mllm.tokenizer = ''
    assert fitted.to_dict() == c.to_dict()  # nothing else follows


@pytest.mark.parametrize('describe', [lambda k: 'A thing of the shop',
                                      lambda k: 40 * 'long ' + str(k)])
def test_a_catalogue_of_equal_texts_is_refused(tmp_path, describe):
    """Whether they are equal, or are so where they are cut."""
    c = category(tmp_path / 'raw', describe)
    run = job.Job(c, tmp_path, lambda: False)
    c.mllm.own.text_length = 32
    with pytest.raises(InputError, match=r'all 40 items have the same text for the tokenizer in '
                       r'.*, cut at 32 tokens: .*Fix: ') as caught:
        run.build(('knowledge',), None)
    assert '\n' not in str(caught.value)


def test_a_feature_that_is_the_same_for_all_items_is_refused():
    rows = np.random.default_rng(0).normal(size=(5, 2, 3))
    tokenizers.check_rows('k', rows, 'texts')
    rows[1:] = rows[1]
    with pytest.raises(InputError, match="feature 'k' is the same for all 4 items: their texts"):
        tokenizers.check_rows('k', rows, 'their texts')
