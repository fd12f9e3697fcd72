"""Pretrain the small default base: `python -m tpad_jax.pretrain --out=DIR`.

A real MLLM cannot be trained in minutes. This base learns once, from single random items of the
planted kind: images, texts and questions about attributes. Its random streams are used by no
catalogue. So it knows what items are, as a real MLLM does, and no transition between items.

A question gives the writer the name of an attribute, never a value; the writer answers from the
features alone. The questions of an item come in random order. Every eighth step it writes the
item's text instead. Words and whole modalities are withheld from the reader.
"""

import re
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpad_jax.core import cli, startup
from tpad_jax.data import images, text
from tpad_jax.data.synthetic import rendering, wording
from tpad_jax.models.builtin import files
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.mllms import KnowledgeMLLM

STREAM = 2**40  # a seed that no catalogue uses: theirs are [seed, 1..7] below 2^32
SIZES = {'vocab': 1280, 'heads': 4, 'channels': [32, 64, 128], 'vision_layers': 2}
IMAGE, TEXT, FEATURES = 32, 32, 64
CAPTION = 2 * len(wording.ATTRIBUTES)  # tokens: name, value, name, value, ...


def make_items(count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw random items.

    Args:
      count: number of items.

    Returns:
      int32 [count, attributes], uint8 [count, 32, 32, 3] decoded from JPEG, and texts.
    """
    rng = np.random.default_rng([STREAM, 0])
    attributes = np.stack([rng.integers(0, n, count) for n in wording.SIZES], 1).astype(np.int32)
    titles, brands, descriptions = wording.texts(attributes, rng)
    texts = ['. '.join(filter(None, parts))
             for parts in zip(titles, brands, descriptions, strict=True)]
    pictures = np.empty((count, IMAGE, IMAGE, 3), np.uint8)
    for start in range(0, count, 1024):
        for i, picture in enumerate(rendering.render(attributes[start:start + 1024], rng), start):
            encoded = images.encode(picture, 'JPEG', quality=90)
            pictures[i] = np.asarray(images.decode(encoded, IMAGE))
    return attributes, pictures, texts


def shuffled_captions(attributes: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Write the captions of items with their clauses (name, value) in random order."""
    clauses = (re.findall(r'\S+ \S+', caption) for caption in wording.caption(attributes))
    return [' '.join(rng.permutation(of_item)) for of_item in clauses]


def objective(model: KnowledgeMLLM, params: dict, key: jax.Array, image: jax.Array,
              tokens: jax.Array, target: jax.Array, questions: bool) -> jax.Array:
    """Compute the mean cross entropy of a target text, from features of a partly withheld item.

    Args:
      model: the Knowledge-MLLM.
      params: its parameters.
      key: of all draws.
      image: uint8 [B, 32, 32, 3].
      tokens: int32 [B, T] of the item's text, -1 pads.
      target: int32 [B, L] tokens to write, -1 pads.
      questions: whether `target` is (name, value) pairs. Then names are given and values asked.

    Returns:
      float32 scalar.
    """
    keys = jax.random.split(key, 4)
    rows = image.shape[0]
    has_image = jax.random.bernoulli(keys[0], 0.85, (rows,))
    has_text = jax.random.bernoulli(keys[1], 0.6, (rows,)) | ~has_image
    keep = jax.random.bernoulli(keys[2], 0.8, tokens.shape) & has_text[:, None]
    if questions:
        given = jnp.broadcast_to(jnp.arange(target.shape[1]) % 2 == 0, target.shape)
        weight = ~given
    else:
        given = jax.random.bernoulli(keys[3], 0.4, target.shape)
        weight = target >= 0
    k = model.apply({'params': params}, image, has_image, tokens, keep)
    hidden = model.apply({'params': params}, k, target, given, method='describe')
    logits = hidden @ params['base']['embed']['embedding'].T
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return (loss * weight).sum() / weight.sum()


@cli.command('tpad_jax.pretrain', 'Pretrains the small default base.', {
    '--out': dict(type=Path, default=files.DEFAULT, metavar='DIR', help='directory to write'),
    '--items': dict(type=cli.number(int, 1), default=24_000, help='random items to learn from'),
    '--steps': dict(type=cli.number(int, 1), default=700, help='training steps'),
    '--batch': dict(type=cli.number(int, 1), default=128, help='items per step'),
    '--lr': dict(type=cli.number(float, 0, 1e9), default=2e-3, help='peak learning rate'),
    '--width': dict(type=cli.number(int, 8), default=128, help='of the decoder, 8 n'),
    '--layers': dict(type=cli.number(int, 1), default=2, help='of the decoder'),
})
def main(args) -> None:
    """Make the items, train the tokenizer and the model, write the directory."""
    startup.check_environment()
    attributes, pictures, texts = make_items(args.items)
    rng = np.random.default_rng([STREAM, 1])
    captions = shuffled_captions(attributes, rng)
    text.train_tokenizer([*texts, *captions], args.out, SIZES['vocab'])
    tokens = text.tokenize(['', *texts], args.out, TEXT)[1:]
    answers = text.tokenize(['', *captions], args.out, CAPTION + 1)[1:]
    assert ((answers >= 0).sum(1) == CAPTION).all()  # every word is one token
    answers = answers[:, :CAPTION]
    sizes = {**SIZES, 'width': args.width, 'layers': args.layers, 'hidden': 2 * args.width}
    model = KnowledgeMLLM(MLLM(**{**sizes, 'channels': tuple(sizes['channels'])}), FEATURES)
    params = nn.unbox(jax.jit(partial(model.init, method='everything'))(
        jax.random.key(0), pictures[:1], np.ones(1, bool), tokens[:1])['params'])
    schedule = optax.warmup_cosine_decay_schedule(0, args.lr, args.steps // 8, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(schedule, weight_decay=0.02))
    opt_state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1), static_argnames='questions')
    def step(params, opt_state, number, image, tokens, target, questions):
        key = jax.random.fold_in(jax.random.key(1), number)
        loss, grads = jax.value_and_grad(partial(objective, model))(
            params, key, image, tokens, target, questions)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    started = time.time()
    for number in range(args.steps):
        rows = rng.integers(0, args.items, args.batch)
        questions = number % 8 != 7
        target = answers[rows] if questions else tokens[rows]
        params, opt_state, loss = step(params, opt_state, number, pictures[rows], tokens[rows],
                                       target, questions)
        if number % 100 == 98 or number + 1 == args.steps:
            print(f'step: {number + 1}  loss: {float(loss):.3f}  time: {time.time() - started:.0f} '
                  's', flush=True)
            readers = {name: tree for name, tree in params.items() if name != 'base'}
            files.save(args.out, {**sizes, 'image_size': IMAGE, 'features': FEATURES},
                       {'base': params['base'], 'knowledge': readers})


if __name__ == '__main__':
    sys.exit(main())
