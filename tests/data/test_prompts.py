"""Prompts as the chat templates of `transformers` write them, and what a session's may know."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')

import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs import amazon
from tests import tiny_hf
from tpad_jax.data import prompts
from tpad_jax.data.text import tokenize
from tpad_jax.errors import InputError
from tpad_jax.features import bases
from tpad_jax.models import stream as streams
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.mllms import KnowledgeMLLM, TransferMLLM

QWEN = ('qwen2_vl', 'qwen2_5_vl', 'qwen3_vl')
LONG = 'The red shoe stands on a wooden shelf, Brand: none.'
SIDE, T = 48, 32
quick = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Directories without parameters: sizes, tokenizer and image processor."""
    root = tmp_path_factory.mktemp('saved')

    def save(name):
        directory = root / name
        if not directory.exists():
            for part in tiny_hf.config(name), tiny_hf.processor(name), tiny_hf.make_tokenizer(name):
                part.save_pretrained(directory)
        return directory

    return save


def read(directory, name, **mllm):
    c = amazon.get_config()
    c.mllm.update(checkpoint=str(directory), image_size=tiny_hf.side(name), **mllm)
    return bases.read(c).module


def randomly(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(
        rng.normal(size=x.shape) * (x.shape[-2] if x.ndim > 1 else 4) ** -0.5 + (x.ndim < 2),
        jnp.float32), shapes)


def prompted(module, image, there, tokens):
    """Token ids of what stands in a Knowledge-MLLM's prompts, in lists, and their positions.

    Ids are read off the vectors; a vector of an image is `image_id`.
    """
    reader = KnowledgeMLLM(module, 8, 'last')
    given = image, there, tokens
    shapes = jax.eval_shape(partial(reader.init, method='everything'), jax.random.key(0), *given)
    variables = randomly(shapes)
    caught = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, VLM) and context.method_name == '__call__':
            caught.append(args[0])
            return args[0].x
        return call(*args, **kwargs)

    @quick
    def run(variables, *given):
        caught.clear()
        with nn.intercept_methods(watch):
            reader.apply(variables, *given)
        return caught[0].x, caught[0].mask, streams.positions(caught[0])

    x, mask, positions = map(np.asarray, run(variables, *given))
    table = np.asarray(variables['params']['base']['embed']['embedding'])
    same = (x[:, :, None] == table).all(-1)
    ids = np.where(same.any(-1), same.argmax(-1), module.spec.image_id)
    return ([row[here].tolist() for row, here in zip(ids, mask, strict=True)],
            [row[here] for row, here in zip(positions, mask, strict=True)])


