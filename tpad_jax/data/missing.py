"""Items that lose a modality on purpose, to measure what a missing one costs.

The harness of FedMLLM (arXiv 2411.14717), here for the items of a catalogue.
"""

import hashlib
from dataclasses import replace

import numpy as np

from tpad_jax.data.catalogue import Data
from tpad_jax.errors import refuse_if

PARTS = 'all', 'warm', 'cold'


def hide(data: Data, missing, seed: int) -> tuple[Data, dict]:
    """Take the picture from some items and the text from others.

    An item's draw depends on its id and the seed alone, so a higher rate takes from the same items
    and from more. Only items with a picture lose anything, and none loses both. Side features stay.

    Args:
      data: the catalogue.
      missing: config.data.missing. 'image' and 'text' are shares of the items with a picture, 'of'
        the items they are drawn from, of PARTS.
      seed: of the draws.

    Returns:
      The data that is left, and {'image', 'text'}, the numbers of items that lost it. Without rates
      the data is the one given.

    Raises:
      InputError: the two shares add up to more than 1, or no such item has a picture.
    """
    refuse_if(missing.image + missing.text > 1, f'config.data.missing.image={missing.image} and '
              f'text={missing.text}: some items would have nothing left. Expected a sum of at most '
              '1. Fix: lower one of them.')
    if not (missing.image or missing.text):
        return data, {}
    digests = (hashlib.blake2b(f'{seed} {asin}'.encode(), digest_size=7).digest()
               for asin in data.asins[1:])
    drawn = np.array([1.0, *(int.from_bytes(digest) / 2**56 for digest in digests)])
    eligible = data.has_image & {'all': True, 'warm': data.warm, 'cold': ~data.warm}[missing.of]
    refuse_if(not eligible.any(), f'config.data.missing: none of the items ({missing.of}) has a '
              'picture, so that none can lose one of two modalities. Expected pictures. Fix: leave '
              'the option out, or name other data.')
    blind = eligible & (drawn < missing.image)
    mute = eligible & (drawn >= 1 - missing.text)
    texts = ['' if lost else text for lost, text in zip(mute, data.texts, strict=True)]
    mark = hashlib.sha256(f'{data.fingerprint} {missing.to_dict()} {seed}'.encode()).hexdigest()
    return (replace(data, texts=texts, has_image=data.has_image & ~blind, fingerprint=mark),
            {'image': int(blind.sum()), 'text': int(mute.sum())})
