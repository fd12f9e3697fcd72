"""The store of item features: killed anywhere, resumed to the same bytes; refusals; other forms."""

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from tpad_jax.data.sources import external_features
from tpad_jax.errors import InputError
from tpad_jax.features import store

V = 11
PARTS = [np.array([2, 3, 7]), np.array([1, 11]), np.array([4, 5, 6]), np.array([8, 9, 10])]
SHAPES = {'k': (2, 3), 'r': (4,)}
MADE_BY = {'k': {'checkpoint': 'base', 'resolution': 32}, 'r': {'checkpoint': 'base'}}
ROOT = Path(__file__).parents[2]

# Fills argv[2] stores in argv[1], each by a process of its own that kills itself: the n-th in the
# n-th call that names or removes a file, before it (even) or behind it (odd), or ('half') as the
# n-th array's bytes are half written. Prints their exit statuses.
SCRIPT = '''
import os, signal, sys
import numpy as np
sys.path[:0] = sys.argv[4:]
from tests.features import test_store as t

def filled(directory, at, how):
    count, replace, unlink, save = [-1], os.replace, os.unlink, np.save
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def counted(change):
        def call(*args, **kw):
            count[0] += 1
            if 2 * count[0] == at:
                die()
            change(*args, **kw)
            if 2 * count[0] + 1 == at:
                die()
        return call

    def torn(file, rows):
        count[0] += 1
        if count[0] == at:
            file.write(rows.tobytes()[:20]), file.flush(), die()
        save(file, rows)

    if how == 'half':
        np.save = torn
    else:
        os.replace, os.unlink = counted(replace), counted(unlink)
    t.filled(directory)

for at in range(int(sys.argv[2])):
    child = os.fork()
    if not child:
        filled(os.path.join(sys.argv[1], str(at)), at, sys.argv[3])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''


def rows_of(ids, seed=0):
    """What an encoder would say of items: {name: [len(ids), ...]}."""
    return {name: np.stack([np.random.default_rng((seed, item)).normal(size=shape)
                            for item in ids]) for name, shape in SHAPES.items()}


class Fake:
    """Counts the parts it is asked for."""

    def __init__(self, only=None):
        self.asked, self.only = [], only

    def __call__(self, numbers, missing):
        for number in itertools.islice(numbers, self.only):
            self.asked.append(number)
            yield number, rows_of(PARTS[number])
        if self.only is not None:
            raise KeyboardInterrupt


def filled(directory, make=None, **changes):
    store.fill(directory, make or Fake(), **{
        'parts': PARTS, 'shapes': SHAPES, 'made_by': MADE_BY, 'counts': {'broken_images': 3},
        **changes})


def contents(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in Path(directory).iterdir()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp('whole')
    filled(directory)
    return directory


def test_a_store_holds_every_row_by_item_id(whole):
    assert set(contents(whole)) == {'k.npy', 'k.manifest.json', 'r.npy', 'r.manifest.json'}
    for name, shape in SHAPES.items():
        rows = store.read(whole, name)
        assert isinstance(rows, np.memmap)
        assert (rows.shape, rows.dtype) == ((V + 1, *shape), np.float32)
        assert not rows[0].any()
        expected = rows_of(range(1, V + 1))[name].astype(np.float32)
        np.testing.assert_array_equal(rows[1:], expected)
        np.testing.assert_array_equal(store.read(whole, name, slice(3, 6)), expected[2:5])
        assert isinstance(store.read(whole, name, slice(3, 6)), np.memmap)
    about = store.manifest(whole, 'k')
    assert about['fingerprint'] == MADE_BY['k']
    assert about['counts'] == {'broken_images': 3}
    assert (about['shape'], about['parts']) == ([V + 1, 2, 3], len(PARTS))
    assert {'k.npy', 'r.npy'} <= {p.name for p in whole.iterdir()}


@pytest.mark.parametrize(('how', 'count'), [('name', 50), ('half', 8)])
def test_killed_anywhere_it_ends_with_the_same_bytes(whole, tmp_path, how, count):
    """SIGKILL at 2 manifests, 8 parts, 2 wholes, 5 leases and 8 removals; 8 arrays are saved."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT, tmp_path, str(count + 1),
                           how, ROOT], stdout=subprocess.PIPE, timeout=300, check=True)
    statuses = [int(line) for line in done.stdout.split()]
    assert statuses == [-signal.SIGKILL] * count + [0]
    for at in range(count + 1):
        directory, fake = tmp_path / str(at), Fake()
        there = {file.name for file in directory.glob('*.npy')}
        filled(directory, fake)
        assert fake.asked == [i for i in range(len(PARTS)) if any(
            not {f'{name}.npy', f'{name}.{i:05d}.npy'} & there for name in SHAPES)]
        assert contents(directory) == contents(whole), at


def test_resume_makes_only_what_is_missing(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Fake(only=2))
    with pytest.raises(InputError, match=r'2 of 4 parts exist'):
        store.read(tmp_path, 'k')
    with (tmp_path / 'r.00001.npy').open('r+b') as file:  # a part cut short is not there
        file.truncate(130)
    (tmp_path / 'k.00000.npy').unlink()
    fake = Fake()
    filled(tmp_path, fake)
    assert fake.asked == [0, 1, 2, 3]
    assert contents(tmp_path) == contents(whole)
    again = Fake()
    filled(tmp_path, again)
    assert again.asked == []
    assert contents(tmp_path) == contents(whole)


def test_other_features_are_refused_by_the_keys_that_differ(whole):
    before = contents(whole)
    other = {**MADE_BY, 'k': {'checkpoint': 'other', 'dtype': 'bfloat16', 'resolution': 32}}
    with pytest.raises(InputError) as told:
        filled(whole, made_by=other)
    text = str(told.value)
    assert 'checkpoint was "base" and is now "other"' in text
    assert 'dtype was absent and is now "bfloat16"' in text
    assert 'resolution' not in text
    assert f'delete {whole}/k.* to encode again' in text
    with pytest.raises(InputError, match=r'shape was \[12, 4\] and is now \[12, 5\]'):
        filled(whole, shapes={**SHAPES, 'r': (5,)})
    with pytest.raises(InputError, match='layout was'):
        filled(whole, parts=PARTS[::-1])
    with pytest.raises(InputError, match='these are other features'):
        store.write(whole, 'k', store.read(whole, 'k'), {'checkpoint': 'another'})
    assert contents(whole) == before


def test_damaged_and_absent_stores_are_named(whole, tmp_path):
    with pytest.raises(InputError, match="holds no features 'k'"):
        store.read(tmp_path, 'k')
    (tmp_path / 'k.npy').write_bytes(b'')
    with pytest.raises(InputError, match=r'k\.npy: there is no k\.manifest\.json'):
        filled(tmp_path)
    (tmp_path / 'k.npy').rename(tmp_path / 'k.00001.npy')  # a part may be of another origin, too
    with pytest.raises(InputError, match=r'k\.00001\.npy: there is no k\.manifest\.json'):
        filled(tmp_path)
    (tmp_path / 'k.00001.npy').rename(tmp_path / 'k.npy')
    (tmp_path / 'k.manifest.json').write_bytes((whole / 'k.manifest.json').read_bytes())
    with pytest.raises(InputError, match=r'k\.npy: damaged'):
        store.read(tmp_path, 'k')
    (tmp_path / 'k.manifest.json').write_text('{"shape": [1]}')
    with pytest.raises(InputError, match=r'k\.manifest\.json: damaged'):
        store.read(tmp_path, 'k')


def test_rows_that_do_not_fit_a_part_are_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r'has rows \[2, 2, 3\], expected \[3, 2, 3\]'):
        filled(tmp_path, lambda *_: iter([(0, rows_of([1, 2]))]))


def test_rows_that_are_there_are_written_whole(tmp_path):
    rows = np.ones((4, 2))
    for _ in range(2):
        store.write(tmp_path, 'k', rows, {'stage': 'joint'}, {'items': 3})
    assert set(contents(tmp_path)) == {'k.npy', 'k.manifest.json'}
    np.testing.assert_array_equal(store.read(tmp_path, 'k'), [[0, 0], [1, 1], [1, 1], [1, 1]])
    assert rows[0].all()  # the caller's stay
    assert json.loads((tmp_path / 'k.manifest.json').read_text())['counts'] == {'items': 3}


# One of two processes that fill argv[1]. It kills itself as it has taken argv[2] parts and made one
# less, or else waits for the file `go` with its first part. Prints the parts that it makes.
HOST = '''
import os, signal, socket, sys, time
sys.path[:0] = sys.argv[3:]
from tests.features import test_store as t
socket.gethostname = lambda: str(os.getpid())  # no process asks the system about the other one

