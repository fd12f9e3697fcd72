"""Options: every number has a declared range, and one out of it is refused before anything runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.test_hostile_files import directory
from tpad_jax import config
from tpad_jax.config import flat
from tpad_jax.data import sources
from tpad_jax.errors import InputError
from tpad_jax.job import job, ranges, recommenders, validate

NUMBERS = [key for key, value in flat(config.get_config())
           if (isinstance(value, int | float) and not isinstance(value, bool))
           or key.startswith('stage.knowledge.weights.')]
PERMITTED = []  # (key, value)


def changed(key, value, c=None):
    """The default config, or `c`, with one option set, of whatever type."""
    c = config.get_config() if c is None else c
    *path, name = key.split('.')
    node = c
    for part in path:
        node = node[part]
    with c.ignore_type():
        node[name] = value
    return c


def test_no_number_without_meaning_is_accepted():
    accepted, messages = [], []
    for key in NUMBERS:
        c = config.get_config()
        for value in (float('nan'), float('inf'), -1e9, 2**70):
            try:
                validate.check(changed(key, value, c))
                accepted.append((key, value))
            except InputError as refusal:
                messages.append((key, str(refusal)))
    assert accepted == PERMITTED
    for key, message in messages:
        assert message.startswith(f'config.{key}=')
        assert ' is not usable. Expected a ' in message


@pytest.mark.parametrize(('key', 'value'), [
    ('stage.recommend.learning_rate', -1.0), ('losses.align.weight', -1.0), ('data.test', 1.5),
    ('stage.joint.warmup', 2.0), ('stage.transfer.clip', -1.0), ('stage.transfer.clip', 0.0),
    ('losses.next_item.smoothing', 2.0), ('losses.next_item.temperature', 0.0), ('seed', 2**32),
    ('model.temperature', 0.0), ('data.planted.items', -5), ('data.valid', 0.0), ('data.core', 2.5),
    ('model.dropout', 1.0), ('stage.transfer.weight_decay', -1.0), ('model.lora_alpha', 0.0),
    ('seed', True), ('stage.joint.weights.align', -1.0), ('data.planted.test', 0),
    ('data.max_length', 2**21), ('model.layers', 1001), ('model.gnn_steps', 0)])
def test_the_nearest_values_out_of_range_are_refused(key, value):
    with pytest.raises(InputError, match=rf'config\.{key}={value}'):
        validate.check(changed(key, value))


@pytest.mark.parametrize('factor', [float('nan'), float('inf'), -1.0, 2**70, '1'])
@pytest.mark.parametrize(('key', 'first'), [('stage.joint.rates', '^club/'),
                                            ('losses.align.schedule', 0)])
def test_numbers_in_pairs_have_a_range_too(key, first, factor):
    with pytest.raises(InputError, match=rf'config\.{key}=.* Expected pairs \('):
        validate.check(changed(key, ((first, factor),)))


@pytest.mark.parametrize(('key', 'value'), [
    ('data.test', 2000), ('data.test', 0.25), ('stage.joint.warmup', 0), ('seed', 2**32 - 1),
    ('stage.recommend.learning_rate', 0.0), ('model.dropout', 0),
    ('stage.joint.weights.align', 0.5)])
def test_values_at_the_ends_are_accepted(key, value):
    ranges.check(changed(key, value))


@pytest.mark.parametrize(('key', 'value'), [
    ('stages', 'knowledge,nowhere'), ('model.encoder', 'rnn'), ('mllm.dtype', 'float64'),
    ('model.recommend', 'r,s'), ('stage.transfer.train', '('), ('losses.align.stages', 'nowhere'),
    ('losses.mdist_text.kind', 'backward'), ('rivals.id_only.recommend', 'x'),
    ('model.critics.align', 'none'), ('baselines', 'pop,marko'), ('stage.joint.optimiser', 'lion')])
def test_an_unknown_choice_is_refused_with_the_known_ones(key, value):
    with pytest.raises(InputError, match=rf'config\.{key}=.* Expected (one|some) of|valid reg'):
        validate.check(changed(key, value))


def test_keywords_of_a_users_loss_are_free_but_finite():
    c = config.get_config()
    c.losses.mine = dict(fn='here:loss', weight=1.0, stages='joint', temperature=-3.0)
    ranges.check(c)
    c.losses.mine.temperature = float('nan')
    with pytest.raises(InputError, match=r'losses\.mine\.temperature=nan'):
        ranges.check(c)


@pytest.mark.parametrize('name', ['run[1]', 'run*', 'what?', 'a\\b', 'in[1]/run'])
def test_a_workdir_that_reads_as_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"has the character [*?\[\\]"):
        job.run(config.get_config(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    validate.check_workdir(Path('run (1)]'))


@pytest.mark.parametrize('lacks', ['an entry', 'options'])
def test_a_stage_without_an_entry_or_options_is_refused(monkeypatch, request, lacks):
    config.STAGES.append('own')  # in place, as a user's launcher does
    request.addfinalizer(config.STAGES.pop)
    c = config.get_config()
    c.stages = 'own'
    if lacks == 'options':
        monkeypatch.setitem(validate.ENTRIES, 'own', validate.ENTRIES['recommend'])
    else:
        c.stage.own = config.stage()
    with pytest.raises(InputError, match=r'config\.stages names own, which has no options'):
        validate.check(c)


def test_the_published_protocol_is_for_prepared_sessions(tmp_path):
    c = config.get_config()
    c.data.update(protocol='published', published_last_only=True)
    with pytest.raises(InputError, match=r'published.* is for prepared sessions'):
        validate.check(c)
    c.data.ready = str(directory(tmp_path))
    validate.check(c)
    assert sources.load(c, tmp_path).audit['shuffle']['rows'] == 5  # the sessions have three items


def test_trained_baselines_without_rows_are_left_out_by_name():
    c = config.get_config()
    c.data.features, c.model.recommend, made = 'file', 'given', {'given': None, 'warm': None}
    validate.check_inputs(c, ('recommend',), set())
    job_ = SimpleNamespace(config=c, encoders={}, catalogue=made)
    assert recommenders.left_out(job_) == [
        'knowledge_only (reads k)', 'lexical_only (reads lexical)', 'true_attributes (reads true)']
    job_.encoders = {'knowledge': None, 'joint': None}
    assert recommenders.left_out(job_) == ['lexical_only (reads lexical)',
                                           'true_attributes (reads true)']