def templated(directory, text, image, module):
    """The same by the tokenizer's chat template: placeholders expanded, the text cut to T."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    content = [{'type': 'image'}] * image + [{'type': 'text', 'text': text}] * bool(text)
    said = tokenizer.apply_chat_template([{'role': 'user', 'content': content}], tokenize=False,
                                         add_generation_prompt=True)
    ids = tokenizer(said, add_special_tokens=False)['input_ids']
    ids = prompts.expand(ids, module.spec.image_id, module.spec.image_tokens(module.side))
    behind = len(ids) - len(module.end)
    cut = max(0, len(tokenizer(text)['input_ids']) - T)
    return ids[:behind - cut] + ids[behind:]


# text, whether an image; the last is too long
ITEMS = [(LONG, True), ('Price: 20', False), ('', True), ('a', True), (LONG + ' ' + LONG, False)]


def given_items(directory, name):
    tokens = tokenize([text for text, _ in ITEMS], directory, T)
    return (tiny_hf.images(len(ITEMS), tiny_hf.side(name)),
            np.array([image for _, image in ITEMS]), tokens)


@pytest.mark.parametrize('name', QWEN)
def test_an_items_prompt_is_the_chat_templates(saved, name):
    directory = saved(name)
    module = read(directory, name)
    found, positions = prompted(module, *given_items(directory, name))
    torch_model = tiny_hf.build(name).model
    cells = SIDE // module.spec.vision.patch
    assert len(module.end) > 1
    for (text, image), own, places in zip(ITEMS, found, positions, strict=True):
        expected = templated(directory, text, image, module)
        assert own == expected
        ids = torch.tensor([expected])
        theirs, _ = torch_model.get_rope_index(
            ids, (ids == module.spec.image_id).int(),
            torch.tensor([[1, cells, cells]]) if image else None)
        np.testing.assert_array_equal(places, theirs[:, 0].T)


def test_llavas_prompt_lacks_the_line_break_behind_an_image(saved):
    directory = saved('llava')
    module = read(directory, 'llava')
    found, positions = prompted(module, *given_items(directory, 'llava'))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    line, = tokenizer('\n')['input_ids']
    for (text, image), own, places in zip(ITEMS, found, positions, strict=True):
        expected = [tokenizer.bos_token_id, *templated(directory, text, image, module)]
        if image:
            behind = len(expected) - expected[::-1].index(module.spec.image_id)
            assert expected.pop(behind) == line
        assert own == expected
        np.testing.assert_array_equal(places, np.arange(len(own))[:, None].repeat(3, axis=1))


@pytest.mark.parametrize('name', ['qwen3_vl', 'llava'])
def test_a_text_that_spells_a_special_token_stays_text(saved, name):
    directory = saved(name)
    spelled = 'A <|im_end|> of <|image_pad|><image> and </s>'
    tokens = tokenize([spelled], directory, 99)[0]
    assert tokens.max() < tiny_hf.BYTES
    assert AutoTokenizer.from_pretrained(directory).decode(tokens[tokens >= 0]) == spelled


def test_the_pieces_of_the_frame_can_be_said(saved):
    directory = saved('qwen3_vl')
    own = prompts.frame(directory, 'qwen3_vl', tiny_hf.VOCAB)
    special = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids
    assert own[0][0] == special('<|im_start|>')
    assert own[2][0] == special('<|im_end|>')
    given = prompts.frame(directory, 'qwen3_vl', tiny_hf.VOCAB, before='<|im_start|>What is ',
                          end='?<|im_end|>')
    assert given[1] == own[1]
    assert given[0][0] == own[0][0]
    assert given[0] != own[0]
    assert given[2][-1] == special('<|im_end|>')


def test_words_beyond_the_embeddings_are_refused(tmp_path):
    words = Tokenizer(models.WordLevel({'?': 0, 'USER': 1, 'zebra': 40}, '?'))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token='?').save_pretrained(tmp_path)
    assert len(prompts.frame(tmp_path, 'llava', 41)) == 3
    with pytest.raises(InputError, match='ids up to 40, the model 40 embeddings'):
        prompts.frame(tmp_path, 'llava', 40)


def test_each_placeholder_becomes_its_images_tokens():
    assert prompts.expand([1, 7, 2, 7], 7, 3) == [1, 7, 7, 7, 2, 7, 7, 7]


# Rows 0 to 2 differ from the second and third position on; row 3 ends behind the first.
SLOTS = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 4], [1, 0, 0], [6, 3, 1]])
MASK = SLOTS > 0


def check_causal(t):
    assert t.shape[:2] == SLOTS.shape
    assert np.isfinite(t).all()
    np.testing.assert_allclose(t[0, :2], t[1, :2], atol=2e-5)
    np.testing.assert_allclose(t[2:4, 0], t[[0, 0], 0], atol=2e-5)
    for one, other, j in ((0, 1, 2), (1, 2, 1), (1, 2, 2), (0, 4, 0), (0, 4, 2)):
        assert np.abs(t[one, j] - t[other, j]).max() > 1e-2  # and what it has read, it knows


@pytest.fixture(scope='module')
def reader(saved):
    """A Transfer-MLLM on a tiny Qwen3-VL, its parameters, and seven items' content.

    Item 2 has no image, item 3 no text, item 6 neither.
    """
    module = read(saved('qwen3_vl'), 'qwen3_vl', between=' Next: ')
    assert len(module.between) > 1
    tokens = tokenize(['', LONG, 'Price: 20', '', 'a lamp', 'a chair', ''], saved('qwen3_vl'), 8)
    there = ~np.isin(np.arange(7), (0, 2, 6))
    content = tiny_hf.images(7, SIDE), there, tokens
    model = TransferMLLM(module, 8)

    def everything(model, k, mask, *content):
        model.unfold(*content)
        return model.everything(k, mask, content[-1])

    shapes = jax.eval_shape(
        partial(model.init, method=everything), jax.random.key(0), jnp.ones((1, 1, 2, 8)),
        jnp.ones((1, 1), bool), *(jnp.asarray(x[:1]) for x in content))
    return model, randomly(shapes), content


@pytest.mark.slow
def test_a_full_session_knows_what_came_before_alone(reader):
    model, variables, (image, there, tokens) = reader

    @quick
    def run(image, tokens):
        def whole(model):
            return model(streams.rows(model.unfold(image, there, tokens), SLOTS), MASK)

        return model.apply(variables, method=whole)

    t = run(image, tokens)
    check_causal(t)
    hidden = image.copy()
    hidden[~there] = 255 - hidden[~there]  # pixels that nobody is to look at
    np.testing.assert_allclose(run(hidden, tokens), t, atol=2e-5)
    other = image.copy()
    other[3] = 255 - other[3]  # read third in row 0, second in row 4
    moved = np.abs(run(other, tokens) - t).max(axis=-1)
    assert (moved > 1e-3)[MASK].tolist() == [*[False] * 2, True, *[False] * 3, *[False] * 3, False,
                                             False, True, True]
    assert moved[MASK].reshape(-1).min() < 2e-5


def test_a_compressed_session_knows_what_came_before_alone(reader):
    model, variables, _ = reader
    k = np.random.default_rng(1).normal(size=(7, 2, 8)).astype(np.float32)

    @quick
    def run(k):
        return model.apply(variables, model.apply(variables, k[SLOTS], method='compress'), MASK)

    t = run(k)
    check_causal(t)
    k[0] += 100  # what fills a row up is not read
    np.testing.assert_allclose(run(k)[MASK], t[MASK], atol=2e-5)
