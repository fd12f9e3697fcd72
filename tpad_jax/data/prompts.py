"""The words around an item's or a session's content, as the chat models were trained with them.

A prompt has three pieces that are tokenised separately: before the content, between items, at the
end. So a long text is cut without cutting the frame, and a text that spells out a special token
does not become one. The pieces follow the model's own chat template, except for the line break that
LLaVA's have after an image and the system's turn that Qwen2-VL's and Qwen2.5-VL's begin with;
`before` can add the latter. A family without an entry in FRAMES reads texts alone. Its pieces are
taken from the chat template itself. A model of the sentence-transformers library, or one without a
template, has the special tokens that its tokenizer adds to a text.
"""

from pathlib import Path

from tpad_jax.data.text import read_tokenizer
from tpad_jax.errors import refuse_if, refusing

MARK = 'qqq'  # in place of the content, where a template is asked for what surrounds it
ENCODER = ('', '', '')  # inside the two special tokens of a text encoder
QWEN = ('<|im_start|>user\n', '\n', '<|im_end|>\n<|im_start|>assistant\n')
FRAMES = {  # before, between, end
    'qwen2_vl': QWEN, 'qwen2_5_vl': QWEN, 'qwen3_vl': QWEN,
    'llava': ('USER: ', '\n', ' ASSISTANT:'),
    'llava_onevision': ('<|im_start|>user ', '\n', '<|im_end|><|im_start|>assistant\n'),
    'smolvlm': ('<|im_start|>User:', '\n', '<end_of_utterance>\nAssistant:'),
    'idefics3': ('User:', '\n', '<end_of_utterance>\nAssistant:'),
    **dict.fromkeys(('bert', 'roberta', 'xlm-roberta'), ENCODER),
}
# before and after an image that is not split, where config.json does not name these tokens
PICTURE = dict.fromkeys(('smolvlm', 'idefics3'), (
    '<fake_token_around_image><global-img>', '<fake_token_around_image>'))


def frame(directory: str | Path, family: str, vocab: int, *, before: str = '', between: str = '',
          end: str = '') -> tuple[tuple[int, ...], ...]:
    """Tokenize the three pieces of a prompt.

    Args:
      directory: of the tokenizer.
      family: see FRAMES. A text encoder has only its class token and its separator.
      vocab: rows of the model's embedding.
      before: text in place of the family's own, where not empty.
      between: text in place of the family's own, where not empty.
      end: text in place of the family's own, where not empty.

    Returns:
      Token ids before the content, between items and at the end.

    Raises:
      InputError: no usable tokenizer, or one that is not the model's.
    """
    tokenizer = read_tokenizer(directory)
    pieces = [tuple(tokenizer(piece or default, add_special_tokens=False)['input_ids'])
              for piece, default in zip((before, between, end), FRAMES.get(family) or _own(
                  tokenizer, directory), strict=True)]
    if FRAMES.get(family) is ENCODER:
        pieces[0] = (tokenizer.cls_token_id, *pieces[0])
        pieces[2] = (*pieces[2], tokenizer.sep_token_id)
    # Llama's sentences begin with it
    if family in ('llava', 'idefics3') and tokenizer.bos_token_id is not None:
        pieces[0] = (tokenizer.bos_token_id, *pieces[0])
    # special tokens that no prompt uses may be beyond; tokens of a text may not
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max((set(tokenizer.get_vocab().values()) - special).union(*pieces))
    refuse_if(largest >= vocab, f'{directory}: the tokenizer has ids up to {largest}, the model '
              f'{vocab} embeddings. Expected one for each. Fix: use the checkpoint\'s tokenizer.')
    return tuple(pieces)


def picture(directory: str | Path, family: str) -> dict[str, tuple[int, ...]]:
    """Tokenize what a family of PICTURE writes before and after an image.

    Args:
      directory: of the tokenizer.
      family: of the model. {} where its config.json names these tokens.

    Returns:
      The fields of a Spec.
    """
    tokenizer = read_tokenizer(directory)
    return {name: tuple(tokenizer(text, add_special_tokens=False)['input_ids'])
            for name, text in zip(('start_ids', 'end_ids'), PICTURE.get(family, ()), strict=False)}


def _own(tokenizer, directory):
    """Return the texts before, between and after a text, by the checkpoint's own files."""
    if tokenizer.chat_template and not (Path(directory) / 'modules.json').is_file():
        # a template may raise anything
        with refusing(Exception, f'{directory}: its chat template writes no prompt', 'Expected one '
                      'that takes the text of a user. Fix: use the original, or remove it'):
            written = tokenizer.apply_chat_template([{'role': 'user', 'content': MARK}],
                                                    tokenize=False, add_generation_prompt=True)
        before, _, end = written.partition(MARK)
    else:
        before, _, end = tokenizer.decode(tokenizer(MARK)['input_ids']).partition(MARK)
        before, end = before.strip(), end.strip()
    return before, '\n', end


def expand(tokens: list[int], image_id: int, per_image: int) -> list[int]:
    """Repeat every image placeholder.

    Args:
      tokens: of a prompt.
      image_id: token id of the placeholder.
      per_image: tokens of an image.

    Returns:
      The tokens.
    """
    return [t for token in tokens for t in (token,) * (per_image if token == image_id else 1)]
