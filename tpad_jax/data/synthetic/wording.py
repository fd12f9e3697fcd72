"""The words of the planted catalogue: attribute names, item texts and captions.

Everything is lower case, and the vocabulary has fewer than 400 distinct words, so that a small
tokenizer trained on it knows nearly all of them. No filler word is an attribute's name.
"""

import numpy as np

CATEGORIES = ('mug', 'bottle', 'shirt', 'trousers', 'boot', 'hat', 'chair', 'lamp', 'umbrella',
              'bag', 'clock', 'kite')
BRANDS = ('acme', 'harbour', 'summit', 'willow', 'orchard', 'ember', 'falcon', 'meadow')
STYLES = ('plain', 'striped', 'dotted', 'checked', 'ringed')
COLOURS = ('red', 'orange', 'yellow', 'green', 'teal', 'blue', 'purple', 'pink')
MATERIALS = ('steel', 'wood', 'glass', 'leather', 'plastic')

ATTRIBUTES = ('category', 'brand', 'style', 'colour', 'material')  # the columns of `attributes`
VALUES = (CATEGORIES, BRANDS, STYLES, COLOURS, MATERIALS)
SIZES = tuple(len(values) for values in VALUES)
MENTIONED = (0.9, 0.9, 0.6, 0.4, 0.7)  # probability that the texts mention the attribute at all
WRONG = 0.03  # probability that a mentioned attribute is another value of the same attribute

_NOUNS = ('item', 'piece', 'product', 'find', 'model', 'design')
_OPENINGS = ('', '', 'new', 'classic', 'handy', 'lovely', 'sturdy', 'useful', 'modern', 'small',
             'large', 'elegant', 'trusty', 'cheerful', 'simple', 'neat')
_TAILS = ('', '', '', '', 'for every day', 'for the home', 'for your garden', 'as a gift',
          'for the office', 'with free shipping', 'for long trips', 'for rainy days',
          'in gift box', 'for young and old')
_STYLE = ('with a {} pattern', 'in {} look', 'has a {} surface', '{} all over', 'comes {}')
_COLOUR = ('in {}', 'colour is {}', 'a soft {} tone', 'finished in {}', 'tinted {}')
_MATERIAL = ('made of {}', 'built from {}', 'good {} quality', 'body of {}', 'pure {}')
_BY_BRAND = ('', '', '', 'by {}', 'from {}', 'genuine {}')
_FILLERS = ('easy to clean', 'ships within two days', 'loved by many', 'a fine present',
            'lasts for years', 'ready to use', 'fits most homes', 'rated five stars',
            'safe for children', 'no tools needed', 'arrives well packed', 'one year warranty',
            'comfortable and practical', 'great value', 'limited offer', 'our best seller',
            'tested with care', 'nothing gets lost', 'take it anywhere', 'made with love',
            'friends will ask', 'keeps its shape', 'you will smile', 'simply better')


def _pick(choices, uniform):
    """Pick a choice by a number in [0, 1), all equally likely."""
    return choices[int(uniform * len(choices))]


def mentions(attributes, uniforms):
    """Draw the values that the texts of every item mention.

    Each of an item's attributes is mentioned at the rate `MENTIONED`, independently of all others.
    A mentioned value is wrong at the rate `WRONG`; each *other* value is then equally likely.

    Args:
      attributes: int32 [M, 5]. The true values, in the order of `ATTRIBUTES`.
      uniforms: float64 [M, 5, 3] in [0, 1). Is it mentioned, is it wrong, which other value.

    Returns:
      int32 [M, 5], -1 where an attribute is not mentioned.
    """
    sizes = np.array(SIZES)
    other = (attributes + 1 + (uniforms[..., 2] * (sizes - 1)).astype(np.int32)) % sizes
    value = np.where(uniforms[..., 1] < WRONG, other, attributes)
    return np.where(uniforms[..., 0] < np.array(MENTIONED), value, -1).astype(np.int32)


def texts(attributes, rng):
    """Write title, brand and description of every item: its attributes among filler.

    The title mentions the category. The brand field holds the brand, and a third of the
    descriptions repeat it. Title or description mention style, colour and material, each once. A
    title names an unmentioned category by a word like 'item'; an unmentioned brand is ''. The three
    together have at most 28 words. With one seed the texts of the first items do not depend on the
    number of items.

    Args:
      attributes: int32 [M, 5] in the order of `ATTRIBUTES`.
      rng: numpy generator.

    Returns:
      Three lists of M str: titles, brands, descriptions.
    """
    uniforms = rng.random((len(attributes), 33))
    mentioned = mentions(attributes, uniforms[:, :15].reshape(-1, 5, 3))
    titles, brands, descriptions = [], [], []
    for (category, brand, style, colour, material), u in zip(
            mentioned.tolist(), uniforms[:, 15:].tolist(), strict=True):
        noun = CATEGORIES[category] if category >= 0 else _pick(_NOUNS, u[0])
        title, phrases = [_pick(_OPENINGS, u[1])], []
        for value, names, forms, place, form in (
                (style, STYLES, _STYLE, u[2], u[3]), (colour, COLOURS, _COLOUR, u[4], u[5]),
                (material, MATERIALS, _MATERIAL, u[6], u[7])):
            if value < 0:
                continue
            if place < 0.5:
                title.append(names[value])
            else:
                phrases.append(_pick(forms, form).format(names[value]))
        title += [noun, _pick(_TAILS, u[8])]
        if brand >= 0:
            phrases.append(_pick(_BY_BRAND, u[9]).format(BRANDS[brand]))
        first = int(u[10] * len(_FILLERS))  # two different fillers
        second = (first + 1 + int(u[11] * (len(_FILLERS) - 1))) % len(_FILLERS)
        phrases += [_FILLERS[first], _FILLERS[second]]
        phrases = [phrase for phrase in phrases if phrase]
        order = np.argsort(u[12:12 + len(phrases)])
        titles.append(' '.join(word for word in title if word))
        brands.append(BRANDS[brand] if brand >= 0 else '')
        descriptions.append('. '.join(phrases[k] for k in order) + '.')
    return titles, brands, descriptions


def caption(attributes):
    """Write a sentence per item with its five true attributes, to pretrain the small base only.

    Args:
      attributes: int32 [M, 5] in the order of `ATTRIBUTES`.

    Returns:
      List of M str like 'category mug brand acme style striped colour red material steel'.
    """
    return [' '.join(f'{name} {values[k]}' for name, values, k in
                     zip(ATTRIBUTES, VALUES, row, strict=True))
            for row in np.asarray(attributes).tolist()]
