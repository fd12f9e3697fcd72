"""The frame of the commands: each error becomes one sentence and its exit status."""

import os
import signal
import subprocess
import sys

import jax
import pytest

import tpad_jax
from tpad_jax.core import cli, startup
from tpad_jax.errors import InputError, Stopped

RAISES = '''
import sys
from tpad_jax.core import cli

@cli.command('name')
def main(argv):
    {body}

sys.exit(main())
'''


def ran(body, **options):
    return subprocess.Popen([sys.executable, '-c', RAISES.format(body=body)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(('error', 'status', 'text'), [
    (InputError('a:\n  b'), 2, 'name: a: b\n'), (FloatingPointError('nan'), 1, 'name: nan\n'),
    (Stopped('stopped'), 75, 'name: stopped; run the same command again to resume\n'),
    (OSError(28, 'No space left on device'), 2, 'name: the output: No space left on device; '),
    (PermissionError(13, 'Permission denied', 'a'), 2, 'name: a: Permission denied; '),
    (KeyboardInterrupt(), 75, 'name: stopped by a signal\n')])
def test_an_error_is_a_sentence_and_a_status(capsys, error, status, text):
    @cli.command('name')
    def main(argv):
        raise error

    assert main([]) == status
    message = capsys.readouterr().err
    assert message.startswith(text)
    assert message.count('\n') == 1


def test_a_refusal_in_a_traced_function_is_a_sentence_too(capsys):
    def refused(x):
        raise InputError('a: b')

    @cli.command('name')
    def main(argv):
        jax.jit(refused)(1.0)

    assert main([]) == 2
    assert capsys.readouterr().err == 'name: a: b\n'


def test_a_defect_keeps_its_traceback():
    @cli.command('name')
    def main(argv):
        raise FileNotFoundError(2, 'No such file or directory', 'a')

    with pytest.raises(FileNotFoundError):
        main([])


def test_the_status_of_a_command_is_kept():
    assert cli.command('name')(lambda argv: None)([]) == 0
    assert cli.command('name')(lambda argv: 1)([]) == 1


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly():
    with ran("[print('x' * 80) for _ in range(10**6)]") as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(60) == 0
        assert run.stderr.read() == ''


def test_a_signal_is_status_75():
    with ran("print('ready', flush=True); import time; time.sleep(60)") as run:
        assert run.stdout.readline() == 'ready\n'
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
        assert run.stderr.read() == 'name: stopped by a signal\n'


@pytest.mark.parametrize('text', ['nan', '0.5', '257', 'inf', 'x'])
def test_an_argument_out_of_range_is_refused(text):
    parser = cli.Parser('tpad_jax.name', 'Does something.')
    parser.add_argument('--pause', type=cli.number(float, 1, 256))
    assert parser.parse_args(['--pause=1']).pause == 1
    with pytest.raises(InputError, match=f'--pause: .*{text}') as refusal:
        parser.parse_args([f'--pause={text}'])
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(('variable', 'value'), [
    ('JAX_ENABLE_X64', '1'), ('JAX_ENABLE_X64', 'True'), ('JAX_NUMPY_DTYPE_PROMOTION', 'strict'),
    ('JAX_NUMPY_RANK_PROMOTION', 'raise'), ('JAX_NO_EXECUTION', 'yes'),
    ('JAX_TRANSFER_GUARD', 'disallow'), ('JAX_ERROR_CHECKING_BEHAVIOR_NAN', 'raise')])
def test_types_that_are_not_computed_with_are_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable}='{value}'.* Fix: unset {variable}"):
        startup.prepare()


@pytest.mark.parametrize(('error', 'status'), [
    (RuntimeError("Unable to initialize backend 'foo': ... (set JAX_PLATFORMS='')"), 2),
    (ValueError('Invalid value "abc" for JAX flag jax_num_cpu_devices'), 2),
    (ValueError("invalid truth value 'maybe' for environment 'JAX_DISABLE_JIT'"), 2),
    (ValueError('Invalid value of anything else'), None)])
def test_what_jax_says_of_its_environment_is_one_sentence(capsys, error, status):
    @cli.command('name')
    def main(argv):
        raise error

    if status is None:
        with pytest.raises(ValueError, match='anything else'):
            main([])
    else:
        assert main([]) == status
        assert capsys.readouterr().err == f'name: {error}. Fix: correct or unset that variable\n'


def test_harmless_values_of_the_environment_are_accepted(monkeypatch):
    for variable, values in startup.REQUIRED.items():
        monkeypatch.setenv(variable, values[-1])
    startup.check_environment()
    assert os.environ['JAX_ENABLE_X64'] == 'off'


def test_a_run_is_not_loaded_without_rank_promotion(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_NUMPY_RANK_PROMOTION', 'raise')
    with pytest.raises(InputError, match="JAX_NUMPY_RANK_PROMOTION='raise'"):
        tpad_jax.load(tmp_path)
