"""The options of every built-in loss: `config.losses` of the default config.

tpad_jax/losses/ holds the functions, which are found by the name `fn`.
"""

from ml_collections import ConfigDict


def losses() -> ConfigDict:
    """Return every built-in loss: function, keywords, weight (0: off) and its stages.

    `config.losses.<name>.weight=...` changes a weight in all its stages,
    `config.stage.<stage>.weights.<name>=...` in one.
    """
    sessions = 'transfer,joint'
    align = dict(weight=0.0, stages=sessions, x='k', y='c', ids='items', critic='critic.align')
    distil = dict(weight=0.0, stages=sessions, x='r_next', y='p', ids='next')
    divergence = dict(fn='mdist', weight=0.0, kind='forward', temperature=1.0, skew=0.1,
                      by_row=False)
    # Knowledge-MLLM under adapter 'distil' (r.*) is held to itself under 'knowledge' (k.*)
    student = dict(**divergence, stages=sessions, teacher_table='vocabulary')
    # Knowledge-MLLM is held to the larger MLLM config.mllm.teacher (in stage transfer: x='r.text')
    taught = dict(**divergence, stages='knowledge', teacher_table='teacher.vocabulary')
    out = dict(
        gen_knowledge=dict(fn='generation', weight=1.0, stages='knowledge,joint',
                           x='describe', tokens='describe.tokens', by_row=False),
        # on with an own tokenizer, in place of gen_knowledge
        words=dict(fn='bag_of_words', weight=0.0, stages='knowledge,joint'),
        gen_transfer=dict(fn='generation', weight=0.3, stages=sessions,
                          x='foretell', tokens='foretell.tokens', by_row=False),
        align=dict(align, fn='infonce', weight=0.1, chunk=0),
        align_mine=dict(align, fn='mine', limit=1.0),
        align_nwj=dict(align, fn='nwj'),
        align_jsd=dict(align, fn='jsd'),
        align_smile=dict(align, fn='smile', clip=5.0),
        # c and p are functions of one t: if q learns, a larger weight removes most of p
        disentangle=dict(fn='vclub', weight=1e-4, stages=sessions, x='c', y='p', scale=True),
        disentangle_l1out=dict(fn='l1out', weight=0.0, stages=sessions, x='c', y='p', scale=True),
        club_fit=dict(fn='club_fit', weight=1.0, stages=sessions, x='c', y='p', scale=True),
        # in place of these two, with model.bottleneck: what p knows of the session costs, in nats
        bottleneck=dict(fn='bottleneck', weight=0.0, stages=f'teach,{sessions}'),
        # by_session: positions of one session are never negatives of each other
        distil=dict(distil, fn='infonce', weight=1.0, critic='critic.distil', chunk=0,
                    by_session=False),
        distil_mine=dict(distil, fn='mine', critic='critic.distil', limit=1.0, by_session=False),
        uniform=dict(distil, fn='alignment_uniformity', power=2.0, sharpness=2.0, uniform=1.0),
        discrepancy=dict(fn='mmd', weight=0.1, stages=sessions, x='r', y='t'),
        mdist_text=dict(student, x='r.text', teacher='k.text', there='text.there'),
        mdist_image=dict(student, x='r.image', teacher='k.image', there='image.there'),
        rdist=dict(fn='rdist', weight=0.0, stages=sessions, x='r.image', teacher='k.image'),
        teach_text=dict(taught, x='k.text', teacher='teacher.text', there='text.there'),
        teach_image=dict(taught, x='k.image', teacher='teacher.image', there='image.there'),
        teach_relations=dict(fn='rdist', weight=0.0, stages='knowledge', x='k.image',
                             teacher='teacher.image'),
        clusters=dict(fn='clusters', weight=0.0, stages=sessions),  # needs model.clusters
        # the Transfer-MLLM ranks the whole catalogue, by critic 'distil' and popularity
        teach=dict(fn='next_item', weight=1.0, stages='teach', h='teach.h', z='teach.z',
                   repeat=None, chunk=0, dtype='float32'),
        # the recommender is held to the Transfer-MLLM's distribution over the catalogue, cold items
        # included
        # views of a session are aligned with the Transfer-MLLM's intents (LLM-ISR)
        intents=dict(fn='intents', weight=0.0, stages='recommend', nearest=5, uniform=1.0),
        soft=dict(fn='soft_next_item', weight=0.0, stages='recommend', temperature=1.0),
        next_item=dict(fn='next_item', weight=1.0, stages='recommend,joint', h='h', temperature=1.0,
                       smoothing=0.0, chunk=0, dtype='float32'),
        sampled_next_item=dict(fn='sampled_next_item', weight=0.0, stages='recommend,joint', h='h',
                               samples=8192, power=0.75, temperature=1.0),
    )
    # schedule: ((step of the stage, factor), ...); the weight times the factor, linear between two
    # points and constant outside. (): the weight itself
    return ConfigDict({name: dict(loss, schedule=()) for name, loss in out.items()})
