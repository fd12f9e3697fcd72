"""A language model that is asked whether an item follows, against torch."""

import numpy as np
import pytest
import torch
import transformers

from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.features import yes_no
from tpad_jax.serving.rerank import Context

TITLES = ['', 'red mug', 'blue mug with a "handle"', 'tea', '100 % {wool}', 'x' * 200]
PREFIXES = np.array([[1, 2, 0], [3, 0, 0]], np.int32)
ITEMS = np.array([[3, 4, 5], [1, 2, 0]], np.int32)


def test_the_chance_of_yes_is_torchs(tmp_path):
    directory = tiny_hf.save('llama', tmp_path)
    rerank = yes_no.asking(str(directory), batch=2)
    scores = np.where(ITEMS > 0, 1.0, -np.inf).astype(np.float32)
    new = rerank(ITEMS, scores, Context(PREFIXES, None, TITLES))

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = [{tokenizer.encode(word, add_special_tokens=False)[0] for word in words}
           for words in yes_no.ANSWERS]
    ids = ids[0] - ids[1], ids[1] - ids[0]  # a space begins both
    for row, column in np.argwhere(ITEMS > 0):
        session = '; '.join(TITLES[i][:80] for i in PREFIXES[row] if i)
        question = yes_no.QUESTION.format(session=session, item=TITLES[ITEMS[row, column]][:80])
        if tokenizer.chat_template:
            question = tokenizer.apply_chat_template(
                [{'role': 'user', 'content': question}], tokenize=False, add_generation_prompt=True)
            asked = tokenizer(question, add_special_tokens=False, return_tensors='pt')
        else:
            asked = tokenizer(f'{question} Answer:', return_tensors='pt')
        with torch.no_grad():
            p = model(asked['input_ids']).logits[0, -1].double().softmax(-1)
        yes, no = (p[list(which)].sum().item() for which in ids)
        assert new[row, column] == pytest.approx(yes / (yes + no), abs=1e-5)
    assert new[1, 2] == -np.inf
    assert len(set(new[ITEMS > 0].tolist())) == 5


def test_a_question_without_the_item_is_refused():
    with pytest.raises(InputError, match='names no session or no item'):
        yes_no.asking('somewhere', question='Will they like {session}?')
