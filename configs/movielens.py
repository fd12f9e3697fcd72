"""MovieLens: sessions of films, each with a poster and a few words.

    python launch.py --config=configs/movielens.py --config.data.ready=DIR
    python launch.py --config=configs/movielens.py:checkpoint --config.data.ready=DIR \
      --config.mllm.checkpoint=CHECKPOINT --config.model.features=WIDTH

`CHECKPOINT` reads the films as it is; WIDTH is that of its states.
`DIR` holds sessions.npz, items.jsonl.gz and images.zip (tpad_jax/data/sources/folder.py). For
another directory of that form, set `config.data.words` to its fields. There are few sessions (5,000
for 3,500 films), so all options regularise strongly.
"""

from tpad_jax import config


def get_config(variant: str = ''):
    """Return the config. The recommender was chosen on validation; earlier stages are untuned.

    Args:
      variant: '', or 'checkpoint' for a Hugging Face model, of which nothing is trained but the
        adapter that reads sessions.

    Raises:
      ValueError: the variant is unknown.
    """
    if variant not in ('', 'checkpoint'):
        raise ValueError(f"configs/movielens.py has no variant {variant!r}: expected 'checkpoint'")
    c = config.get_config()
    c.name = 'movielens'
    c.stages = 'knowledge,transfer,recommend'
    c.save_every, c.log_every = 100, 20
    # the text is cut, so the most telling fields come first
    c.data.update(words='genres,year,title,tags,overview', sides='year,genres')
    c.mllm.update(tokenizer='own', text_length=24)
    # the base knows planted shapes and the words of a shop, so all of it is trained here, on
    # single films
    c.stage.knowledge.update(steps=400, batch_size=64, learning_rate=1e-3,
                             train=r'^(base|lora/knowledge|knowledge)/')
    # the step reads every film of a session, up to twenty
    c.stage.transfer.update(steps=40, batch_size=48)
    if variant:
        c.mllm.update(tokenizer='', text_length=64, pooling='mean')
        c.stage.knowledge.update(steps=0, train=r'^(lora/knowledge|knowledge)/')
        c.model.reread = False  # else a step reads hundreds of films, twice
    c.losses.next_item.update(h='h_each', smoothing=0.1)
    c.model.update(encoder='attention', width=64, normalise=True, temperature=0.08, repeats=True,
                   together=50, recommend='r', use_side=True, id_dropout=0.2, feature_dropout=0.1,
                   feature_hidden=0, item_dropout=0.2)
    c.stage.recommend.update(batch_size=128, every_prefix=False, learning_rate=3e-3, steps=800,
                             epochs=0.0, eval_every=80, patience=4, weight_decay=0.5)
    c.rivals = dict(id_only=dict(recommend='', use_side=False), knowledge_only=dict(recommend='k'),
                    side_only=dict(recommend='', use_side=True),
                    lexical_only=dict(recommend='lexical'))
    return c
