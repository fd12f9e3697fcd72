"""Raw Amazon files: `--config=configs/amazon.py`, or `--config=configs/amazon.py:VARIANT`.

    tiny          a smoke run of all stages
    qwen3vl_2b    Qwen3-VL-2B or its embedding model; needs --config.mllm.checkpoint=DIR
    llava_7b      LLaVA-1.5-7B; needs --config.mllm.checkpoint=DIR
    smolvlm       SmolVLM-256M, for a laptop; it is downloaded, or --config.mllm.checkpoint=DIR
    text_encoder  MiniLM, which is downloaded, or another BERT: --config.mllm.checkpoint=DIR

Without `--config.data.raw_dir=DIR` a run writes the planted catalogue and reads that.
"""

from tpad_jax import config


def get_config(variant: str = ''):
    """Return the config of a variant.

    Args:
      variant: '' or one of VARIANTS.

    Raises:
      ValueError: the variant is unknown.
    """
    c = config.get_config()
    c.name = 'amazon'
    if variant in ('', 'tiny'):
        c.update_from_flattened_dict(config.TAUGHT)
        c.rivals.knowledge_only.recommend = 'k,k'  # as wide as k and r
    if not variant:  # the epochs decide, on any data; steps below 600 have the decay they had
        c.stage.recommend.update(steps=6000, eval_every=1000, weight_decay=0.1)
    if variant:
        if variant not in VARIANTS:
            raise ValueError(f'configs/amazon.py has no variant {variant!r}: leave it out or name '
                             f'one of {", ".join(VARIANTS)}')
        c.name = f'amazon_{variant}'
        VARIANTS[variant](c)
    return c


def large(c, text_length):
    """Set the options of both checkpoints in place: a frozen bfloat16 base, float32 adapters.

    Args:
      c: config to change.
      text_length: tokens of an item's text.
    """
    c.mllm.update(param_dtype='bfloat16', dtype='bfloat16', remat='full', text_length=text_length)
    c.model.update(features=256, width=128, lora_rank=16, lora_alpha=32.0, item_dropout=0.2)
    c.stages = 'knowledge,transfer,recommend'  # stage joint would encode the catalogue often
    c.save_every, c.log_every = 200, 20
    c.stage.knowledge.update(steps=2000, learning_rate=2e-4)
    c.stage.transfer.update(steps=1000, learning_rate=2e-4)
    c.stage.recommend.update(batch_size=512, steps=20_000, eval_every=500, patience=8,
                             learning_rate=2e-3)
    c.losses.next_item.update(chunk=8192, dtype='bfloat16')
    for loss in c.losses.values():
        if 'by_row' in loss:
            loss.by_row = True


def qwen3vl_2b(c):
    """Set the options of Qwen3-VL-2B: 7 GiB on each of 8 devices, 8 GiB on one."""
    large(c, text_length=128)
    c.mllm.image_size = 256  # 64 tokens
    c.mllm.chunk = 32
    c.stage.knowledge.batch_size = 64
    c.stage.transfer.batch_size = 64


def llava_7b(c):
    """Set the options of LLaVA-7B: needs 24 GB, or 8 devices of 16 GB with model_shards=8."""
    large(c, text_length=128)
    c.mllm.chunk = 8
    c.stage.knowledge.batch_size = 32
    c.stage.transfer.batch_size = 32


def smolvlm(c):
    """Set the options of SmolVLM-256M without an accelerator: k are its states, and r = A(k).

    Items are then read once. Only the Transfer-MLLM's adapter is trained on the base.
    """
    c.mllm.update(checkpoint='HuggingFaceTB/SmolVLM-256M-Instruct', text_length=64, pooling='mean',
                  encode_rows=8, encode_part=256)
    c.model.update(features=576, reread=False)
    c.stages = 'knowledge,transfer,recommend'
    c.stage.knowledge.steps = 0
    c.stage.transfer.batch_size = 16


def text_encoder(c):
    """Set the options of a frozen text encoder: it reads every item once."""
    c.mllm.update(checkpoint='sentence-transformers/all-MiniLM-L6-v2',
                  text_length=126)  # 128 tokens with the first and the last
    c.model.reread = False
    c.stages = 'knowledge,transfer,recommend'  # stage joint would read items in every step
    c.stage.knowledge.steps = 0


VARIANTS = {variant.__name__: variant
            for variant in (config.tiny, qwen3vl_2b, llava_7b, smolvlm, text_encoder)}
