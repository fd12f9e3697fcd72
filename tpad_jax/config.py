"""Every knob once, with its reason. Other configs start from here and change what they mean to.

    from tpad_jax import config
    c = config.get_config()
"""

import copy
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tpad_jax.errors import InputError

STAGES = ('knowledge', 'transfer', 'recommend', 'joint')  # in the order of a run
# rows of the catalogue that a stage writes
MAKES = {'knowledge': ('k',), 'transfer': ('r',), 'joint': ('k', 'r')}
# What a partner may change of config.model, where these come from
PARTNER_CHANGES = (
    'width', 'use_id', 'use_side', 'id_dropout', 'feature_hidden', 'feature_dropout', 'encoder',
    'gnn_steps', 'positions', 'layers', 'heads', 'near', 'near_window', 'dropout', 'item_dropout',
    'recommend', 'normalise', 'temperature', 'repeats')


def get_config():
    """The default TPAD."""
    c = ConfigDict()
    c.name = 'tpad'
    c.seed = 0  # of parameters, draws and batch order; the planted catalogue has its own
    c.stages = 'knowledge,transfer,recommend,joint'  # run in this order, comma-separated
    c.save_every = 50  # steps between checkpoints, at most this many are computed again
    c.log_every = 4  # steps between log lines
    c.diagnostics = 192  # validation sessions whose features are looked at, 0: none
    # updates in a row that may be left out because a loss or a gradient is not finite; 0: the run
    # ends at the first, with its batch kept in the workdir
    c.skip_not_finite = 0
    c.parallel = 'auto'  # 'auto' (jit on one device, else pmap), 'jit', 'pmap' or 'shard_map'
    c.xla_flags = ''  # for the compiler, set before jax starts
    c.devices = 0  # how many devices of this process to use, 0: all
    # of float32 matrix products outside the MLLM: 'float32', 'tensorfloat32', 'bfloat16' or
    # 'default', which rounds operands to bfloat16 on TPUs and to TF32 on GPUs
    c.precision = 'float32'
    # threads next to the main one, which train independent recommenders, compile and tune
    # baselines; -1: one per further core on a CPU, none on accelerators. Changes no result
    c.workers = -1
    c.model_shards = 1  # devices that share one part of a batch and hold a part of the table each

    c.refit = False  # train the chosen recommender anew on training and validation sessions
    # what a second recommender, trained beside the first, changes of this config (nested); both
    # scores are added, see tpad_jax/job/recommenders.py. Empty: there is none
    c.partner = ConfigDict()
    c.search = ConfigDict(dict(
        trials=8,  # budget of every model's and baseline's search; 1: what the config says
        space={},  # what `python -m tpad_jax.search` varies: nested keys, axes as in tune.py
    ))
    # baselines of the results, comma-separated, any of these; '': none
    c.baselines = 'pop,repeat_last,markov,sr,ar,item_knn,content_knn,vsknn,stan,vstan'
    # metrics in addition to hit, mrr and ndcg, {name: 'module:function'}: docs/add_a_metric.md
    c.metrics = ConfigDict()

    c.data = data()
    c.mllm = ConfigDict(dict(
        base='',  # directory of the small base; empty: the default that is committed here
        checkpoint='',  # directory of a Hugging Face checkpoint, in place of the small base
        # directory of another base or checkpoint with the same tokenizer, which reads items beside
        # the student for the losses that read its outputs 'teacher...'; never trained; '': none
        teacher='',
        teacher_dtype='float32',  # of its parameters and computation
        image_size=0,  # pixels, both sides; 0: what the base reads (a model of any size: near 256)
        tokenizer='',  # empty: the base's; 'own': one of its size, trained on the items' texts
        text_length=32,  # tokens of an item's text
        # the rest is for checkpoints
        param_dtype='float32',  # of the parameters in memory; 'bfloat16' halves a frozen base
        dtype='float32',  # of the computation; norms, softmax and losses are float32 anyway
        attention='xla',  # or 'cudnn', fused, on NVIDIA GPUs in bfloat16
        remat='none',  # what a backward pass computes again: 'none', 'dots' or 'full' layers
        chunk=0,  # items a step reads at a time, 0: all; saves memory and costs a second reading
        pooling='summary',  # or 'last' token, or 'mean': how an item's features are read
        encode_rows=120,  # items of a compiled call when the whole catalogue is read
        encode_part=1920,  # items of a file of an unfinished feature store: what a kill can cost
        before='', between='', end='',  # texts around the content; empty: the family's own
    ))
    c.model = model()
    c.losses = losses()
    for name in c.losses:
        # ((step, factor), ...): of the stage's steps; the weight times the factor, linear between
        # two points, constant outside; (): the weight as it is
        c.losses[name].schedule = ()
    c.stage = ConfigDict(dict(
        knowledge=stage(batch_size=64, steps=60, learning_rate=5e-4, eval_every=0, fresh='k',
                        train=r'^(lora/knowledge|knowledge)/'),
        # eval_every: T's own lists are validated, see scoring.foretold
        transfer=stage(batch_size=64, steps=72, learning_rate=2e-3, eval_every=0, fresh='r',
                       every_prefix=False, copy='lora/knowledge->lora/distil',
                       # q follows p, which moves; r, which starts as k, moves gently
                       rates=(('^club/', 5.0), ('^lora/distil/', 0.1), ('^adapter/', 0.2)),
                       train=r'^(lora/(transfer|distil)|transfer|disentangle|adapter|club|critic)/'),
        recommend=stage(batch_size=512, steps=600, learning_rate=4e-3, eval_every=50, patience=5,
                        train=r'^recommender/', weight_decay=1.0),
        joint=stage(batch_size=64, steps=8, learning_rate=2e-4, eval_every=8, patience=5,
                    fresh='k,r', refresh_every=8, weight_decay=0.1,
                    train=r'^(lora|knowledge|transfer|disentangle|adapter|club|critic|recommender)/'),
    ))
    # Recommenders trained beside TPAD with the recommend stage's own care: what they change of
    # model.
    c.rivals = ConfigDict(dict(
        id_only=dict(recommend='', use_side=False, use_id=True),
        knowledge_only=dict(recommend='k'),
        true_attributes=dict(recommend='true', use_side=False),  # planted catalogue only
    ))
    return c


