"""Pretrain the small default base: `python -m tpad_jax.pretrain --out=DIR`.

An MLLM trained from nothing in minutes is no MLLM. This one is taught once, on single items of the
planted kind (images, texts, attribute questions) from random streams that no catalogue uses: it
knows what things are, as a real MLLM does, and nothing of what follows what. Questions come in
random
order: the writer is given the name of an attribute, never a value, and answers from the features
alone. Every eighth step it writes the item's own text. Words and whole modalities are withheld
from the reader.
"""

import io
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from PIL import Image

from tpad_jax.data import images, text
from tpad_jax.data.synthetic import rendering, wording
from tpad_jax.models.builtin import files
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.knowledge import KnowledgeMLLM

FLAGS = flags.FLAGS
STREAM = 2**40  # a seed no catalogue uses: theirs are [seed, 1..7] with small seeds
SIZES = {'vocab': 1280, 'width': 128, 'layers': 2, 'heads': 4, 'hidden': 256,
         'channels': [32, 64, 128], 'vision_layers': 2}
IMAGE, TEXT, FEATURES = 32, 32, 64
CAPTION = 2 * len(wording.ATTRIBUTES)  # tokens: name, value, name, value, ...


def make_items(count):
    """`count` random items: attributes, uint8 images [count, 32, 32, 3] out of JPEG, texts."""
    rng = np.random.default_rng([STREAM, 0])
    attributes = np.stack([rng.integers(0, n, count) for n in wording.SIZES], 1).astype(np.int32)
    titles, brands, descriptions = wording.texts(attributes, rng)
    texts = ['. '.join(p for p in (t, b, d) if p)
             for t, b, d in zip(titles, brands, descriptions, strict=True)]
    pictures = np.empty((count, IMAGE, IMAGE, 3), np.uint8)
    for start in range(0, count, 1024):
        rendered = rendering.render(attributes[start:start + 1024], rng)
        for i, picture in enumerate(rendered, start):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, 'JPEG', quality=90)
            pictures[i] = images.decode(buffer.getvalue(), IMAGE)
    return attributes, pictures, texts


def shuffled_captions(attributes, rng):
    """Captions of all attributes, clauses in random order."""
    out = []
    for caption in wording.caption(attributes):
        words = caption.split()
        clauses = [' '.join(words[i:i + 2]) for i in range(0, len(words), 2)]
        out.append(' '.join(rng.permutation(clauses)))
    return out


def objective(model, params, key, image, tokens, target, questions):
    """Mean cross entropy of the target text given the features of a partly withheld item.

    questions: the target is (name, value) pairs, of which the names are given and the values asked.
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


def main(argv):
    """Make the items, train the tokenizer and the model, write the directory."""
    del argv
    out = Path(FLAGS.out)
    attributes, pictures, texts = make_items(FLAGS.items)
    rng = np.random.default_rng([STREAM, 1])
    questions = shuffled_captions(attributes, rng)
    text.train_tokenizer([*texts, *questions], out, SIZES['vocab'])
    tokens = text.tokenize(['', *texts], out, TEXT)[1:]
    targets = text.tokenize(['', *questions], out, CAPTION + 1)[1:]
    assert ((targets >= 0).sum(1) == CAPTION).all()  # every word is one token
    targets = targets[:, :CAPTION]
    model = KnowledgeMLLM(MLLM(**{**SIZES, 'channels': tuple(SIZES['channels'])}), FEATURES)
    params = nn.unbox(jax.jit(partial(model.init, method='everything'))(
        jax.random.key(0), pictures[:1], np.ones(1, bool), tokens[:1])['params'])
    schedule = optax.warmup_cosine_decay_schedule(0, FLAGS.lr, FLAGS.steps // 8, FLAGS.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))
    opt_state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1), static_argnames='asked')
    def step(params, opt_state, number, image, words, target, asked):
        key = jax.random.fold_in(jax.random.key(1), number)
        loss, grads = jax.value_and_grad(partial(objective, model))(
            params, key, image, words, target, asked)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    started = time.time()
    for number in range(FLAGS.steps):
        rows = rng.integers(0, FLAGS.items, FLAGS.batch)
        asked = number % 8 != 7
        target = targets[rows] if asked else tokens[rows]
        params, opt_state, loss = step(params, opt_state, number, pictures[rows], tokens[rows],
                                       target, asked)
        if number % 100 == 98 or number + 1 == FLAGS.steps:
            print(f'step {number + 1} loss {float(loss):.3f} {time.time() - started:.0f} s',
                  flush=True)
            base = params['base']
            rest = {n: p for n, p in params.items() if n != 'base'}
            sizes = {**SIZES, 'image_size': IMAGE, 'features': FEATURES}
            files.save(out, sizes, {'base': base, 'knowledge': rest})


if __name__ == '__main__':
    flags.DEFINE_string('out', str(files.DEFAULT), 'directory to write')
    flags.DEFINE_integer('items', 24_000, 'random items to learn from')
    flags.DEFINE_integer('steps', 700, 'training steps')
    flags.DEFINE_integer('batch', 128, 'items per step')
    flags.DEFINE_float('lr', 2e-3, 'peak learning rate')
    app.run(main)
