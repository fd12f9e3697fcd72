"""A reranker that asks a language model whether an item follows (MLLM-MSR, arXiv 2408.09698).

The new score of an item is P(yes) / (P(yes) + P(no)) of the token after a question about the titles
of the session and of the item, section 3.3 of the paper. [ours] the question, and the sum over
spellings of the answer.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.data import text
from tpad_jax.errors import refuse_if
from tpad_jax.features import bases
from tpad_jax.models.hf import load, spec, vlm

QUESTION = ('A person looked at these products in a shop: {session}. '
            'Will the person look at "{item}" next? Answer with yes or no.')
ANSWERS = ('yes', 'Yes', ' yes', ' Yes'), ('no', 'No', ' no', ' No')
TITLE = 80  # characters of a title that the question names
STEP = 64  # prompts are as long as a multiple of so many tokens


@cache
def asking(checkpoint: str, *, question: str = QUESTION, batch: int = 16, dtype: str = 'float32'
           ) -> Callable:
    """Load a language model and return the reranker that asks it, see serving/rerank.py.

    Args:
      checkpoint: Hugging Face directory or hub id of a model that writes text.
      question: with {session}, the titles of the last items, and {item}. A model with a chat
        template is asked by it.
      batch: questions per call.
      dtype: of the parameters.

    Raises:
      InputError: the checkpoint cannot be read or writes no text, the question lacks a part, or yes
        and no begin with the same token.
    """
    refuse_if('{session}' not in question or '{item}' not in question, f'question={question!r}: '
              'it names no session or no item. Expected {session} and {item}. Fix: add them.')
    directory = bases.local('checkpoint', checkpoint)
    description, tokenizer = spec.read(directory), text.read_tokenizer(directory)
    answers = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words}
               for words in ANSWERS]
    answers = [tuple(sorted(mine - other)) for mine, other in zip(answers, answers[::-1],
                                                                  strict=True)]
    refuse_if(not all(answers), f'{directory}: yes and no begin with the same token, so the model '
              'cannot answer by one. Expected another tokenizer. Fix: choose another checkpoint.')
    params = load.load(directory, description, dtype=dtype)
    refuse_if(not description.decoder.tied and 'head' not in params, f'{directory}: has no output '
              'embedding (lm_head). Expected one, to write text. Fix: choose another checkpoint.')
    model = vlm.VLM(description, description.unit)
    ask = jax.jit(partial(_chance, model, answers=tuple(answers)))

    def chances(prompts: list[list[int]]) -> np.ndarray:
        out = []
        for begin in range(0, len(prompts), batch):
            part = prompts[begin:begin + batch]
            length = -(-max(map(len, part)) // STEP) * STEP
            tokens = np.full((batch, length), -1, np.int32)
            for row, prompt in zip(tokens, part, strict=False):
                row[:len(prompt)] = prompt
            out.append(np.asarray(ask(params, tokens))[:len(part)])
        return np.concatenate(out)

    return partial(rerank, chances=chances, encode=partial(_encode, tokenizer), question=question)


def rerank(items: np.ndarray, scores: np.ndarray, context, *, chances: Callable,
           encode: Callable, question: str) -> np.ndarray:
    """Score items by the chance of the answer yes.

    Args:
      items: int32 [B, n]. Rows, best first; 0 pads.
      scores: float32 [B, n]. Only the rows of absent items are read, -inf.
      context: rerank.Context.
      chances: token ids of R prompts -> float [R].
      encode: text -> token ids.
      question: see `asking`.

    Returns:
      float32 [B, n], -inf for absent items.
    """
    new, real = np.full(scores.shape, -np.inf, np.float32), items > 0
    prompts = []
    for row, item in np.argwhere(real):
        session = '; '.join(context.titles[i][:TITLE] for i in context.prefixes[row] if i)
        prompts.append(encode(question.format(session=session,
                                              item=context.titles[items[row, item]][:TITLE])))
    if prompts:
        new[real] = chances(prompts)
    return new


def _encode(tokenizer, question):
    """Token ids of a question, by the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer.encode(f'{question} Answer:')
    asked = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], tokenize=False,
                                          add_generation_prompt=True)
    return tokenizer.encode(asked, add_special_tokens=False)


def _chance(model, params, tokens, *, answers):
    """P(yes) / (P(yes) + P(no)) after prompts int32 [B, L], -1 pads on the right; float32 [B]."""
    last = jnp.maximum((tokens >= 0).sum(axis=1) - 1, 0)[:, None]

    def read(model):
        return model.logits(model(model.say(tokens), at=last))[:, 0]

    logits = model.apply({'params': params}, method=read)
    yes, no = (jax.nn.logsumexp(logits[:, list(ids)], axis=1) for ids in answers)
    return jax.nn.sigmoid(yes - no)