def tiny(c):
    """Make a config small: all stages on a planted catalogue in about two minutes. In place."""
    c.save_every = 5
    # compile quickly rather than well: so few steps never earn it back
    c.xla_flags = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    c.log_every = 1
    c.search.trials = 1  # baselines as they are
    c.data.planted.update(items=80, train=300, valid=60, test=80)
    for name, steps in dict(knowledge=8, transfer=8, recommend=40, joint=6).items():
        c.stage[name].update(steps=steps, batch_size=32)
    c.stage.recommend.eval_every = 20
    c.stage.joint.update(eval_every=3, refresh_every=3)


def data():
    """Where items and sessions come from and how they are cut."""
    return ConfigDict(dict(
        # which source of data/sources to read: a registered name, or 'module:object' for your own;
        # empty: the one whose option below is set, and the planted catalogue where none is
        source='',
        raw_dir='',  # directory of one category's raw Amazon files
        features='',  # file of item features computed elsewhere (data/given.py): the rows 'given'
        npz='',  # file of ready-made sessions of item ids (data/npz.py), in place of raw files
        ready='',  # directory of ready-made sessions whose items have content (data/ready.py)
        words='title',  # ready: an item's fields that make its text, in this order
        sides='',  # ready: fields that are side features
        ordered=True,  # npz, ready: the training sessions stand in the order of time
        protocol='ours',  # every prefix is scored; 'published': as the papers on these data do
        published_last_only=False,  # they score a session's last item only
        gap_hours=24.0,  # 2023 files: a longer pause ends a session (2018 files: reviewer and day)
        core=5,  # k-core, counted on training sessions; 1: off
        min_length=2,  # events of the shortest session
        max_length=20,  # longest prefix; a longer one keeps its last items
        valid=0.1,  # share (or, from 1 on, number) of sessions, the latest but for test
        test=0.1,  # share or number of the latest sessions
        seed=0,  # of the order given to events of equal time
        # share of a raw file's lines, or of the images, that may be damaged: they are left out and
        # counted; with more the run is refused. Genuine files have none to a few in a thousand: a
        # twentieth is another encoding, another form, or half a download
        bad_share=0.05,
        # the embedded catalogue, whose constants stand in data/synthetic.py; it has its own split
        # and no k-core: core, valid and test above are for raw files
        planted=dict(
            seed=0, items=600, train=6000, valid=400, test=1200, noise=0.12),
    ))


