"""Pictures of a raw Amazon category: `python -m tpad_jax.data.download RAW_DIR [--FLAG=VALUE ...]`.

The metadata hold addresses only. This asks for one picture of every item that a review names and
puts it at RAW_DIR/images/<asin>.jpg or .png, where the job looks for it. What is there is not asked
for again: the same command goes on after a stop, a kill or a failure of the network, inside a
picture too where the server gives parts. images/download.jsonl holds what was answered, and
images/download.json the counts of the last run and what it could not have.

Exit status: 0 done (the failures are told), 1 a defect, 2 unusable input, or no picture at all, in
one sentence, 75 stopped by SIGINT or SIGTERM (the same command goes on).
"""

import sys

from absl import app, flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpad_jax.core.startup import STOPPED, UNUSABLE, begin
from tpad_jax.data import images
from tpad_jax.data.download.hosts import Limits
from tpad_jax.errors import UNWRITABLE, InputError, Stopped


def table(report: dict) -> Table:
    """What `download` returns, a row per outcome; of a reason, one item it happened to."""
    says = {'fetched': 'fetched', 'there': 'there already', 'without_url': 'without an address',
            'unreviewed': 'in no review (--unreviewed gets them)', 'left': 'left'}
    rows = [(str(report[key]), text, '') for key, text in says.items()
            if report[key] or key == 'fetched']
    for reason, count in report['reasons'].items():
        same = [one for one in report['failures'] if one['reason'] == reason]
        said = {'for now': sum(not one['for_good'] for one in same),
                'not asked again; --again does': sum(one['remembered'] for one in same)}
        said = ', '.join(f'{number} {what}' for what, number in said.items() if number)
        rows.append((str(count), f'failed: {reason}' + f' ({said})' * bool(said),
                     ' '.join([same[0]['asin'], *same[0]['urls'][:1]])))
    rows.append((str(report['items']), 'items in all', ''))
    made = Table(box=None, header_style='bold')
    for number, head in enumerate(('items', '', 'for example')):  # what is long gives way
        made.add_column(head, justify='left' if number else 'right', no_wrap=True,
                        min_width=max(len(head), *(len(row[number]) for row in rows)) if number < 2
                        else None)
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def _flags():
    default = Limits()
    flags.DEFINE_integer('jobs', default.jobs, 'Requests at once.', 1, 256)
    flags.DEFINE_integer('per_host', default.per_host, 'Of them to one host.', 1, 256)
    flags.DEFINE_float('pause', default.pause, 'Seconds between the beginnings of two requests to '
                       'one host.', 0)
    flags.DEFINE_float('timeout', default.timeout, 'Seconds without a byte.', 0.01)
    flags.DEFINE_integer('tries', default.tries, 'Of an address, where a time-out or 5xx is no '
                         'answer.', 1)
    flags.DEFINE_float('backoff', default.backoff, 'Seconds before the second try, and twice that '
                       'before the third.', 0)
    flags.DEFINE_integer('max_bytes', default.max_bytes, 'Of a picture; larger ones are not read '
                         'by the job either.', 1, images.MAX_BYTES)
    flags.DEFINE_string('user_agent', default.user_agent, 'Who asks; say where you can be reached.')
    flags.DEFINE_boolean('allow_private', False, 'Ask addresses of private networks and of this '
                         'machine too.')
    flags.DEFINE_boolean('again', False, 'Ask again for what failed for good.')
    flags.DEFINE_boolean('unreviewed', False, 'Also the pictures of items that no review names.')
    flags.DEFINE_float('bad_share', 0.05, 'Share of damaged lines of a raw file that refuses it.',
                       0, 1)


def refuse(error):
    """Say what cannot be used, in one line, and leave with status 2."""
    _say(error)
    sys.exit(UNUSABLE)


def _say(text):
    print('tpad_jax.data.download: ' + ' '.join(str(text).split()), file=sys.stderr)


def parse(argv):
    """The folder behind the flags, or one sentence and status 2; `--help` leaves with 0."""
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl printed the help and left, with 1
        sys.exit(0)
    except flags.Error as error:
        refuse(error)
    if len(rest) != 2:
        refuse('name one folder of raw files: python -m tpad_jax.data.download RAW_DIR')
    if not flags.FLAGS.user_agent.isprintable() or not flags.FLAGS.user_agent.isascii():
        refuse('--user_agent holds what a request cannot: use printable ASCII')
    return rest


def main(argv):
    """Download; turn signals and refusals into exit statuses, as launch.py does."""
    stopping = begin('')
    # here: --help and a wrong flag need no reader of raw files
    from tpad_jax.data.download.pictures import download
    values = flags.FLAGS
    limits = Limits(**{name: values[name].value for name in Limits._fields})
    try:
        report = download(argv[1], limits, allow_private=values.allow_private, again=values.again,
                          unreviewed=values.unreviewed, bad_share=values.bad_share,
                          stopping=stopping)
    except InputError as error:
        refuse(error)
    except Stopped as stopped:
        _say(f'{stopped}; nothing was asked yet')
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        refuse(f'{error.filename or argv[1]}: {error.strerror}; what is finished is kept: mend '
               'that, and the same command goes on from there')
    Console().print(table(report))
    if report['left'] and stopping():
        _say(f'{report["left"]} pictures left; the same command goes on from there')
        sys.exit(STOPPED)
    if report['failed'] and not report['fetched'] + report['there']:
        why = ', '.join(report['reasons'])
        refuse(f'no picture could be had ({why}); see {argv[1]}/images/download.json' + (
            ', and --allow_private for a server of your own') * ('address_refused' in why))


if __name__ == '__main__':
    _flags()
    app.run(main, flags_parser=parse)
