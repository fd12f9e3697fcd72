"""The default config: every option with its meaning, unit and default.

    from tpad_jax import config
    c = config.get_config()
    c.model.width = 256

Other configs start from `get_config` and change some options. The command line changes them by
`--config.KEY=VALUE`. tpad_jax/loss_options.py holds the options of the losses, and
tpad_jax/job/ranges.py the values that each option may take.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tpad_jax.loss_options import losses

STAGES = ['knowledge', 'teach', 'transfer', 'recommend', 'joint']  # in the order of a run
# rows of the catalogue that a stage writes
MAKES = {'knowledge': ('k',), 'transfer': ('r',), 'joint': ('k', 'r')}


# The Transfer-MLLM learns what follows what before anything is distilled from it, and is then
# frozen: {option: value}
TAUGHT = {
    'stages': 'knowledge,teach,transfer,recommend,joint',
    'model.form': 'item', 'model.session_layers': 2, 'model.session_dropout': 0.3,
    'model.recommend': 'k,r',  # r alone loses content; compare with 'k,k', which is as wide
    'model.critics.distil': 'cosine',  # no head between r and what is learnt of it
    'stage.transfer.steps': 24, 'stage.transfer.rates': (),
    'stage.transfer.train': r'^(lora/distil|adapter)/',
} | {f'stage.{stage}.weights.{loss}': 0.0 for stage in ('transfer', 'joint') for loss in (
    'gen_transfer', 'align', 'disentangle', 'club_fit', 'discrepancy')}


def get_config() -> ConfigDict:
    """Return the default config, unlocked."""
    c = ConfigDict()
    c.name = 'tpad'  # of the run: the default workdir is runs/<name>
    c.seed = 0  # of parameters, random draws and batch order; data.planted.seed is separate
    c.stages = 'knowledge,transfer,recommend,joint'  # to run, comma-separated, in this order
    # workdir of a finished run, on other data, with the same base and widths. Its Transfer-MLLM,
    # adapters, heads and critics are what the stages start from, and a stage with 0 steps takes
    # them as they are. Its recommender is not read. '': all parameters are drawn
    c.begin_from = ''
    c.save_every = 50  # steps between checkpoints; a killed run repeats at most this many
    c.log_every = 4  # steps between log lines
    c.diagnostics = 192  # validation sessions whose features are measured; 0: none
    # updates in a row that may be skipped because a loss or gradient is not finite. 0: the run ends
    # at the first one and keeps its batch in the workdir
    c.skip_not_finite = 0
    c.parallel = 'auto'  # 'jit', 'pmap', 'shard_map'; 'auto': jit on one device, else pmap
    c.xla_flags = ''  # of the compiler, set before jax starts
    c.devices = 0  # devices of this process to use; 0: all
    # of float32 matrix products outside the MLLM: 'float32', 'tensorfloat32', 'bfloat16' or
    # 'default', which rounds operands to bfloat16 on TPUs and to TF32 on GPUs
    c.precision = 'float32'
    # threads in addition to the main one, which train independent recommenders, compile and tune
    # baselines. -1: one per further core on a CPU, none on accelerators. Changes no result
    c.workers = -1
    c.model_shards = 1  # devices that share one part of a batch; each holds a part of the tables

    # True: the chosen recommender is trained again, on training and validation sessions
    c.refit = False
    # changes (nested, as this config) for a second recommender. It is trained next to the first,
    # and the scores of the two are added: tpad_jax/job/recommenders.py. Empty: there is none
    c.partner = ConfigDict()
    c.search = ConfigDict(dict(
        trials=30,  # of the search of every baseline; 1: no search
        # what `python -m tpad_jax.search` varies: nested keys with axes as in baselines/tune.py
        space={},
    ))
    # baselines of the results, comma-separated, some of these or content_lasso; '': none
    c.baselines = ('pop,repeat_last,markov,sr,ar,item_knn,content_knn,content_rules,'
                   'vsknn,stan,vstan')
    # what the served scores add up, weighted by the likelihood of validation (models/experts.py);
    # comma-separated; '': the recommender alone
    c.experts = ('model,popularity,cold,transitions,followers,companions,neighbours,held,content,'
                 'lasso')
    # metrics in addition to hit, mrr and ndcg, {name: 'module:function'}: docs/add_a_metric.md
    c.metrics = ConfigDict()

    # stages that are trained by federated rounds (training/federated.py), comma-separated; their
    # steps are rounds, in which every client makes `local` steps of batch_size rows
    c.federated = ConfigDict(dict(
        stages='', clients=8, local=10,
        concentration=0.5,  # of the Dirichlet distribution of a label over the clients
        only='',  # numbers of the clients that take part, comma-separated; '': all
        rule='avg',  # of the server: 'avg', 'avgm', 'adam', 'yogi' or 'scaffold'
        server_rate=1.0, momentum=0.9,
        proximal=0.0))  # FedProx: a client's pull towards the parameters it began from

    c.data = data()
    c.mllm = mllm()
    c.model = model()
    c.losses = losses()
    c.stage = ConfigDict(dict(
        knowledge=stage(batch_size=64, steps=48, learning_rate=5e-4, eval_every=0, fresh='k',
                        train=r'^(lora/knowledge|knowledge)/'),
        # the Transfer-MLLM learns on stored k what follows what; r = A(k) are the items it ranks
        teach=stage(batch_size=64, steps=600, epochs=10.0, learning_rate=4e-3, eval_every=100,
                    patience=3, fresh='r', every_prefix=False, weight_decay=1.0,
                    train=r'^(lora/transfer|transfer|disentangle|adapter|critic/distil)/'),
        # eval_every > 0 would validate the lists of the Transfer-MLLM itself
        transfer=stage(batch_size=64, steps=48, learning_rate=2e-3, eval_every=0, fresh='r',
                       every_prefix=False, copy='lora/knowledge->lora/distil',
                       # q must follow p, which moves; r starts as k and must move slowly
                       rates=(('^club/', 5.0), ('^lora/distil/', 0.1), ('^adapter/', 0.2)),
                       train=r'^(lora/(transfer|distil)|transfer|disentangle|adapter|club|critic)/'),
        recommend=stage(batch_size=256, steps=600, epochs=6.0, learning_rate=4e-3, eval_every=100,
                        patience=3, train=r'^recommender/', weight_decay=1.0),
        joint=stage(batch_size=64, steps=8, learning_rate=2e-4, eval_every=8, patience=5,
                    fresh='k,r', refresh_every=8, weight_decay=0.1,
                    train=r'^(lora|knowledge|transfer|disentangle|adapter|club|critic|recommender)/'),
    ))
    # trained baselines: recommenders trained in stage recommend with other inputs, {name: changes
    # of config.model: recommend (obligatory), use_id, use_side}
    c.rivals = ConfigDict(dict(
        id_only=dict(recommend='', use_side=False, use_id=True),
        knowledge_only=dict(recommend='k'),
        lexical_only=dict(recommend='lexical'),  # for real texts only: features/lexical.py
        true_attributes=dict(recommend='true', use_side=False),  # for the planted catalogue only
    ))
    return c


def tiny(c: ConfigDict) -> None:
    """Shrink a config in place: all stages on a planted catalogue in about a minute.

    Args:
      c: as `get_config` returns it.
    """
    c.update_from_flattened_dict({
        'save_every': 50, 'log_every': 1,
        # compile fast rather than well: the few steps never earn a good program back
        'xla_flags': '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
                     '--xla_llvm_disable_expensive_passes=true '
                     '--xla_cpu_parallel_codegen_split_count=1',
        'search.trials': 1,
        'data.planted.items': 80, 'data.planted.train': 300, 'data.planted.valid': 60,
        'data.planted.test': 80,
        'stage.knowledge.steps': 8, 'stage.teach.steps': 30, 'stage.teach.eval_every': 15,
        'stage.transfer.steps': 8, 'stage.recommend.steps': 40,
        'stage.joint.steps': 3, 'stage.recommend.eval_every': 20, 'stage.joint.eval_every': 3,
        'stage.joint.refresh_every': 3, 'diagnostics': 32} | {
            key: 16 for key, _ in flat(c) if key.endswith('.batch_size')})
    # each baseline has a step to compile
    c.rivals = {name: entry for name, entry in c.to_dict()['rivals'].items()
                if name not in ('knowledge_only', 'true_attributes')}


def data() -> ConfigDict:
    """Return the options of the data: their source, and how sessions are cut and split."""
    return ConfigDict(dict(
        # source to read: a name registered in tpad_jax/data/sources, or 'module:object'. Empty: the
        # source whose option below is set, else the planted catalogue
        source='',
        raw_dir='',  # directory with the raw Amazon files of one category
        npz='',  # file of prepared sessions of item ids (data/sources/ids.py)
        ready='',  # directory of prepared sessions with content (data/sources/folder.py)
        # CSV or Parquet files of events and of items (data/sources/event_files.py)
        event_file='', item_file='',
        encoding='utf-8',  # of the CSV files: 'utf-8', 'latin-1' or 'cp1252'
        kinds='',  # event_file: kinds of events to read, comma-separated; '': all
        target_events='',  # kinds of events that are predicted, comma-separated; '': all
        # event_file, item_file: names of columns. '': a usual name is looked for; '-': not read.
        # `text` may name several, comma-separated
        columns=dict(session='', user='', item='', time='', kind='',
                     id='', title='', image='', price='', category='', brand='', text=''),
        # file of item features computed elsewhere (data/sources/external_features.py): rows 'given'
        features='',
        # CSV file with the importance of pairs of words and side values, a prior of the baseline
        # content_lasso and the expert lasso (docs/systems/llm_lasso.md); '': none
        prior='',
        # items that are read and ranked. 'all': those that the source lists; 'reviewed': those with
        # an event before validation; 'sessions': those of the training sessions. A test row whose
        # next item is not among them is a miss
        catalogue='all',
        # shares of the items with a picture that lose it, or their text, and which items those
        # are: 'all', 'warm' or 'cold' ones (data/missing.py)
        missing=dict(image=0.0, text=0.0, of='all'),
        words='title',  # ready: fields of an item that make its text, comma-separated, in order
        sides='',  # ready: fields that are side features, comma-separated
        ordered=True,  # npz, ready: the training sessions are in the order of time
        # npz, ready: 'ours' scores every prefix of a session; 'published' follows the papers on
        # these data
        protocol='ours',
        published_last_only=False,  # 'published': only the last item of a session is scored
        gap_hours=24.0,  # 2023 files: a longer pause (hours) ends a session; 2018 files: a day does
        core=5,  # k-core: items with fewer events in training sessions are dropped; 1: none
        min_length=2,  # events of the shortest session
        max_length=20,  # items of the longest prefix; a longer one keeps its last items
        valid=0.1,  # share of the sessions, or from 1 on their number: the latest before test
        test=0.1,  # share or number of the latest sessions
        # the test is one window of so many days, counted from the last day on (1), and training all
        # before it; 0: `test` decides. `python -m tpad_jax.train --windows=N` runs the last N
        window=0, window_days=7,
        seed=0,  # of the order of events with equal times, and of draws of sessions
        # largest share of damaged lines of a raw file, or of damaged images; they are skipped and
        # counted. Real files have a few in a thousand. One in twenty means another encoding,
        # another format or half a download
        bad_share=0.05,
        # the planted catalogue (data/synthetic/planted.py): items, sessions of each part, and the
        # standard deviation of pixel noise in 0..1. `core`, `valid` and `test` do not apply to it.
        # law_seed: of what follows what; None: seed. Two seeds with one law_seed are two catalogues
        # in which the same attributes follow each other. drift, kinds (up to 3) and visitors: what
        # variants.py adds to the law, 0: nothing
        planted=dict(seed=0, law_seed=placeholder(int), items=600, train=6000, valid=400, test=1200,
                     noise=0.12, drift=0.0, kinds=0, visitors=0),
    ))


def mllm() -> ConfigDict:
    """Return the options of the multimodal language model that reads items."""
    return ConfigDict(dict(
        base='',  # directory of the small base; empty: the one in this package
        # Hugging Face checkpoint in place of the small base: a directory, or a hub id (org/name). A
        # text encoder reads items, and a separate small base reads sessions
        checkpoint='',
        # directory of another base or checkpoint with the same tokenizer. It reads items for the
        # losses that read its outputs 'teacher...', and is not trained. Empty: none
        teacher='',
        teacher_dtype='float32',  # of its parameters and computation
        image_size=0,  # pixels of both sides; 0: the base's size, or about 256 if it reads any
        # '': the base's; 'own': trained on the items' texts, with a base drawn at random; 'auto':
        # 'own' where the small base's tokenizer takes more than 2.5 tokens a word
        tokenizer='auto',
        # with an own tokenizer: its size; and, for those options that still have their default,
        # the most tokens of a text, and steps and learning rate of stage knowledge
        own=dict(vocab=4096, text_length=64, steps=200, learning_rate=3e-3),
        text_length=32,  # tokens of an item's text; a longer text is cut
        # share of the weights of the decoder's layers that are set to zero before any stage
        # (features/prune.py), by 'tamp', 'wanda' or 'magnitude'. 0: none
        prune=0.0, prune_by='tamp',
        # the options below are for checkpoints
        param_dtype='float32',  # of parameters in memory; 'bfloat16' halves a frozen base
        dtype='float32',  # of the computation; norms, softmax and losses stay float32
        attention='xla',  # 'cudnn': fused, on NVIDIA GPUs in bfloat16
        remat='none',  # what the backward pass computes again: 'none', 'dots' or 'full' layers
        chunk=0,  # items that a step reads at a time, each twice, to save memory; 0: all
        # how features are read off: 'summary' token, 'last' token or 'mean'. Text encoders: 'mean',
        # 'cls', or as their files say ('summary')
        pooling='summary',
        encode_rows=120,  # items per compiled call when the whole catalogue is read
        encode_part=1920,  # items per file of an unfinished feature store; a kill costs one file
        # seconds without a finished call after which another process that encodes the same run
        # makes a part; more than the first call takes, which compiles
        encode_lease=600.0,
        before='', between='', end='',  # texts around image and text; empty: the family's
    ))


def model() -> ConfigDict:
    """Return the options of everything above the base."""
    return ConfigDict(dict(
        # width D of k per modality; t, c, p and r have M D. A text encoder's k have its own width
        features=64,
        lora_rank=8, lora_alpha=16.0,  # an adapter is scaled by lora_alpha / lora_rank
        # True: words, parts of a picture and learned vectors have separate adapters (DAMC)
        lora_by_kind=False,
        # kernels of the base that get an adapter, a regular expression over their paths
        lora_targets=r'^(decoder/.*|layers/)(attention/[qkvo]|gate|up|down|fc[12])$',
        # how the Transfer-MLLM reads an item: by k as one token ('item'), by k as one per modality
        # and a summary token ('compressed'), or by its image and text ('full'). 'recurrent' reads
        # as 'compressed' does, but `block` items at a time, after a memory of those before
        form='compressed', block=3,
        withhold=0.3,  # share of an item's words hidden from the reader in training
        # share of words hidden from the writer in training: with all of them it would not need the
        # features
        word_dropout=0.6,
        # share of the items of a step whose picture or whose text is hidden from the reader, for
        # items that may lack one (FedMLLM's condition)
        modality_dropout=0.0,
        # dot, cosine, bilinear, separable or concatenated
        critics=dict(align='separable', distil='separable'),
        # a merged adapter in place of distillation, made at the end of stage transfer; r are then
        # features of K under it, one per modality (training/merge_adapters.py)
        blend=dict(
            kind='',  # 'sum', 'mean', 'ties' or 'damc' (needs lora_by_kind); '': r is distilled
            of='knowledge,transfer', weights='1,1',  # adapters, and the weight of each
            keep=0.2,  # ties: share of an adapter's entries that count
            rank=0),  # of the result, by truncation; 0: exact
        reread=True,  # K reads an item again for r, under a separate adapter; False: r = A(k)
        # p is drawn from a normal distribution that the loss `bottleneck` holds to the standard one
        bottleneck=False,
        clusters=0,  # number of clusters of items, for the loss 'clusters'; 0: none
        # what is clustered: k, or the item vectors z of a recommender of ids, trained before
        clusters_of='k',
        # sessions that the Transfer-MLLM draws; the recommender learns them first. 0: none
        lessons=0,
        # (levels, size): residual k-means codes of k, which the Transfer-MLLM reads and predicts;
        # recommenders may read them as rows 'codes' (features/codes.py). (): none
        codes=(),
        # the Transfer-MLLM reads and predicts the 256 most frequent words and side values of items
        words=False,
        width=128,  # of z and h, the recommender
        # rows of content in z, comma-separated: r, k, given, codes; '': none
        recommend='r',
        use_id=True,  # z has an embedding of the item id; False: content only
        use_side=True,  # z has brand, category and price level, if the catalogue has them
        id_dropout=0.2,  # share of warm items trained with the shared embedding of cold items
        feature_hidden=128,  # hidden width of the MLP from content features to z; 0: linear
        feature_dropout=0.0,  # on content features
        # next to items, sessions are read with the time between events and the date (event_time),
        # the kinds of events, and the mean of the visitor's earlier items (data/events.py)
        event_time=False, event_kind=False, history=False,
        encoder='sr_gnn',  # of sessions: 'sr_gnn', 'gce_gnn' or 'attention'
        normalise=True,  # z and h have length one, and scores have a learned temperature
        temperature=0.07,  # its initial value
        repeats=False,  # scores of items in the prefix have a learned shift
        # companions: for each item, so many items that shared most sessions with it score higher
        # (models/sessions/companions.py); 0: none. Their strength, and its decay per position
        together=0, together_strength=0.7, together_decay=0.5,
        # entries that a session retrieves from a gated memory of the training sessions, whose next
        # items score higher (models/memory.py); 0: none
        memory=0,
        gnn_steps=1,  # sr_gnn: rounds of message passing
        positions=True,  # sr_gnn: the readout reads positions; the published one does not
        layers=1, heads=2,  # attention: layers and heads
        near=12, near_window=3,  # gce_gnn: global neighbours per item, and their largest distance
        dropout=0.2,  # in the encoder
        # layers of a small decoder that reads sessions of k in place of the base; 0: the base does
        session_layers=0,
        session_dropout=0.0,  # on the k that the Transfer-MLLM reads in training
        item_dropout=0.1,  # on item vectors that the encoder reads
    ))


def stage(**changes) -> ConfigDict:
    """Return the options of one stage: batches, optimiser and trained parameters.

    Args:
      **changes: options that differ from the defaults below.
    """
    out = ConfigDict(dict(
        batch_size=64,  # rows over all devices
        # parts in which a device reads its rows, one after the other. Memory holds the activations
        # of one part, everything is read twice, and losses still see the whole batch
        accumulate=1,
        # at most. 0, in stage knowledge only: the MLLM is not trained, and k are a checkpoint's
        # states as they are, with model.features their width and mllm.pooling 'last' or 'mean'
        steps=100,
        # passes over the training rows of sessions, of which small data have fewer than `steps`
        # steps: training/length.py. eval_every and weight_decay are those of `steps` steps. 0:
        # exactly `steps` steps
        epochs=0.0,
        every_prefix=True,  # every prefix of a session is a row; False: only the longest one
        optimiser='adamw',  # 'adam': L2 in place of decay, no clip; 'sgd': plain, constant rate
        learning_rate=1e-3,  # the peak, after the warm-up
        schedule='cosine',  # to zero at the last step, or 'constant'
        warmup=0.05,  # share of the steps
        rates=(),  # ((regex over parameter paths, factor), ...): factors of the learning rate
        later=(),  # ((regex, share of the steps), ...): parameters that learn only from then on
        weight_decay=0.01,  # of matrices, not of biases and norms
        clip=1.0,  # largest global norm of the gradient
        eval_every=0,  # steps between validations; 0: none, and the last step is kept
        patience=0,  # validations without a better likelihood until the stage ends; 0: never
        fresh='',  # rows computed from content with gradient, comma-separated: k, r
        refresh_every=0,  # joint: steps between encodings of the catalogue
        copy='',  # 'a->b': parameters below b start as those below a
        train='',  # regex over parameter paths: trained ones; others have no optimiser state
    ))
    # in this stage, in place of config.losses.<name>.weight; None: that weight
    out.weights = ConfigDict({name: placeholder(float) for name in losses()})
    out.update(changes)
    return out


def names(text: str) -> tuple[str, ...]:
    """Split an option that names several: 'a,b' -> ('a', 'b'); '' -> ()."""
    return tuple(part for part in text.split(',') if part)


def flat(tree: ConfigDict | dict, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the options of a nested config as ('a.b.c', value)."""
    for key, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value
