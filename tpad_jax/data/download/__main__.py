"""Download pictures for raw files: `python -m tpad_jax.data.download RAW_DIR`, or ITEMS.csv.

Metadata hold addresses only. The command asks for one picture of every item that a review names and
stores it as RAW_DIR/images/<asin>.jpg or .png, where a run reads it. Pictures that exist are not
asked for again. The same command resumes after a stop, a kill or a network failure, within a
picture too if the server sends parts. images/download.jsonl records the answers;
images/download.json has the counts of the last run and its failures.

Exit status: 0 done (failures are printed), 1 a defect, 2 unusable input, or not a single picture,
in one sentence, 75 stopped by SIGINT or SIGTERM; run the same command to resume.
"""

import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpad_jax.core import cli, startup
from tpad_jax.data.download.hosts import OPTIONS, Limits
from tpad_jax.errors import Stopped, refuse_if

NAME = 'tpad_jax.data.download'
SHARE = 0.05, 0, 1, 'share of damaged lines that refuses a raw file'
SWITCHES = {
    'allow_private': 'also ask addresses of private networks and of this machine',
    'again': 'ask again for pictures that failed for good',
    'unreviewed': 'also items that no review names',
}


def table(report: dict) -> Table:
    """Tabulate a report.

    Args:
      report: of `download`.

    Returns:
      A table with a row per outcome; of a reason, with one item as an example.
    """
    words = {'fetched': 'fetched', 'there': 'there already', 'without_url': 'without an address',
             'unreviewed': 'in no review (--unreviewed gets them)', 'left': 'left'}
    rows = [(str(report[key]), text, '') for key, text in words.items()
            if report[key] or key == 'fetched']
    if unknown := report['lines']['unused'].get('images_of_unknown_form'):
        rows.append((str(unknown), 'of these have pictures of an unknown form', ''))
    for reason, count in report['reasons'].items():
        failures = [failure for failure in report['failures'] if failure['reason'] == reason]
        numbers = {'for now': sum(not failure['for_good'] for failure in failures),
                   'not asked again; --again does': sum(f['remembered'] for f in failures)}
        note = ', '.join(f'{number} {what}' for what, number in numbers.items() if number)
        rows.append((str(count), f'failed: {reason}' + f' ({note})' * bool(note),
                     ' '.join([failures[0]['asin'], *failures[0]['urls'][:1]])))
    rows.append((str(report['items']), 'items in all', ''))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = Table(box=None, header_style='bold')
    out.add_column('items', justify='right', no_wrap=True, min_width=max(5, widths[0]))
    out.add_column('outcome', no_wrap=True, min_width=widths[1])
    out.add_column('for example', no_wrap=True)  # addresses are cut to the width of the terminal
    for row in rows:
        out.add_row(*map(escape, row))
    return out


@cli.command(NAME, 'Downloads the pictures of the items of a raw Amazon category.', {
    'folder': dict(metavar='RAW_DIR', help='folder of raw files, or a file of items'),
    **{f'--{name}': dict(type=cli.number(type(default), *limits) if limits else str,
                         default=default, help=f'{text}, default %(default)s')
       for name, (default, *limits, text) in {**OPTIONS, 'bad_share': SHARE}.items()},
    **{f'--{name}': dict(action='store_true', help=text) for name, text in SWITCHES.items()}})
def main(args) -> int:
    """Download, print the counts and return the exit status."""
    refuse_if(not args.user_agent.isprintable() or not args.user_agent.isascii(),
              '--user_agent holds characters that a request cannot carry. Expected printable ASCII')
    stopping = startup.begin()
    # here: --help and a wrong flag do not wait for the readers of raw files
    from tpad_jax.data.download.pictures import download
    limits = Limits(**{name: getattr(args, name) for name in Limits._fields})
    report = download(args.folder, limits, allow_private=args.allow_private, again=args.again,
                      unreviewed=args.unreviewed, bad_share=args.bad_share, stopping=stopping)
    Console().print(table(report))
    if report['left'] and stopping():
        raise Stopped(f'{report["left"]} pictures left')
    reasons = ', '.join(report['reasons'])
    private = ', and --allow_private for a server of your own' * ('address_refused' in reasons)
    refuse_if(report['failed'] and not report['fetched'] + report['there'], 'no picture was '
              f'fetched ({reasons}); see images/download.json{private}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
