"""Text from a prompt with images: one pass over the prompt, then token by token from a KV cache.

All of it is one compiled function, so the cache is never copied in or out. A row's text depends on
nothing but that row: neither on its padding nor, when drawn, on its neighbours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import InputError

LOW = -1e30  # what is allowed is never scored below this, what is not is -inf


def generate(model, params, tokens, mask, image, *, steps, stop, key=None, temperature=1.0,
             top_k=0, top_p=1.0, allowed=None):
    """Read prompts and write on.

    Args:
      model: a VLM. params: its parameters, or variables {'params': ..., 'lora': ...}.
      tokens: int32 [B, S], prompts with placeholders for images. mask: bool [B, S], what is there:
        padding may stand anywhere, though the left costs nothing more. A row with nothing there is
        not written to.
      image: uint8 [B, n, side, side, 3], in the order of the placeholders; n may be 0.
      steps: most tokens of a text. stop: the tokens that end one, () for none.
      key: a key of jax.random, from which every row gets its own by its number, or one key per row
        [B]; None takes the likeliest token.
      temperature, top_k, top_p: what a token is drawn from: all logits are divided by temperature,
        then the k likeliest stay (0: all), then the likeliest that reach probability p together;
        equally likely ones stay together. Without a key they do nothing.
      allowed: a trie.Trie; texts are then whole titles of its catalogue and nothing else.

    Returns:
      tokens int32 [B, steps], each row ended by its stop token, -1 behind it; float32 [B], the sum
      of its tokens' log probabilities, that of the stop token included. These are the model's own
      (not tempered, not cut), among the allowed tokens where a trie is given: then the
      probabilities of all titles sum to 1.

    Raises:
      InputError: a prompt whose placeholders fit no whole images, parameters without an output
        embedding, numbers out of range, or a trie of another vocabulary, with other stop tokens or
        with titles longer than `steps`.
    """
    stop = tuple(int(t) for t in stop)
    variables = params if 'params' in params else {'params': params}
    _check_images(model, np.asarray(tokens), np.asarray(mask, bool), image)
    _check(model, variables, steps, stop, temperature, top_k, top_p, allowed)
    if key is None:
        temperature, top_k, top_p = 1.0, 0, 1.0  # so that they compile nothing anew
    return _run(model, variables, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool), image,
                key, temperature, allowed, steps=steps, stop=stop, top_k=top_k, top_p=top_p)


def _check_images(model, tokens, mask, image):
    """Too many placeholders would repeat an image's last token, too few would cut it."""
    each, most = model.spec.image_tokens(model.side), image.shape[1]
    found = ((tokens == model.spec.image_id) & mask).sum(axis=1)
    for row in np.flatnonzero((found % each > 0) | (found > each * most))[:1]:
        raise InputError(f'prompt {row} has {found[row]} image placeholders; give {each} for each '
                         f'of at most {most} image(s), see data.prompts.expand')


def _check(model, variables, steps, stop, temperature, top_k, top_p, allowed):
    decoder = model.spec.decoder
    if not decoder.tied and 'head' not in variables['params']:
        raise InputError('the checkpoint has no output embedding (lm_head), so it can encode but '
                         'not generate; take one saved with it')
    for name, value, right, rule in (
            ('steps', steps, steps >= 1, 'at least 1'),
            ('temperature', temperature, temperature > 0, 'above 0; greedy is key=None'),
            ('top_k', top_k, top_k >= 0, '0 for all tokens, or more'),
            ('top_p', top_p, 0 < top_p <= 1, 'above 0 and at most 1')):
        if not right:
            raise InputError(f'{name}={value}: must be {rule}')
    if allowed is None:
        return
    if allowed.vocab != decoder.vocab or set(allowed.stop) != set(stop):
        raise InputError(f'the trie was built for a vocabulary of {allowed.vocab} and stop tokens '
                         f'{allowed.stop}, generation has {decoder.vocab} and {stop}; build it '
                         'with these')
    if steps < allowed.depth:
        raise InputError(f'steps={steps}: the longest title takes {allowed.depth} tokens with its '
                         'stop token; allow as many')


@partial(jax.jit, static_argnames=('model', 'steps', 'stop', 'top_k', 'top_p'))
def _run(model, variables, tokens, mask, image, key, temperature, allowed, *, steps, stop, top_k,
         top_p):
    batch, length = tokens.shape
    if key is not None and key.ndim == 0:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))

    def choose(count, logits, live, node):
        """Token number `count` [B], its log probability [B]."""
        may = None if allowed is None else allowed.allowed(node) | ~live[:, None]
        own = jax.nn.log_softmax(_only(logits, may))
        if key is None:
            token = own.argmax(-1)
        else:
            left = cut(_only(logits / temperature, may), top_k, top_p)
            token = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, count), x))(
                key, left)
        return token.astype(jnp.int32), jnp.take_along_axis(own, token[:, None], -1)[:, 0]

    def write(count, logits, live, node, out, score):
        """The state with one token more."""
        token, gain = choose(count, logits, live, node)
        out = out.at[:, count].set(jnp.where(live, token, -1))
        score = score + jnp.where(live, gain, 0)
        if allowed is not None:
            node = jnp.where(live, allowed.advance(node, token), node)
        live &= ~jnp.isin(token, jnp.array(stop, jnp.int32))
        return count + 1, live, node, out, score

    def more(state):
        (count, live, *_), _ = state
        return (count < steps) & live.any()

    def step(state):
        (count, live, node, out, score), cache = state
        logits, cache = model.apply(variables, jnp.maximum(out[:, count - 1], 0), live, cache,
                                    length + count - 1, method=_read_on)
        return write(count, logits, live, node, out, score), cache

    logits, cache = model.apply(variables, tokens, mask, image, steps, method=_read)
    state = write(jnp.int32(0), logits, mask.any(1), jnp.zeros(batch, jnp.int32),
                  jnp.full((batch, steps), -1, jnp.int32), jnp.zeros(batch))
    (_, _, _, out, score), _ = jax.lax.while_loop(more, step, (state, cache))
    return out, score


def _read(model, tokens, mask, image, steps):
    """Whole prompts -> logits [B, V] behind each one's last token, cache with room for `steps`."""
    batch, length = tokens.shape
    h, cache = model.decode(model.prompt(tokens, mask, image),
                            model.empty_cache(batch, length + steps), 0)
    last = length - 1 - mask[:, ::-1].argmax(1)
    return model.logits(jnp.take_along_axis(h, last[:, None, None], 1)[:, 0]), cache


def _read_on(model, token, live, cache, index):
    """One token [B] more -> logits [B, V] behind it, cache."""
    h, cache = model.decode(model.say(token[:, None], live[:, None]), cache, index)
    return model.logits(h[:, 0]), cache


def _only(x, may):
    # an allowed token beats every other one, even if the model has gone to -inf or nan
    return x if may is None else jnp.where(may, jnp.maximum(x, LOW), -jnp.inf)


def cut(x, top_k, top_p):
    """Logits [B, V] with -inf for what is not among the k likeliest, then the likeliest p."""
    # written so that nan, which compares as false, stays
    if 0 < top_k < x.shape[-1]:
        x = jnp.where(x < jax.lax.top_k(x, top_k)[0][:, -1:], -jnp.inf, x)
    if top_p < 1:
        ordered = jnp.sort(x, descending=True)
        p = jax.nn.softmax(ordered)
        least = jnp.where(jnp.cumsum(p, -1) - p < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        x = jnp.where(x < least, -jnp.inf, x)
    return x