def make(numbers, missing):
    for taken, number in enumerate(numbers, 1):
        if taken == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        while sys.argv[2] == '0' and not os.path.exists(sys.argv[1] + '.go'):
            time.sleep(.02)
            yield number, None
        print(number, flush=True)
        yield number, t.rows_of(t.PARTS[number])

t.filled(sys.argv[1], make, lease=60)
'''


def test_processes_share_the_parts_and_one_takes_over_from_a_lost_one(whole, tmp_path):
    """Two real processes know each other by files alone; one is killed with a part in its hands."""
    store_ = tmp_path / 'store'
    running = [subprocess.Popen([sys.executable, '-c', HOST, store_, most, ROOT], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for most in ('2', '0')]
    assert running[0].wait(300) == -signal.SIGKILL
    lost = [lease for lease in store_.glob('*.lease.partial')
            if lease.read_text().split()[1] == str(running[0].pid)]
    assert len(lost) == 1
    os.utime(lost[0], (0, 0))  # as if it had been long ago
    (tmp_path / 'store.go').touch()
    done = [process.communicate(timeout=300) for process in running]
    assert running[1].returncode == 0
    parts = [[int(line) for line in out.split()] for out, _ in done]
    assert sorted([*parts[0], *parts[1]]) == [0, 1, 2, 3]
    assert len(parts[0]) == 1
    assert f'lease {lost[0].name[0]} is taken over' in done[1][1]
    assert contents(store_) == contents(whole)


@pytest.mark.parametrize('while_it', ['makes', 'writes'])
def test_a_process_that_was_taken_for_lost_ends_as_well(whole, tmp_path, capsys, monkeypatch,
                                                        while_it):
    """Its lease ran out, and another process has finished the store and tidied up since."""
    fsync = os.fsync

    def another(*_):
        monkeypatch.setattr(os, 'fsync', fsync)
        time.sleep(0.02)
        filled(tmp_path, lease=0.01)
        assert contents(tmp_path) == contents(whole)

    def slow(numbers, missing):
        for number in numbers:
            if number == 1:
                another() if while_it == 'makes' else monkeypatch.setattr(os, 'fsync', another)
            yield number, rows_of(PARTS[number])

    filled(tmp_path, slow, lease=0.01)
    assert 'lease 1 is taken over' in capsys.readouterr().err
    assert contents(tmp_path) == contents(whole)


def test_a_run_waits_for_no_lease_of_its_own_host(whole, tmp_path):
    """A run that was killed resumes at once, also with the number of the process before."""
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Fake(only=1))
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    for part, process in ((1, gone.pid), (2, os.getpid())):
        (tmp_path / f'{part}.lease.partial').write_text(f'{socket.gethostname()} {process} 01ab')
    (tmp_path / '3.lease.partial').write_text('')  # of a full disk
    os.utime(tmp_path / '3.lease.partial', (0, 0))
    fake = Fake()
    filled(tmp_path, fake)
    assert fake.asked == [1, 2, 3]
    assert contents(tmp_path) == contents(whole)


def test_a_damaged_part_is_made_again_and_reported(whole, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Fake(only=2))
    file = tmp_path / 'r.00001.npy'
    content = bytearray(file.read_bytes())
    content[-40] ^= 1  # of the rows; 32 bytes of digest follow
    file.write_bytes(content)
    fake = Fake()
    filled(tmp_path, fake)
    assert fake.asked == [2, 3, 1]
    assert f'{file}: damaged' in capsys.readouterr().err
    assert contents(tmp_path) == contents(whole)


def test_of_two_origins_at_once_one_is_refused(tmp_path):
    """Both processes saw no manifest; the second one wrote its own over that of the first."""
    def other(numbers, missing):
        manifest = json.loads((tmp_path / 'k.manifest.json').read_text())
        manifest['fingerprint']['checkpoint'] = 'other'
        (tmp_path / 'k.manifest.json').write_text(json.dumps(manifest))
        yield from Fake()(numbers, missing)

    with pytest.raises(InputError, match='checkpoint was "other" and is now "base"'):
        filled(tmp_path, other)
    fake = Fake()  # of the later origin, whose parts the others are not
    filled(tmp_path, fake, made_by={**MADE_BY, 'k': {**MADE_BY['k'], 'checkpoint': 'other'}})
    assert fake.asked == [0, 1, 2, 3]


# --- computed elsewhere -------------------------------------------------------------------------


ASINS = ['', 'B01', 'B02', 'Bücher', 'B04']
OTHER = ['B04', 'B02', 'X99', 'Bücher', 'B01', 'X98']  # the file's order
TABLE = np.random.default_rng(0).normal(size=(len(OTHER), 3)).astype(np.float32)


def given(form, directory, ids=OTHER, rows=TABLE):
    """A file of item features of a form, its path."""
    file = directory / f'clip.{form.split("-")[0]}'
    text = ''.join(f'{name}\n' for name in ids).encode()
    if form == 'npy':
        np.save(file, rows)
        (directory / 'clip.npy.ids').write_bytes(text)
    elif form == 'safetensors':
        save_file({'features': rows, 'ids': np.frombuffer(text, np.uint8)}, file)
    elif form == 'safetensors-metadata':
        save_file({'features': rows}, file, metadata={'ids': json.dumps(ids)})
    elif form == 'parquet-array':
        pl.DataFrame({'item_id': ids, 'features': rows}).write_parquet(file)
    else:
        pl.DataFrame({'item_id': ids, 'features': rows.tolist()},
                     schema={'item_id': pl.String, 'features': pl.List(pl.Float64)}
                     ).write_parquet(file)
    return file


FORMS = ('npy', 'safetensors', 'safetensors-metadata', 'parquet', 'parquet-array')


@pytest.mark.parametrize('form', FORMS)
def test_features_of_elsewhere_are_put_in_the_catalogues_order(tmp_path, form):
    found = external_features.read(given(form, tmp_path), ASINS)
    assert (found.rows.shape, found.rows.dtype) == ((5, 3), np.float32)
    np.testing.assert_array_equal(found.rows, np.vstack([np.zeros(3), TABLE[[4, 1, 3, 0]]]))
    assert (found.unknown, found.some, found.repeated) == (2, ('X99', 'X98'), 0)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_becomes_float32(tmp_path, dtype):
    rows = TABLE.astype(dtype)
    found = external_features.read(given('safetensors', tmp_path, rows=rows), ASINS)
    np.testing.assert_array_equal(found.rows[1], rows[4].astype(np.float32))


@pytest.mark.parametrize('form', FORMS)
def test_missing_items_are_counted_and_named(tmp_path, form):
    file = given(form, tmp_path, ids=['B02', 'a', 'b', 'c', 'd', 'e'])
    with pytest.raises(InputError, match=r'lacks 3 of 4 items: B01, Bücher, B04\. Expected'):
        external_features.read(file, ASINS)


def test_repeated_rows_are_counted_and_must_agree(tmp_path):
    file = given('parquet', tmp_path, ids=[*OTHER, 'B02', 'X99'],
                 rows=np.vstack([TABLE, TABLE[1], TABLE[0]]))
    found = external_features.read(file, ASINS)
    assert (found.repeated, found.unknown) == (1, 3)
    file = given('parquet', tmp_path, ids=[*OTHER, 'B02'], rows=np.vstack([TABLE, TABLE[0]]))
    with pytest.raises(InputError, match='1 rows differ from an earlier row of their item: B02'):
        external_features.read(file, ASINS)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_refused(tmp_path, form, value):
    rows = TABLE.copy()
    rows[3, 1] = value
    with pytest.raises(InputError, match='1 items are not finite: Bücher'):
        external_features.read(given(form, tmp_path, rows=rows), ASINS)
    rows = TABLE.copy()
    rows[2, 1] = value  # of no item of ours
    external_features.read(given(form, tmp_path, rows=rows), ASINS)


@pytest.mark.parametrize('form', FORMS[:4])
def test_nothing_at_all_is_refused(tmp_path, form):
    with pytest.raises(InputError):
        external_features.read(given(form, tmp_path, [], TABLE[:0]), ASINS)


def test_files_that_cannot_be_used_are_named(tmp_path):
    def refused(file, told, asins=ASINS):
        with pytest.raises(InputError, match=told):
            external_features.read(file, asins)

    refused(tmp_path / 'clip.csv', r'Expected \.npy, \.safetensors, \.parquet')
    refused(tmp_path / 'clip.npy', 'does not exist')
    for form in ('npy', 'safetensors', 'parquet'):
        file = given(form, tmp_path)
        file.write_bytes(b'nothing of the kind')
        refused(file, 'cannot be read as ' + form)
    file = given('npy', tmp_path, rows=TABLE[:4])
    refused(file, '6 ids for 4 rows')
    refused(given('npy', tmp_path, rows=TABLE[:, 0]), r'float32 \[6\]\. Expected numbers')
    refused(given('npy', tmp_path, rows=TABLE.astype(str)), 'Expected numbers')
    np.save(file, np.array([{}] * 6), allow_pickle=True)
    refused(file, 'cannot be read')
    os.remove(file.with_name('clip.npy.ids'))
    refused(file, r'no clip\.npy\.ids next to it')
    save_file({'rows': TABLE}, tmp_path / 'clip.safetensors')
    refused(tmp_path / 'clip.safetensors', r"holds rows\. Expected the tensor 'features' and")
    pl.DataFrame({'asin': ['a']}).write_parquet(tmp_path / 'clip.parquet')
    refused(tmp_path / 'clip.parquet', r'columns asin\. Expected also item_id, features')
    pl.DataFrame({'item_id': OTHER, 'features': [[1.0], [2.0, 3.0], [], None, [1.0], [1.0]]}
                 ).write_parquet(tmp_path / 'clip.parquet')
    refused(tmp_path / 'clip.parquet', 'lists of 0 to 2 numbers, or none')
