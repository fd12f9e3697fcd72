"""Read the whole catalogue with an MLLM: content in, one row per item out.

Items are sorted by the length of their texts into a few buckets, so that short texts are not read
with the padding of long ones; every call has the same number of items and one of a few lengths. A
thread gathers the contents of the calls to come and sends them to the device while it computes.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tpad_jax.core.digest import digest
from tpad_jax.distributed.devices import AXIS, Devices, compiled
from tpad_jax.errors import Stopped
from tpad_jax.features import store
from tpad_jax.models import tpad

ROWS = 120  # items per compiled call; the last call of a part is filled up
PART = 16 * ROWS  # items per file of an unfinished store
AHEAD = 2  # calls whose contents are gathered while another computes
LARGE = 1 << 24  # bytes of an array whose digest is computed where it lies
# Which parameters the rows of a name depend on, beside the adapter they are read under.
READS = {'k': ('base', 'knowledge'), 'r': ('base', 'knowledge', 'adapter')}


def adapters(spec: tpad.TPAD) -> dict[str, str]:
    """The adapter under which the rows of 'k' and of 'r' are read."""
    return {'k': 'knowledge', 'r': 'distil' if spec.reread else 'knowledge'}


def reads(spec: tpad.TPAD) -> dict[str, tuple[str, ...]]:
    """The roots of all parameters that the rows of 'k' and of 'r' depend on."""
    return {name: (*READS[name], f'lora/{own}') for name, own in adapters(spec).items()}


def buckets(tokens: np.ndarray, part: int) -> list[tuple[int, np.ndarray]]:
    """Items 1..V by the number of tokens they are read with: [(length, ids int64 [.])].

    Lengths are quarters of the whole, T, in multiples of 8. A bucket that does not fill a part
    joins the next longer one, which costs less than to compile for it.

    Args:
      tokens: int32 [V+1, T], -1 pads. part: items per file.
    """
    whole = tokens.shape[1]
    real = tokens >= 0
    need = np.where(real.any(1), whole - real[:, ::-1].argmax(1), 0)
    edges = sorted({min(whole, -(-whole * i // 32) * 8) for i in range(1, 5)})
    of = np.searchsorted(edges, need)
    found, waiting = [], np.zeros(0, np.int64)
    for i, length in enumerate(edges):
        waiting = np.union1d(waiting, 1 + np.flatnonzero(of[1:] == i))
        longer = (of[1:] > i).any()
        if len(waiting) and (len(waiting) >= part or not longer):
            found.append((length, waiting))
            waiting = np.zeros(0, np.int64)
    return found


class Encoder:
    """Params -> {name: float32 [V+1, ...]} of 'k' and 'r', on the device or into files.

    Compiled once for every length of text, however often it is called: the joint stage encodes anew
    every so many steps.

    Args:
      spec, content: the modules, and what they read. names: the rows to make.
      rows: items per compiled call, made a multiple of the devices. part: items per file.
      devices: the items of a call are spread over them; None: one device.
    """

    def __init__(self, spec: tpad.TPAD, content, names: tuple[str, ...], rows: int = ROWS,
                 part: int = PART, devices: Devices | None = None):
        self.names, self._spec, self._content = names, spec, content
        self._adapters = adapters(spec)
        self._reads = {name: reads(spec)[name] for name in names}
        self._devices = devices or Devices('jit', tuple(jax.local_devices()[:1]))
        shards = self._devices.shards
        self._rows = -(-min(rows, max(1, len(content.tokens) - 1)) // shards) * shards
        self._parts = [(length, ids[begin:begin + part])
                       for length, ids in buckets(content.tokens, part)
                       for begin in range(0, len(ids), part)]
        where = self._devices.shardings((0,))[0]
        self._split = where
        if isinstance(where, NamedSharding):
            self._split = NamedSharding(where.mesh, PartitionSpec(AXIS))
        self._read = compiled(self._encode, precision=self._devices.precision)
        self._lay = compiled(_lay, donate_argnums=0, out_shardings=where)
        self._whole = where

    def __call__(self, params: dict) -> dict:
        """Rows of the whole catalogue, on the devices and shared; row 0 is zero.

        Args:
          params: nested.
        """
        params, total = self._used(params), len(self._content.tokens)
        whole = {name: jax.device_put(jnp.zeros((total, *shape)), self._whole)
                 for name, shape in self._shapes(params).items()}
        with closing(self._calls(params, range(len(self._parts)))) as calls:
            for _, _, ids, rows in calls:
                # ids beyond the catalogue are dropped
                at = np.pad(ids, (0, self._rows - len(ids)), constant_values=total)
                whole = self._lay(whole, rows, at)
        return whole

    def some(self, params: dict, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of some items, {name: float32 [len(ids), ...]} on the host.

        Args:
          params: nested. ids: int [.], one or more; the calls are those of the longest texts.
        """
        params, length, found = self._used(params), self._parts[-1][0], []
        for begin in range(0, len(ids), self._rows):
            own, *arrays = self._contents(ids[begin:begin + self._rows], length)
            rows = jax.device_get(self._read(params, *arrays))
            found.append({name: x[:len(own)] for name, x in rows.items()})
        return {name: np.concatenate([rows[name] for rows in found]) for name in self.names}

    def made_by(self, params: dict, **more) -> dict[str, dict]:
        """What the rows of each name depend on, {name: {key: value}}; `more` is put before it."""
        params, content = self._used(params), self._content
        digests = {path: _digest(x) for path, x in flatten_dict(params, sep='/').items()}
        reader = self._spec.knowledge
        prompt = [list(getattr(reader.base, part)) for part in ('before', 'between', 'end')]
        tokens = hashlib.sha256(np.ascontiguousarray(content.tokens)).hexdigest()[:16]
        return {name: {
            **more, 'adapter': self._adapters[name], 'prompt': prompt, 'pooling': reader.pooling,
            'dtype': str(getattr(reader.base, 'dtype', 'float32')),
            'resolution': content.image.shape[1], 'text_length': content.tokens.shape[1],
            'tokens': tokens, 'parameters': hashlib.sha256('\n'.join(
                f'{path} {digest}' for path, digest in sorted(digests.items())
                if _under(path, self._reads[name])).encode()).hexdigest()[:16]}
            for name in self.names}

    def fill(self, params: dict, directory, made_by: dict[str, dict], progress=None,
             stopping=lambda: False) -> None:
        """Encode into a store what is not there yet, see `features.fill`; hosts share the parts.

        Args:
          params: nested. made_by: of this encoder and these params.
          progress: a bar like console.progress. stopping: asked after every call.

        Raises:
          InputError: the store is of something else. FloatingPointError: a row is not finite.
          Stopped: `stopping` answered True; finished parts are kept.
        """
        params, processes = self._used(params), jax.process_count()
        several = {'process': jax.process_index(), 'processes': processes,
                   'barrier': multihost_utils.sync_global_devices} if processes > 1 else {}
        if several:  # which do not ask equally often, as they would have to: it goes to its end
            stopping = bool
        store.fill(directory, partial(self._make, params, progress, stopping),
                      parts=[ids for _, ids in self._parts], shapes=self._shapes(params),
                      made_by=made_by, counts=self._counts(), **several)

    def leave(self, params: dict, directory, progress=None, stopping=lambda: False,
              rows: dict | None = None, **more) -> dict:
        """Leave the rows of `params` in a store and return them on the device, {name: [V+1, ...]}.

        Args:
          params, directory, progress, stopping: see `fill`.
          rows: what `self(params)` returned, where that was kept. more: see `made_by`.
        """
        made_by = self.made_by(params, **more)
        if rows and jax.process_index() == 0:
            for name in self.names:
                store.write(directory, name, np.asarray(rows[name]), made_by[name],
                               self._counts())
        if rows:
            return {name: jnp.asarray(rows[name]) for name in self.names}
        self.fill(params, directory, made_by, progress, stopping)
        return {name: jnp.array(store.read(directory, name)) for name in self.names}

    def _encode(self, params, image, has_image, tokens):
        rows = {}
        if 'k' in self.names:
            rows['k'] = tpad.read_items(self._spec, params, 'knowledge', image, has_image, tokens)
        if 'r' in self.names:
            rows['r'] = tpad.distil_items(self._spec, params, image, has_image, tokens)
        return {name: x.astype(jnp.float32) for name, x in rows.items()}

    def _calls(self, params, numbers) -> Iterator[tuple]:
        """(part, begin, ids, {name: rows on the device}) of parts; the next call is under way."""
        calls = [(number, begin) for number in numbers
                 for begin in range(0, len(self._parts[number][1]), self._rows)]
        with ThreadPoolExecutor(1) as pool:
            ahead, pending = deque(pool.submit(self._gather, *c) for c in calls[:AHEAD]), None
            for i, call in enumerate(calls):
                ids, *arrays = ahead.popleft().result()
                if i + AHEAD < len(calls):
                    ahead.append(pool.submit(self._gather, *calls[i + AHEAD]))
                found = self._read(params, *arrays)
                if pending is not None:
                    jax.block_until_ready(pending[-1])  # else contents would heap up on the device
                    yield pending
                pending = *call, ids, found
            if pending is not None:
                yield pending

    def _gather(self, number, begin):
        """A call's item ids and its contents, on their way to the devices."""
        length, ids = self._parts[number]
        return self._contents(ids[begin:begin + self._rows], length)

    def _contents(self, ids, length):
        at = np.pad(ids, (0, self._rows - len(ids)), mode='edge')
        c = self._content
        return ids, *jax.device_put((c.image[at], c.has_image[at], c.tokens[at, :length]),
                                    self._split)

    def _make(self, params, progress, stopping, numbers):
        """(part, {name: rows}) of some parts, for `features.fill`."""
        own = self._parts[jax.process_index()::jax.process_count()]
        share = sum(len(ids) for _, ids in own)
        before = share - sum(len(self._parts[number][1]) for number in numbers)
        title = 'encode ' + ','.join(self.names)
        bar = progress(title, share, before) if progress else nullcontext(lambda *_: None)
        done, begun, part = before, time.perf_counter(), {}
        with bar as tell, closing(self._calls(params, numbers)) as calls:
            for number, begin, ids, rows in calls:
                size = len(self._parts[number][1])
                for name, x in jax.device_get(rows).items():
                    x, rest = x[:len(ids)], x.shape[1:]
                    bad = ids[~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))]
                    if len(bad):
                        raise FloatingPointError(f'rows {name!r} of {len(bad)} items are not '
                                                 f'finite, {bad[:5].tolist()} among them')
                    part.setdefault(name, np.empty((size, *rest), np.float32))
                    part[name][begin:begin + len(ids)] = x
                done += len(ids)
                tell(done, f'{(done - before) / (time.perf_counter() - begun):.0f} items/s')
                if begin + len(ids) == size:
                    yield number, part
                    part = {}
                if stopping() and done < share:
                    raise Stopped('stopped while the catalogue was encoded')

    def _counts(self):
        c = self._content
        return {'items': len(c.tokens) - 1, 'without_image': int((~c.has_image[1:]).sum()),
                'broken_images': c.broken}

    def _shapes(self, params):
        """Of a row; of the shapes of the first call, whose trace is this one."""
        c, length = self._content, self._parts[0][0]
        given = (jax.ShapeDtypeStruct((self._rows, *x.shape[1:]), x.dtype)
                 for x in (c.image, c.has_image, c.tokens[:, :length]))
        return {name: x.shape[1:] for name, x in self._read.eval_shape(params, *given).items()}

    def _used(self, params):
        """The part of the parameters that is read, on the devices as parallel.RULES have it."""
        flat = flatten_dict(params, sep='/')
        roots = set().union(*self._reads.values())
        used = {path: x for path, x in flat.items() if _under(path, roots)}
        return unflatten_dict(self._devices.share(used), sep='/')


def encoder(spec: tpad.TPAD, content, names: tuple[str, ...], **options) -> Encoder:
    """See `Encoder`."""
    return Encoder(spec, content, names, **options)


def _lay(whole, rows, at):
    return {name: x.at[at].set(rows[name], mode='drop') for name, x in whole.items()}


def _under(path, roots):
    return any(path == root or path.startswith(root + '/') for root in roots)


def _digest(x) -> str:
    """Dtype, shape and bytes of an array; a large one's bytes are summed up on its device."""
    if x.nbytes >= LARGE:
        mark = f'{int(digest(x)):08x}'
    else:
        mark = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
    return f'{jnp.dtype(x.dtype).name} {list(x.shape)} {mark}'
