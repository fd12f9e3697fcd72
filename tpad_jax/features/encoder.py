"""Read the catalogue with an MLLM: content in, one row per item out.

Items are sorted by the length of their texts into a few buckets, so that short texts are not read
with the padding of long ones, and items without a picture do not pay for one. Every call has the
same number of items and one of a few lengths. A
thread gathers the contents of the next calls and sends them to the device while it computes.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import lru_cache, partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.core.digest import digest
from tpad_jax.distributed import hosts
from tpad_jax.distributed.devices import Devices, compiled
from tpad_jax.errors import Stopped
from tpad_jax.features import store
from tpad_jax.models import readers, tpad

ROWS = 120  # items per compiled call; the last call of a part is padded
BLIND = 120  # items without a picture from which on they have calls to themselves. It does not
# depend on `rows`, so a store resumes with the same parts
PART = 16 * ROWS  # items per file of an unfinished store
AHEAD = 2  # calls whose contents are gathered while another computes
LARGE = 1 << 24  # bytes from which the digest of an array is computed on its device


def reads(spec: tpad.TPAD) -> dict[str, tuple[str, ...]]:
    """Return the roots of all parameters that the rows of 'k' and of 'r' depend on.

    The last one is the adapter under which the rows are read.
    """
    distil = 'lora/distil' if spec.reread else 'lora/knowledge'
    return {'k': ('base', 'knowledge', 'lora/knowledge'),
            'r': ('base', 'knowledge', 'adapter', distil)}


def buckets(tokens: np.ndarray, part: int, has_image: np.ndarray
            ) -> list[tuple[int, bool, np.ndarray]]:
    """Group items 1..V by what they are read with: the number of tokens, and whether a picture.

    The lengths are quarters of T in multiples of 8. A bucket that does not fill a part joins the
    next longer one, and fewer than BLIND items without a picture join those with one. That costs
    less than another compilation.

    Args:
      tokens: int32 [V+1, T]. -1 is padding.
      part: items per file.
      has_image: bool [V+1].

    Returns:
      [(length, whether there are pictures, ids int64 [.])], the longest text in the last.
    """
    blind = np.flatnonzero(~has_image[1:]) + 1
    seen = has_image.any()
    if seen and len(blind) >= BLIND:
        return sorted(((length, pictures, ids[lengths]) for pictures, ids in (
            (False, blind), (True, np.flatnonzero(has_image)))
            for length, lengths in _lengths(tokens[ids], part)), key=lambda group: group[0])
    return [(length, bool(seen), 1 + ids) for length, ids in _lengths(tokens[1:], part)]


def _lengths(tokens, part):
    """Group texts int32 [n, T] by length: [(length, places int64 [.])]."""
    longest = tokens.shape[1]
    real = tokens >= 0
    need = np.where(real.any(1), longest - real[:, ::-1].argmax(1), 0)
    edges = sorted({min(longest, -(-longest * i // 32) * 8) for i in range(1, 5)})
    bucket = np.searchsorted(edges, need)
    groups, waiting = [], np.zeros(0, np.int64)
    for i, length in enumerate(edges):
        waiting = np.union1d(waiting, np.flatnonzero(bucket == i))
        longer = (bucket > i).any()
        if len(waiting) and (len(waiting) >= part or not longer):
            groups.append((length, waiting))
            waiting = np.zeros(0, np.int64)
    return groups


class Encoder:
    """Params -> {name: float32 [V+1, ...]} of 'k' and 'r', on the device or into files.

    Each length of text is compiled once, however often the encoder is called. The joint stage calls
    it every few steps.

    Args:
      spec: the modules.
      content: the images and texts they read.
      names: the rows to make.
      rows: items per compiled call, rounded up to a multiple of the devices.
      part: items per file.
      devices: devices that share the items of a call. None: one device.
    """

    def __init__(self, spec: tpad.TPAD, content, names: tuple[str, ...], rows: int = ROWS,
                 part: int = PART, devices: Devices | None = None):
        self.names, self._spec, self._content = names, spec, content
        self._reads = {name: reads(spec)[name] for name in names}
        self._devices = devices or Devices('jit', tuple(jax.local_devices()[:1]))
        shards = self._devices.shards
        self._rows = -(-min(rows, max(1, len(content.tokens) - 1)) // shards) * shards
        self._parts = [(kind, ids[begin:begin + part]) for *kind, ids in buckets(
            content.tokens, part, content.has_image & (content.image.shape[1] > 0))
            for begin in range(0, len(ids), part)]
        self._everywhere = self._devices.shardings(0)
        self._read = _reader(spec, names, self._devices.precision)
        self._write = compiled(_write, donate_argnums=0, out_shardings=self._everywhere)

    def __call__(self, params: dict) -> dict:
        """Make the rows of the catalogue on the devices, a copy on each. Row 0 is zero.

        Args:
          params: nested.
        """
        params, total = self._used(params), len(self._content.tokens)
        tables = {name: jax.device_put(jnp.zeros((total, *shape)), self._everywhere)
                  for name, shape in self._shapes(params).items()}
        with closing(self._calls(params, range(len(self._parts)))) as calls:
            for _, _, ids, rows in calls:
                # ids beyond the catalogue are dropped
                at = np.pad(ids, (0, self._rows - len(ids)), constant_values=total)
                tables = self._write(tables, rows, at)
        return tables

    def some(self, params: dict, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Make the rows of some items on the host, {name: float32 [len(ids), ...]}.

        Args:
          params: nested.
          ids: int [.], at least one. All are read with the length of the longest texts.
        """
        params, parts = self._used(params), []
        kind = self._parts[-1][0][0], bool(self._content.has_image[ids].any())
        for begin in range(0, len(ids), self._rows):
            arrays = self._contents(ids[begin:begin + self._rows], *kind)
            parts.append(jax.device_get(self._read(params, *arrays)))
        return {name: np.concatenate([rows[name] for rows in parts])[:len(ids)]
                for name in self.names}

    def compile(self, params: dict) -> None:
        """Compile every call, so that the first one finds it compiled.

        Args:
          params: nested; shapes and dtypes.
        """
        used = self._read_paths(params)
        used = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                            used, self._devices.shardings(used))
        params = unflatten_dict(used, sep='/')
        for kind, ids in {tuple(kind): ids for kind, ids in self._parts}.items():
            self._read.lower(params, *self._contents(ids[:self._rows], *kind)).compile()

    def made_by(self, params: dict, **more) -> dict[str, dict]:
        """Describe everything that the rows of each name depend on, {name: {key: value}}.

        Args:
          params: nested.
          **more: keys to put first.
        """
        params, content = self._used(params), self._content
        digests = {path: _digest(x) for path, x in flatten_dict(params, sep='/').items()}
        reader = self._spec.knowledge
        prompt = [list(getattr(reader.base, part)) for part in ('before', 'between', 'end')]
        tokens = _sha256(np.ascontiguousarray(content.tokens))[:16]
        shared = {'prompt': prompt, 'pooling': reader.pooling, 'tokens': tokens,
                  'dtype': str(getattr(reader.base, 'dtype', 'float32')),
                  'resolution': content.image.shape[1], 'text_length': content.tokens.shape[1]}
        return {name: {
            **more, **shared, 'adapter': self._reads[name][-1].removeprefix('lora/'),
            'parameters': _sha256('\n'.join(
                f'{path} {mark}' for path, mark in sorted(digests.items())
                if _under(path, self._reads[name])).encode())[:16]} for name in self.names}

    def leave(self, params: dict, directory, rows: dict | None = None, **options) -> dict:
        """Write the rows of `params` to a store and return them on the device.

        Args:
          params: nested.
          directory: of the store.
          rows: the result of `self(params)`, if it exists already.
          **options: see `fill`.

        Returns:
          {name: float32 [V+1, ...]}.
        """
        if not rows:
            self.fill(params, directory, **options)
            return {name: jnp.array(store.read(directory, name)) for name in self.names}
        made_by = self.made_by(params, **options.get('origin', {}))
        for name in self.names if jax.process_index() == 0 else ():
            store.write(directory, name, np.asarray(rows[name]), made_by[name], self._counts())
        return {name: jnp.asarray(rows[name]) for name in self.names}

    def fill(self, params: dict, directory, progress=None, stopping=lambda: False,
             lease: float = store.LEASE, origin: dict | None = None) -> None:
        """Write the rows of `params` to a store, together with all processes that do so.

        A store is resumed where it lacks rows, see `store.fill`.

        Args:
          params: nested.
          directory: of the store.
          progress: a bar like console.progress.
          stopping: asked after every call. In a run of several processes it is not: they would not
            ask equally often.
          lease: seconds without a finished call after which another process makes a part.
          origin: more keys of `made_by`.

        Raises:
          InputError: the store has another origin.
          FloatingPointError: a row is not finite.
          Stopped: `stopping` answered True. Finished parts stay.
        """
        made_by, params = self.made_by(params, **(origin or {})), self._used(params)
        stopping = bool if jax.process_count() > 1 else stopping
        with hosts.joined('features'):
            store.fill(directory, partial(self._make, params, progress, stopping),
                       parts=[ids for _, ids in self._parts], shapes=self._shapes(params),
                       made_by=made_by, counts=self._counts(), lease=lease, stopping=stopping)

    def _counts(self):
        c = self._content
        return {'items': len(c.tokens) - 1, 'without_image': int((~c.has_image[1:]).sum()),
                'broken_images': c.broken}

    def _calls(self, params, numbers) -> Iterator[tuple]:
        """Yield (part, begin, ids, {name: rows on the device}) while the next call computes."""
        calls = ((number, begin, self._parts[number][1][begin:begin + self._rows])
                 for number in numbers
                 for begin in range(0, len(self._parts[number][1]), self._rows))
        with ThreadPoolExecutor(1) as pool:
            def gather(call):
                number, _, ids = call
                return call, pool.submit(self._contents, ids, *self._parts[number][0])

            ahead, pending = deque(map(gather, islice(calls, AHEAD))), None
            while ahead:
                call, contents = ahead.popleft()
                arrays = contents.result()
                ahead.extend(map(gather, islice(calls, 1)))
                rows = self._read(params, *arrays)
                if pending is not None:
                    jax.block_until_ready(pending[-1])  # limits the contents on the device
                    yield pending
                pending = *call, rows
            if pending is not None:
                yield pending

    def _contents(self, ids, length, pictures):
        """Return what a call reads of some items, on its way to the devices."""
        at = np.pad(ids, (0, self._rows - len(ids)), mode='edge')
        c = self._content
        image = c.image if pictures else c.image[:, :0, :0]  # a reader sees no image of side 0
        return jax.device_put((image[at], c.has_image[at], c.tokens[at, :length]),
                              self._devices.split())

    def _make(self, params, progress, stopping, numbers, missing):
        """Yield (part, {name: rows}) of some of the missing parts, for `store.fill`.

        Processes take parts in the same order, so the number of one shows how far all of them are.
        """
        sizes = [len(self._parts[number][1]) for number in missing]
        before = dict(zip(missing, np.cumsum([len(self._content.tokens) - 1 - sum(sizes), *sizes]
                                             ).tolist(), strict=False))
        share = len(self._content.tokens) - 1
        title = 'encode ' + ','.join(self.names)
        bar = (progress(title, share, before[missing[0]]) if progress
               else nullcontext(lambda *_: None))
        made, begun, part = 0, time.perf_counter(), {}
        with bar as report, closing(self._calls(params, numbers)) as calls:
            for number, begin, ids, rows in calls:
                size = len(self._parts[number][1])
                for name, x in jax.device_get(rows).items():
                    x, rest = x[:len(ids)], x.shape[1:]
                    bad = ids[~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))]
                    if len(bad):
                        raise FloatingPointError(f'rows {name!r} of {len(bad)} items are not '
                                                 f'finite, for example items {bad[:5].tolist()}')
                    part.setdefault(name, np.empty((size, *rest), np.float32))
                    part[name][begin:begin + len(ids)] = x
                made += len(ids)
                end, done = begin + len(ids), before[number] + begin + len(ids)
                rate = made / (time.perf_counter() - begun)
                report(done, f'{rate:.0f} items/s' if rate >= 10 else f'{rate:.2g} items/s')
                yield number, part if end == size else None
                if end == size:
                    part = {}
                if stopping() and done < share:
                    raise Stopped('stopped while the catalogue was encoded')

    def _shapes(self, params):
        """Return the shape of a row per name. The first call reuses this trace."""
        c, (length, _) = self._content, self._parts[0][0]
        shapes = (jax.ShapeDtypeStruct((self._rows, *x.shape[1:]), x.dtype)
                  for x in (c.image, c.has_image, c.tokens[:, :length]))
        return {name: x.shape[1:] for name, x in self._read.eval_shape(params, *shapes).items()}

    def _used(self, params):
        """Place the parameters that are read on the devices, as devices.RULES cut them."""
        return unflatten_dict(self._devices.share(self._read_paths(params)), sep='/')

    def _read_paths(self, params):
        """Return the parameters that are read, {path: array}."""
        roots = set().union(*self._reads.values())
        return {path: x for path, x in flatten_dict(params, sep='/').items() if _under(path, roots)}


@lru_cache(maxsize=16)  # jobs of one process with equal modules compile it once
def _reader(spec, names, precision):
    def read(params, image, has_image, tokens):
        makers = {'k': partial(readers.read_items, spec, params, 'knowledge'),
                  'r': partial(readers.distil_items, spec, params)}
        return {name: makers[name](image, has_image, tokens).astype(jnp.float32) for name in names}

    return compiled(read, precision=precision)


def _write(tables, rows, at):
    return {name: x.at[at].set(rows[name], mode='drop') for name, x in tables.items()}


def _under(path, roots):
    return any(path == root or path.startswith(root + '/') for root in roots)


def _sha256(data) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(x) -> str:
    """Return dtype, shape and a digest of an array. A large one stays on its device."""
    if x.nbytes >= LARGE:
        mark = f'{int(digest(x)):08x}'
    else:
        mark = _sha256(np.ascontiguousarray(x).tobytes())
    return f'{jnp.dtype(x.dtype).name} {list(x.shape)} {mark}'
