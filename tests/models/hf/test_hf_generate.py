"""Generation against torch's, against a full forward pass per token, and against the catalogue."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity_torch
from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.models.hf import generate as generation, load, spec as specs, vlm
from tpad_jax.models.hf.generate import Sampling, generate
from tpad_jax.models.hf.trie import build
from tpad_jax.nn import linear

BAR = 3e-5
STEPS, EXTRA = 18, 6  # tokens written; room in the prompts beyond the longest
END, STOP = 303, (303, 301)


@pytest.fixture(scope='session')
def case(tmp_path_factory):
    """name -> model, parameters, prompts of 0, 1 and 2 images, torch's greedy tokens."""
    @cache
    def made(name):
        # a seed by which texts repeat themselves little
        directory = tiny_hf.save(name, tmp_path_factory.mktemp(name), seed=2)
        spec, side = specs.read(directory), tiny_hf.side(name)
        words = parity_torch.words(directory, spec)
        given = parity_torch.prompt(spec, side, left=True, words=words,
                                    images=tiny_hf.images(3, side))
        theirs = parity_torch.load(directory, 'float32')
        chosen = parity_torch.greedy(
            theirs, parity_torch.keywords(theirs, directory, given, spec), STEPS)
        return vlm.VLM(spec, side), load.load(directory, spec, dtype='float32'), given, chosen

    return made


@pytest.fixture(scope='session')
def small(case):
    """A model, its parameters, short prompts without images [4, 5]."""
    model, params, *_ = case('llava')
    tokens = np.random.default_rng(0).integers(0, 256, (4, 5)).astype(np.int32)
    return model, params, tokens


def laid(given, holes):
    """A prompt in S + EXTRA places: on the right, or anywhere but in the last two."""
    rows, length = given.tokens.shape[0], given.tokens.shape[1] + EXTRA
    tokens, mask = np.full((rows, length), 7, np.int32), np.zeros((rows, length), bool)
    random = np.random.default_rng(3)
    for b in range(rows):
        count = given.mask[b].sum()
        at = slice(length - count, None)
        if holes:
            at = np.sort(random.permutation(length - 2)[:count])
        tokens[b, at], mask[b, at] = given.tokens[b][given.mask[b]], True
    return tokens, mask, given.image


def text(tokens, count=1):
    """Prompts without images, each `count` times: tokens, mask, image."""
    tokens = np.repeat(tokens, count, axis=0)
    return tokens, np.ones(tokens.shape, bool), np.zeros((len(tokens), 0, 32, 32, 3), np.uint8)


@partial(jax.jit, static_argnums=0)
def whole(model, params, tokens, mask, image):
    """Logits of a full forward pass, without a cache."""
    return model.apply({'params': params}, tokens, mask, image,
                       method=lambda m, *prompt: m.logits(m(m.prompt(*prompt))))


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(np.asarray(x, np.float64)))


# ---- against torch and against a forward pass per token

@pytest.mark.parametrize('name', ['qwen3_vl', 'llava'])  # tests of golden files have all
def test_greedy_tokens_are_torchs(case, name):
    model, params, given, chosen = case(name)
    for holes in (False, True):
        found, _ = generate(model, params, laid(given, holes), steps=STEPS, stop=())
        np.testing.assert_array_equal(found, chosen)


@pytest.mark.parametrize('name', ['qwen3_vl'])
def test_a_cache_changes_nothing(case, name):
    model, params, given, chosen = case(name)
    tokens, mask, image = laid(given, True)
    longer = np.concatenate([tokens, chosen], 1), np.pad(mask, ((0, 0), (0, STEPS)),
                                                         constant_values=True)
    uncached = np.asarray(whole(model, params, *longer, image))[:, tokens.shape[1]:-1]

    @jax.jit
    def cached(params):
        read_on = partial(model.apply, {'params': params}, method=generation._read_token)
        live = jnp.ones(len(tokens), bool)
        first, cache = model.apply({'params': params}, tokens, mask, image, STEPS,
                                   method=generation._read)

        def step(carry, token):
            cache, index = carry
            logits, cache = read_on(token, live, cache, index)
            return (cache, index + 1), logits

        _, rest = jax.lax.scan(step, (cache, tokens.shape[1]), chosen[:, :-1].T)
        return first, rest.swapaxes(0, 1)

    first, rest = cached(params)
    np.testing.assert_allclose(rest, uncached, rtol=0, atol=BAR)
    # and what generate says of its texts is the sum of these
    each = np.concatenate([log_softmax(first)[:, None], log_softmax(uncached)], 1)
    _, score = generate(model, params, (tokens, mask, image), steps=STEPS, stop=())
    np.testing.assert_allclose(score, np.take_along_axis(each, chosen[..., None], -1).sum((1, 2)),
                               atol=STEPS * BAR)


