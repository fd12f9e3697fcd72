"""Read the directory of a text encoder: its sizes, and how a text's vector is read off.

The sizes are in config.json. The rest is in the files of sentence-transformers, where a directory
has them: modules.json names the modules, and each module has a config.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tpad_jax.errors import refuse_if, refusing

FAMILIES = ('bert', 'roberta', 'xlm-roberta')  # model_type of transformers
POOLING = {'mean': 'pooling_mode_mean_tokens', 'cls': 'pooling_mode_cls_token'}
MODULES = ['Transformer', 'Pooling', 'Normalize']  # in this order; the last may be absent


@dataclass(frozen=True)
class TextEncoder:
    """A bidirectional encoder of texts: LayerNorm after each block, learned positions.

    Attributes:
      family: one of FAMILIES.
      vocab: number of tokens.
      width: of the states.
      layers: number of blocks.
      heads: attention heads.
      hidden: inner width of the MLP.
      activation: of the MLP.
      eps: of the norms.
      places: rows of the table of positions.
      first: position of the first token; RoBERTa reserves the positions before it.
      kinds: rows of the table of token types. Every token has type 0.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    eps: float
    places: int
    first: int
    kinds: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text, special tokens included."""
        return self.places - self.first


def sizes(config, only: Callable, activations: tuple[str, ...]) -> TextEncoder:
    """Take the sizes from a config of transformers.

    Args:
      config: of the checkpoint.
      only: (key, choices) -> the value of the key, which it refuses if it is not among the choices.
      activations: the choices of the MLP.
    """
    only('position_embedding_type', (None, 'absolute'))
    for option in ('is_decoder', 'add_cross_attention'):
        only(option, (None, False))
    c, first = config, 0 if config.model_type == 'bert' else config.pad_token_id + 1
    return TextEncoder(
        c.model_type, c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads,
        c.intermediate_size, only('hidden_act', activations), c.layer_norm_eps,
        c.max_position_embeddings, first, c.type_vocab_size)


class Pooling(NamedTuple):
    """How a text's vector is read off its states.

    Attributes:
      kind: a key of POOLING. '': the directory does not say.
      normalise: whether the vector is scaled to length one.
      longest: tokens of the longest text, special tokens included. 0: as the positions allow.
    """

    kind: str = ''
    normalise: bool = False
    longest: int = 0


def pooling(directory) -> Pooling:
    """Read the files of sentence-transformers in a directory, which may have none.

    Raises:
      InputError: a file cannot be read, or it names a module or an option that is not implemented.
    """
    file = Path(directory) / 'modules.json'
    if not file.is_file():
        return Pooling()
    with refusing((OSError, ValueError, TypeError, KeyError, AttributeError, IndexError),
                  f'{file}, or a file it names, cannot be read',
                  'Expected the files of sentence-transformers. Fix: download them again'):
        modules = json.loads(file.read_text())
        kinds = [module['type'].rpartition('.')[2] for module in modules]
        refuse_if(kinds not in (MODULES, MODULES[:2]), f'{file}: modules {", ".join(kinds)} are '
                  f'not implemented. Expected {", ".join(MODULES)}. Fix: choose another checkpoint')
        root, folder = (file.parent / Path(module['path']).name for module in modules[:2])
        about = json.loads((folder / 'config.json').read_text())
        modes = sorted(key for key, on in about.items() if key.startswith('pooling_mode_') and on)
        kind = next((k for k, mode in POOLING.items() if modes == [mode]), about.get(
            'pooling_mode', ''))
        refuse_if(kind not in POOLING or not about.get('include_prompt', True),
                  f'{folder}/config.json: pooling {", ".join(modes) or kind!r} with include_prompt='
                  f'{about.get("include_prompt", True)} is not implemented. Expected one of '
                  f'{", ".join(POOLING.values())}. Fix: choose another checkpoint')
        settings = {}
        for found in root.glob('sentence_*_config.json'):
            settings |= json.loads(found.read_text())
        refuse_if(settings.get('do_lower_case'), f'{root}: do_lower_case=true is not implemented. '
                  'Expected a tokenizer that lowers texts itself. Fix: choose another checkpoint')
        return Pooling(kind, kinds == MODULES, int(settings.get('max_seq_length') or 0))
