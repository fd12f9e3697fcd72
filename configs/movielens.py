"""MovieLens: sessions of films, each with a poster and a few words.

    python launch.py --config=configs/movielens.py --config.data.ready=DIR

`DIR` holds sessions.npz, items.jsonl.gz and images.zip (tpad_jax/data/sources/folder.py); any other
directory of that form will do, once `config.data.words` names its fields. Sessions are short of
data (some 5,000 for 3,500 films), so everything here is restraint.
"""

from tpad_jax import config


def get_config():
    """The recommender is the best of a few on validation; the stages before it are untuned."""
    c = config.get_config()
    c.name = 'movielens'
    c.stages = 'knowledge,transfer,recommend'
    c.save_every, c.log_every = 100, 20
    # what a film is comes first, for the text is cut
    c.data.update(words='genres,year,title,tags,overview', sides='year,genres')
    c.mllm.update(tokenizer='own', text_length=24)
    # the base was made for pictures of shapes and a shop's words: here it learns anew, all of it,
    # from single films
    c.stage.knowledge.update(steps=400, batch_size=64, learning_rate=1e-3,
                             train=r'^(base|lora/knowledge|knowledge)/')
    # a session names up to twenty films, and the step reads each of them
    c.stage.transfer.update(steps=40, batch_size=48)
    c.losses.next_item.update(h='h_each', smoothing=0.1)
    c.model.update(encoder='attention', width=64, normalise=True, temperature=0.08, repeats=True,
                   together=50, recommend='r', use_side=True, id_dropout=0.2, feature_dropout=0.1,
                   feature_hidden=0)
    c.stage.recommend.update(batch_size=128, every_prefix=False, learning_rate=3e-3, steps=800,
                             eval_every=80, patience=4, weight_decay=0.5)
    c.rivals = dict(id_only=dict(recommend='', use_side=False), knowledge_only=dict(recommend='k'),
                    side_only=dict(recommend='', use_side=True))
    return c