@pytest.mark.slow
def test_rows_do_not_know_each_other(case):
    model, params, given, _ = case('qwen3_vl')
    tokens, mask, image = laid(given, False)
    mask[2], key = False, jax.random.split(jax.random.key(5), 3)
    write = partial(generate, model, params, steps=STEPS, stop=STOP, sampling=Sampling(1.5))
    together, score = write((tokens, mask, image), key=key)
    assert (np.asarray(together)[2] == -1).all()  # a row of padding only
    assert score[2] == 0
    for b in range(2):
        one = slice(b, b + 1)
        alone, own = write((tokens[one], mask[one], image[one]), key=key[one])
        np.testing.assert_array_equal(alone[0], together[b])
        np.testing.assert_allclose(own[0], score[b], atol=1e-3)


def test_stop_tokens(case, monkeypatch):
    model, params, given, chosen = case('llava')
    ran, read_on = [], generation._read_token

    def counted(*args):
        jax.debug.callback(lambda: ran.append(1))
        return read_on(*args)

    monkeypatch.setattr(generation, '_read_token', counted)
    stop = tuple(int(t) for t in (chosen[0, 13], chosen[1, 7], chosen[2, 2]))
    found, _ = generate(model, params, laid(given, False), steps=STEPS, stop=stop)
    jax.effects_barrier()
    last = np.isin(chosen, stop).argmax(1)
    np.testing.assert_array_equal(last, [13, 7, 2])
    np.testing.assert_array_equal(
        found, np.where(np.arange(STEPS) <= last[:, None], chosen, -1))
    assert len(ran) == last.max()  # nothing is computed behind the last row's end


def test_adapters_are_those_of_the_merged_kernels(small):
    model, params, tokens = small
    adapter = linear.init(jax.random.key(0), {'decoder': params['decoder']}, rank=2,
                        targets='attention/[qv]$')
    pair = adapter['decoder']['layers']['attention']
    pair['q']['b'] = 0.5 * jax.random.normal(jax.random.key(1), pair['q']['b'].shape)
    merged = jax.tree.map(lambda x: x, params)
    q = merged['decoder']['layers']['attention']['q']
    q['kernel'] = q['kernel'] + pair['q']['a'] @ pair['q']['b']
    write = partial(generate, model, steps=STEPS, stop=STOP)
    plain, _ = write(params, text(tokens))
    expected, score = write({'params': merged}, text(tokens))
    found, own = write({'params': params, 'lora': adapter}, text(tokens))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(own, score, atol=1e-3)
    assert (np.asarray(plain) != expected).any()


# ---- sampling

def surprise(counts, p):
    """Chi-square statistic over its degrees of freedom; about 1 if counts are drawn from p."""
    expected, few = counts.sum() * p, counts.sum() * p < 5
    assert (counts[p == 0] == 0).all()
    cells = [(counts[~few], expected[~few])]
    if expected[few].sum() > 1:
        cells.append((counts[few].sum(keepdims=True), expected[few].sum(keepdims=True)))
    seen, hoped = map(np.concatenate, zip(*cells, strict=True))
    return ((seen - hoped) ** 2 / hoped).sum() / max(len(seen) - 1, 1)


def shortened(p, top_k, top_p):
    """What a distribution [V] becomes, in plain words."""
    order = np.argsort(-p)
    if top_k:
        order = order[:top_k]
    q = p[order] / p[order].sum()
    order = order[:np.searchsorted(np.cumsum(q), top_p) + 1]
    out = np.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


@pytest.mark.slow
def test_draws_are_as_frequent_as_likely(small):
    model, params, tokens = small
    top_k, top_p = 12, 0.8  # draws of all tokens: test_samples_are_titles_as_often_as_likely
    logits = np.asarray(whole(model, params, *text(tokens)))[:, -1]
    found, score = generate(model, params, text(tokens[:1], 4000), steps=1, stop=(),
                            key=jax.random.key(11), sampling=Sampling(0.7, top_k, top_p))
    p = shortened(np.exp(log_softmax(logits[0] / 0.7)), top_k, top_p)
    counts = np.bincount(np.asarray(found)[:, 0], minlength=len(p))
    assert surprise(counts, p) < 1.6
    assert surprise(counts, shortened(np.exp(log_softmax(logits[0])), top_k, top_p)) > 2.5
    np.testing.assert_allclose(score, log_softmax(logits[0])[np.asarray(found)[:, 0]], atol=BAR)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize(('top_k', 'top_p'), [(3, 1.0), (0, 0.5), (0, 0.95), (8, 0.6), (1, 0.01)])
