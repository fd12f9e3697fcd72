"""Raw Amazon files: `--config=configs/amazon.py`, or with one of these behind a colon.

    tiny        a smoke run of all stages
    qwen3vl_2b  Qwen3-VL-2B (or its embedding variant); give --config.mllm.checkpoint=DIR
    llava_7b    LLaVA-1.5-7B; likewise

Without `--config.data.raw_dir=DIR` the planted catalogue is written and read in its place.
"""

from tpad_jax import config


def get_config(variant: str = ''):
    """`variant`: '' or one of VARIANTS.

    Raises:
      ValueError: another variant.
    """
    c = config.get_config()
    c.name = 'amazon'
    if variant:
        if variant not in VARIANTS:
            raise ValueError(f'configs/amazon.py has no variant {variant!r}: leave it out or name '
                             f'one of {", ".join(VARIANTS)}')
        c.name = f'amazon_{variant}'
        VARIANTS[variant](c)
    return c


def large(c, text_length):
    """What both checkpoints share: a frozen base in bfloat16, adapters in float32."""
    c.mllm.update(param_dtype='bfloat16', dtype='bfloat16', remat='full', text_length=text_length)
    c.model.update(features=256, width=128, lora_rank=16, lora_alpha=32.0)
    c.stages = 'knowledge,transfer,recommend'  # joint reads the whole catalogue again and again
    c.save_every, c.log_every = 200, 20
    c.stage.knowledge.update(steps=2000, learning_rate=2e-4)
    c.stage.transfer.update(steps=1000, learning_rate=2e-4)
    c.stage.recommend.update(steps=20_000, eval_every=500, patience=8, learning_rate=2e-3)
    c.losses.next_item.update(chunk=8192, dtype='bfloat16')
    for loss in c.losses.values():
        if 'by_row' in loss:
            loss.by_row = True


def qwen3vl_2b(c):
    """About 7 GiB on each of 8 devices, 8 on one: a TPU v5e has 16."""
    large(c, text_length=128)
    c.mllm.image_size = 256  # 64 tokens
    c.mllm.chunk = 32
    c.stage.knowledge.batch_size = 64
    c.stage.transfer.batch_size = 64


def llava_7b(c):
    """A device of 24 GB holds the base whole; on 8 of 16 GB set --config.model_shards=8."""
    large(c, text_length=128)
    c.mllm.chunk = 8
    c.stage.knowledge.batch_size = 32
    c.stage.transfer.batch_size = 32


VARIANTS = {variant.__name__: variant for variant in (config.tiny, qwen3vl_2b, llava_7b)}