def model():
    """Widths and shares of everything above the base."""
    return ConfigDict(dict(
        features=64,  # width D of k per modality; t, c, p and r have M D
        lora_rank=8, lora_alpha=16.0,
        lora_targets=r'^decoder/.*(attention/[qkvo]|gate|up|down)$',  # of the base's kernels
        form='compressed',  # how the Transfer-MLLM is fed an item: 'compressed' or 'full'
        withhold=0.3,  # share of an item's words a reader that is trained does not see
        word_dropout=0.6,  # share of words the writer does not see, or features stay empty
        critics=dict(align='separable', distil='separable'),
        # instead of distilling: the adapter r is read under is a blend of others, made when stage
        # transfer ends; r is then K's features, one per modality as in k (see models/blend.py)
        blend=dict(
            kind='',  # 'sum', 'mean' or 'ties'; '': r is distilled
            of='knowledge,transfer', weights='1,1',  # adapters, and the weight of each one's delta
            keep=0.2,  # ties: share of an adapter's entries that count
            rank=0),  # of the nearest adapter to the blend; 0: the blend itself
        reread=True,  # K reads an item again for r, under an adapter of its own; False: r = A(k)
        clusters=0,  # of items by their k, for the loss 'clusters', which needs some; 0: none
        width=128,  # of z and h, the recommender
        recommend='r',  # content features in z, comma-separated rows: r, k, given; '': none
        use_id=True,  # False: content only
        use_side=True,  # brand, category and price level, where the catalogue has them
        id_dropout=0.2,  # share of warm items that meet the cold items' shared embedding
        feature_hidden=128,  # of an MLP that content features pass on their way into z; 0: none
        feature_dropout=0.0,  # on the content features
        encoder='sr_gnn',  # of sessions: 'sr_gnn', 'gce_gnn' or 'attention'
        normalise=True,  # items and sessions have length one, and a temperature is learned
        temperature=0.07,  # where it starts
        repeats=False,  # items of the prefix get a learned shift of their scores
        # so many items per item, which shared most sessions with it, score higher than their
        # vectors say (see models/together.py); 0: none
        together=0, together_strength=0.7, together_decay=0.5,
        gnn_steps=1,  # sr_gnn: rounds of message passing
        positions=True,  # sr_gnn: the readout knows positions, which the published one does not
        layers=1, heads=2,  # attention
        near=12, near_window=3,  # gce_gnn: global neighbours of an item, longest distance counted
        dropout=0.2,  # inside the encoder
        item_dropout=0.2,  # on the item vectors it reads
    ))


def losses():
    """Every built-in loss: function, keywords, weight (0: off) and the stages that use it.

    `config.losses.<name>.weight=...` changes a weight in all its stages,
    `config.stage.<stage>.weights.<name>=...` in one.
    """
    return ConfigDict(dict(
        gen_knowledge=dict(fn='generation', weight=1.0, stages='knowledge,joint',
                           x='describe', tokens='describe.tokens', by_row=False),
        gen_transfer=dict(fn='generation', weight=0.3, stages='transfer,joint',
                          x='foretell', tokens='foretell.tokens', by_row=False),
        align=dict(fn='infonce', weight=0.1, stages='transfer,joint',
                   x='k', y='c', ids='items', critic='critic.align', chunk=0),
        align_mine=dict(fn='mine', weight=0.0, stages='transfer,joint',
                        x='k', y='c', ids='items', critic='critic.align'),
        align_nwj=dict(fn='nwj', weight=0.0, stages='transfer,joint',
                       x='k', y='c', ids='items', critic='critic.align'),
        align_jsd=dict(fn='jsd', weight=0.0, stages='transfer,joint',
                       x='k', y='c', ids='items', critic='critic.align'),
        align_smile=dict(fn='smile', weight=0.0, stages='transfer,joint',
                         x='k', y='c', ids='items', critic='critic.align', clip=5.0),
        # c and p are functions of one t: where q learns, a larger weight leaves little of p
        disentangle=dict(fn='vclub', weight=1e-4, stages='transfer,joint', x='c', y='p',
                         scale=True),
        disentangle_l1out=dict(fn='l1out', weight=0.0, stages='transfer,joint', x='c', y='p',
                               scale=True),
        club_fit=dict(fn='club_fit', weight=1.0, stages='transfer,joint', x='c', y='p', scale=True),
        distil=dict(fn='infonce', weight=1.0, stages='transfer,joint',
                    x='r_next', y='p', ids='next', critic='critic.distil', chunk=0),
        distil_mine=dict(fn='mine', weight=0.0, stages='transfer,joint',
                         x='r_next', y='p', ids='next', critic='critic.distil'),
        uniform=dict(fn='alignment_uniformity', weight=0.0, stages='transfer,joint',
                     x='r_next', y='p', ids='next', power=2.0, sharpness=2.0, uniform=1.0),
        discrepancy=dict(fn='mmd', weight=0.1, stages='transfer,joint', x='r', y='t'),
        # K under 'distil' (r.*) is held to K under 'knowledge' (k.*) on the same items ...
        mdist_text=dict(fn='mdist', weight=0.0, stages='transfer,joint', x='r.text',
                        teacher='k.text', there='text.there', teacher_table='vocabulary',
                        kind='forward', temperature=1.0, skew=0.1, by_row=False),
        mdist_image=dict(fn='mdist', weight=0.0, stages='transfer,joint', x='r.image',
                         teacher='k.image', there='image.there', teacher_table='vocabulary',
                         kind='forward', temperature=1.0, skew=0.1, by_row=False),
        rdist=dict(fn='rdist', weight=0.0, stages='transfer,joint', x='r.image',
                   teacher='k.image'),
        # ... and K to the larger MLLM config.mllm.teacher (in stage transfer: x='r.text')
        teach_text=dict(fn='mdist', weight=0.0, stages='knowledge', x='k.text',
                        teacher='teacher.text', there='text.there',
                        teacher_table='teacher.vocabulary', kind='forward', temperature=1.0,
                        skew=0.1, by_row=False),
        teach_image=dict(fn='mdist', weight=0.0, stages='knowledge', x='k.image',
                         teacher='teacher.image', there='image.there',
                         teacher_table='teacher.vocabulary', kind='forward', temperature=1.0,
                         skew=0.1, by_row=False),
        teach_relations=dict(fn='rdist', weight=0.0, stages='knowledge', x='k.image',
                             teacher='teacher.image'),
        clusters=dict(fn='clusters', weight=0.0, stages='transfer,joint'),  # see model.clusters
        next_item=dict(fn='next_item', weight=1.0, stages='recommend,joint', h='h', temperature=1.0,
                       smoothing=0.0, chunk=0, dtype='float32'),
        sampled_next_item=dict(fn='sampled_next_item', weight=0.0, stages='recommend,joint', h='h',
                               samples=8192, power=0.75, temperature=1.0),
    ))