def test_what_is_cut(seed, top_k, top_p):
    x = np.random.default_rng(seed).normal(size=(5, 40)).astype(np.float32) * 3
    kept = np.isfinite(generation.cut(jnp.array(x), top_k, top_p))
    for row, p in zip(kept, np.exp(log_softmax(x)), strict=True):
        np.testing.assert_array_equal(row, shortened(p, top_k, top_p) > 0)


# ---- a catalogue

@pytest.fixture(scope='module')
def catalogue():
    """Titles that share beginnings; some are the beginning of others, some are twice there."""
    random = np.random.default_rng(1)
    titles = [random.integers(0, 12, random.integers(1, 6)).tolist() for _ in range(300)]
    titles += [*titles[:20], titles[0]]
    return titles, build(titles, stop=STOP, vocab=tiny_hf.VOCAB, items=1000 + np.arange(321))


def children(titles, begun):
    """Tokens behind the beginning `begun`, by looking at every title."""
    begun = list(begun)
    return {[*t, END][len(begun)] for t in titles if [*t, END][:len(begun)] == begun
            and len(t) >= len(begun)}


def held(titles, row):
    """Item ids of a text, by looking at every title."""
    return [1000 + i for i, t in enumerate(titles) if [*t, END] == row[:len(t) + 1].tolist()
            and (row[len(t) + 1:] == -1).all()]


def test_every_beginning_is_followed_by_its_children(catalogue):
    titles, trie = catalogue
    node, tokens = {(): 0}, [*range(12), *STOP]
    step = jax.jit(lambda node, token: (trie.advance(node, token), trie.allowed(node)))
    for length in range(trie.depth):
        begun = sorted(b for b in node if len(b) == length)
        at = np.zeros((320, len(tokens)), np.int32)  # one shape for all levels
        at[:len(begun)] = np.array([node[b] for b in begun])[:, None]
        after, allowed = step(at.ravel(), np.tile(np.array(tokens, np.int32), 320))
        after, allowed = np.asarray(after).reshape(at.shape), np.asarray(allowed)[::len(tokens)]
        for b, row, may in zip(begun, after, allowed, strict=False):
            right = children(titles, b)
            assert set(np.flatnonzero(may)) == right
            assert {t for t, n in zip(tokens, row, strict=True) if n < len(trie.first) - 2} == right
            node |= {(*b, t): n for t, n in zip(tokens, row, strict=True) if t in right}
    assert sorted(node.values()) == list(range(len(trie.first) - 2))
    ended = np.array([n for b, n in node.items() if b[-1:] == (END,)])
    lost = np.append(ended, len(trie.first) - 2)
    assert not trie.allowed(lost).any()
    assert (trie.advance(lost, np.zeros(len(lost), np.int32)) == len(trie.first) - 2).all()


def test_items_of_texts(catalogue):
    titles, trie = catalogue
    rows = np.full((len(titles) + 4, trie.depth + 1), -1)
    for row, title in zip(rows, titles, strict=False):
        row[:len(title) + 1] = [*title, END]
    rows[-4:-1, :2] = [[11, 300], [301, -1], [END, -1]]
    longest = max(titles, key=len)
    rows[-1, :len(longest)] = longest
    found = trie.items(rows)
    assert [list(f) for f in found[:-4]] == [held(titles, row) for row in rows[:-4]]
    assert list(found[0]) == [1000, 1300, 1320]
    assert not any(map(len, found[-4:]))


def test_a_large_catalogue_takes_little():
    random, vocab = np.random.default_rng(0), 151_936
    titles = random.integers(0, 150_000, (5_000, 9))
    titles[:, 0] %= 500
    trie = build(titles, stop=(151_645,), vocab=vocab)
    assert sum(x.nbytes for x in jax.tree.leaves(trie)) < 16 * titles.size
    node = jnp.zeros(4, jnp.int32)
    for token in titles[100:104].T:
        assert np.asarray(trie.allowed(node))[np.arange(4), token].all()
        node = trie.advance(node, token)
    assert [set(np.flatnonzero(row)) for row in trie.allowed(node)] == [{151_645}] * 4


def test_greedy_takes_the_likeliest_child(small, catalogue):
    model, params, tokens = small
    titles, trie = catalogue
    out, score = map(np.asarray, generate(model, params, text(tokens), steps=trie.depth, stop=STOP,
                                          allowed=trie))
    longer = np.concatenate([tokens, np.maximum(out, 0)], 1)
    logits = np.asarray(whole(model, params, *text(longer)))[:, tokens.shape[1] - 1:]
    for b, row in enumerate(out):
        assert held(titles, row)
        total = 0
        for i, token in enumerate(row[:list(row).index(END) + 1]):
            may = sorted(children(titles, row[:i]))
            assert token == may[logits[b, i, may].argmax()]
            total += logits[b, i, token] - np.logaddexp.reduce(logits[b, i, may])
        np.testing.assert_allclose(score[b], total, atol=trie.depth * BAR)
    assert logits[0, 0].argmax() not in children(titles, [])  # the model had other plans


