"""Texts read per second by a text encoder of MiniLM's shape: `python -m benchmarks.encode_text`.

Random parameters: 6 layers, 384 wide, 12 heads. Ours and torch's (`transformers`, its attention
'sdpa') read the same tokens in float32, in turns. Rates are per second of processor time, so that
other programs on the machine matter little: multiply them by the number of cores.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from tpad_jax.distributed.devices import compiled
from tpad_jax.models.hf import bert
from tpad_jax.models.hf.sentence import TextEncoder
from tpad_jax.models.mllms import TextReader

FLAGS = flags.FLAGS
MINILM = TextEncoder('bert', 30522, 384, 6, 12, 1536, 'gelu', 1e-12, 512, 0, 2)


def ours():
    """(tokens int32 [B, L]) -> vectors, by the reader of a run."""
    leaves, tree = jax.tree.flatten(bert.shapes(MINILM))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [
        rng.standard_normal(x.shape, np.float32) * 0.05 + (x.ndim == 1) for x in leaves])
    reader = TextReader(bert.Bert(MINILM, before=(101,), end=(102,), normalise=True))
    read = compiled(reader.apply)
    params = jax.device_put({'params': {'base': params}})
    return lambda tokens: np.asarray(read(params, None, None, tokens[:, 1:-1]))


def theirs():
    """The same by torch, with other random parameters."""
    import torch
    import transformers
    torch.set_num_threads(1)  # threads that wait would count as processor time
    s = MINILM
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=s.vocab, hidden_size=s.width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, intermediate_size=s.hidden), add_pooling_layer=False).eval()

    def read(tokens):
        with torch.no_grad():
            return model(torch.from_numpy(tokens).long()).last_hidden_state.mean(1).numpy()

    return read


def main(argv):
    """Time both sides at several lengths, print the rates, write JSON."""
    del argv
    sides, out = {'tpad_jax': ours(), 'torch': theirs()}, []
    for length in map(int, FLAGS.lengths):
        tokens = np.random.default_rng(0).integers(
            999, MINILM.vocab, (FLAGS.rows, length)).astype(np.int32)
        seconds = {name: [] for name in sides}
        for turn in range(FLAGS.turns + 1):
            for name, read in sides.items():
                begun = time.process_time()
                read(tokens)
                if turn:  # the first compiles
                    seconds[name].append(time.process_time() - begun)
        out += [{'tokens': length, 'side': name, 'texts_per_core_second': FLAGS.rows / min(s)}
                for name, s in seconds.items()]
        print(f'{length} tokens: ' + ', '.join(
            f'{x["side"]} {x["texts_per_core_second"]:.0f} texts per second of a core'
            for x in out[-2:]), flush=True)
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    flags.DEFINE_list('lengths', ['32', '64', '128'], 'tokens of a text')
    flags.DEFINE_integer('rows', 32, 'texts of a call')
    flags.DEFINE_integer('turns', 4, 'turns of each side')
    flags.DEFINE_string('out', '', 'JSON file to write')
    app.run(main)