def stage(**changes):
    """One stage: batches, optimiser, what trains. `weights` overrides config.losses.*.weight."""
    out = ConfigDict(dict(
        batch_size=64,  # over all devices
        # parts that a device reads its rows in, one after the other: the activations of one part
        # exist at a time, everything is read twice, and every loss still sees the whole batch
        accumulate=1,
        steps=100,  # at most; 0, in the knowledge stage alone: the MLLM is taken as it is
        every_prefix=True,  # False: a session is one row, its last item the target
        optimiser='adamw',  # 'adam': L2 instead of decay, no clip; 'sgd': bare, at the peak rate
        learning_rate=1e-3,  # peak: warmed up, then by schedule
        schedule='cosine',  # to zero at the last step, or 'constant'
        warmup=0.05,  # share of the steps
        rates=(),  # ((regex over parameter paths, factor), ...): learning rates of their own
        weight_decay=0.01,  # of matrices, not of biases and norms
        clip=1.0,  # global norm of the gradient
        eval_every=0,  # steps between validations; 0: none, the last step is kept
        patience=0,  # validations without a better hit@20 before the stage ends; 0: never
        fresh='',  # features computed from content with gradient, comma-separated: k, r
        refresh_every=0,  # steps between re-encodings of the catalogue
        copy='',  # 'a->b': at the start parameters under b are those under a
        train='',  # regex over parameter paths: what trains; the rest has no optimiser state
    ))
    out.weights = ConfigDict({name: placeholder(float) for name in losses()})
    out.update(changes)
    return out


def names(text: str) -> tuple[str, ...]:
    """A knob that names several: 'a,b' -> ('a', 'b'); '' -> ()."""
    return tuple(part for part in text.split(',') if part)


def partnered(config):
    """The partner's whole config: the run's, with config.partner laid over it.

    Raises:
      InputError: config.partner names a key that does not exist, or one that is no recommender's.
    """
    other = copy.deepcopy(config)
    changes = other.partner.to_dict()
    other.partner = {}
    other.lock()
    try:
        other.update(changes)
    except (KeyError, TypeError) as error:
        raise InputError(f'config.partner does not fit the config: {error.args[0]}') from error
    before = dict(flat(config))
    for key, value in flat(other):
        if key.startswith(('partner', 'losses.', 'stage.recommend.')) or value == before.get(key):
            continue
        if key not in {f'model.{name}' for name in PARTNER_CHANGES}:
            raise InputError(f'config.partner changes {key}, which both recommenders share; change '
                             f'losses, stage.recommend, or of model {", ".join(PARTNER_CHANGES)}')
    return other


def flat(tree: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested config as ('a.b.c', value)."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value