@pytest.mark.slow
def test_samples_are_titles_as_often_as_likely(small, catalogue):
    model, params, tokens = small
    titles, trie = catalogue
    # every title's probability, from a forward pass over each
    each = sorted({tuple(t) for t in titles})
    told = np.zeros((len(each), trie.depth), np.int32)
    for row, t in zip(told, each, strict=True):
        row[:len(t) + 1] = [*t, END]
    prompts = np.concatenate([np.repeat(tokens[:1], len(each), 0), told], 1)
    logits = np.asarray(whole(model, params, *text(prompts)))[:, tokens.shape[1] - 1:]
    p = np.zeros(len(each))
    for n, t in enumerate(each):
        for i, token in enumerate([*t, END]):
            may = sorted(children(titles, t[:i]))
            p[n] += logits[n, i, token] - np.logaddexp.reduce(logits[n, i, may])
    p = np.exp(p)
    assert abs(p.sum() - 1) < 1e-4

    write = partial(generate, model, steps=trie.depth, stop=STOP, allowed=trie)
    counts, many = np.zeros(len(each)), text(tokens[:1], 1000)
    number = {t: n for n, t in enumerate(each)}
    for seed in range(3):
        out, score = map(np.asarray, write(params, many, key=jax.random.key(seed)))
        assert all(map(len, trie.items(out)))
        which = [number[tuple(row[:list(row).index(END)])] for row in out]
        np.testing.assert_allclose(score, np.log(p[which]), atol=trie.depth * BAR)
        np.add.at(counts, which, 1)
    assert surprise(counts, p) < 1.6
    # even a model that has diverged names what there is
    lost = {**params, 'embed': {'embedding': params['embed']['embedding'] * np.nan}}
    for given, temperature in ((lost, 1.0), (params, 1e-30)):
        out, _ = write(given, many, key=jax.random.key(0), sampling=Sampling(temperature))
        assert all(map(len, trie.items(out)))


@pytest.mark.parametrize(('titles', 'options', 'says'), [
    ([], {}, '0 titles'),
    ([[1], []], {'items': [7, 8]}, 'item 8 has an empty title'),
    ([[1], [2, 301, 3]], {'items': [7, 8]}, 'item 8 has token 301.* stop tokens'),
    ([[1, 320]], {}, 'item 0 has token 320. Expected ids 0 to 319'),
    ([[1], [4, -1]], {}, 'item 1 has token -1'),
    ([[1]], {'items': [1, 2]}, '1 titles for 2 items'),
    ([[1]], {'stop': ()}, r'stop=\(\): .*at least one id'),
    ([[1]], {'stop': (320,)}, r'stop=\(320,\)'),
])
def test_refused_catalogues(titles, options, says):
    with pytest.raises(InputError, match=says):
        build(titles, **{'stop': STOP, 'vocab': tiny_hf.VOCAB, **options})


@pytest.mark.parametrize(('options', 'says'), [
    ({'steps': 0}, 'steps=0'), ({'sampling': Sampling(0.0)}, 'key=None'),
    ({'sampling': Sampling(top_k=-1)}, 'top_k=-1'), ({'sampling': Sampling(top_p=0.0)}, 'top_p=0'),
    ({'stop': (3,)}, 'stop tokens'), ({'steps': 5}, '6 tokens'),
    ({'allowed': build([[1]], stop=STOP, vocab=400)}, 'vocabulary of 400'),
])
def test_refused_options(small, catalogue, options, says):
    model, params, tokens = small
    with pytest.raises(InputError, match=says):
        generate(model, params, text(tokens), **{
            'steps': 6, 'stop': STOP, 'key': jax.random.key(0), 'allowed': catalogue[1], **options})
    headless = {k: v for k, v in params.items() if k != 'head'}
    with pytest.raises(InputError, match='no output embedding'):
        generate(model, headless, text(tokens), steps=3, stop=STOP)


@pytest.mark.parametrize(('row', 'change', 'most'), [(2, 1, 2), (1, -1, 2), (2, 0, 1)])
def test_placeholders_that_fit_no_whole_images_are_refused(case, row, change, most):
    model, params, given, _ = case('qwen3_vl')
    tokens, count = given.tokens.copy(), model.spec.image_tokens(model.side)
    if change < 0:
        tokens[row, np.flatnonzero(tokens[row] == model.spec.image_id)[0]] = 5
    elif change:
        tokens[row, -1] = model.spec.image_id
    with pytest.raises(InputError, match=f'prompt {row} has {row * count + change} image place'):
        generate(model, params, (tokens, given.mask, given.image[:, :most]), steps=2, stop=STOP)
