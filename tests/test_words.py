"""Plain English: words that readers stumble over are absent from pages, docstrings and messages.

`python tests/test_words.py [PATH ...]` prints every hit as path:line: word: text.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = re.compile(r"""(?ix)
    \b(stands?|lies|told|said|says|leaves|goes\ on|go\ on|begins\ anew|anew|beside|besides
    |behind(?!\ a\ proxy)|rivals?|mend|mends|mended|figures?|knobs?|the\ least\ that
    |whichever|of\ (its|their)\ own|at\ hand|foretells?|foretold|newcomers?|whoever|whatever
    |nobody|(?<!there\ )(is|are|was|were|be)\ no\ (?!longer|more\b|less\b|such)\w+)\b
    |(?-i:(?:^|(?<=[.!?]\ ))(What|Nothing|None|Whatever|Whoever)\ (?!to\b)(?=\w))""")
# code terms and public keys, removed before a text is searched
ALLOWED = re.compile(r"""(?x)
    config\.rivals[\w.]*|\brivals\.[\w*]+|c\.rivals|figures/|/figures|leaves\ of\ a\ pytree
    |pytree\ leaves|tree\.leaves|tree_leaves|figures\.py|`[^`]*`|\]\([^)]*\)""")
PAGES = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', *(
    str(path.relative_to(ROOT)) for path in sorted((ROOT / 'docs').rglob('*.md'))))
CODE = ('launch.py', *(str(path.relative_to(ROOT)) for place in ('tpad_jax', 'configs')
                       for path in sorted((ROOT / place).rglob('*.py'))))


def texts(path):
    """(line, text) of all that a reader sees: a page's lines, a module's comments and strings."""
    source = (ROOT / path).read_text()
    if not path.endswith('.py'):
        # a fenced block is code or output
        fenced = False
        for number, line in enumerate(source.splitlines(), 1):
            fenced ^= line.lstrip().startswith('```')
            if not fenced:
                yield number, line
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ' ' in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield node.lineno + offset, line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip('# ')


def hits(path):
    """['path:line: word: text'] of every word of the list in a file."""
    found = []
    for number, text in texts(path):
        for match in WORDS.finditer(ALLOWED.sub('', text)):
            found.append(f'{path}:{number}: {match[0].strip()}: {text.strip()[:90]}')
    return found


def test_words():
    assert not [hit for path in (*PAGES, *CODE) if (ROOT / path).exists() for hit in hits(path)]


if __name__ == '__main__':
    wanted = tuple(sys.argv[1:]) or ('',)
    for name in (*PAGES, *CODE):
        if name.startswith(wanted) and (ROOT / name).exists():
            print(*hits(name), sep='\n', end='\n' if hits(name) else '')
