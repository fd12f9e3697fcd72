"""Fragments of web pages -> plain text: scraped fields hold markup, programs and style sheets.

A rule describes a kind of code, not a case, and asks for signs that prose does not have, so that
titles such as "size < 5", "C++ {2nd edition}" or "Case <Black>" stay.
"""

import html
import re

import polars as pl

ENOUGH = 5  # words before a piece of code that are worth keeping, however long the code is

_ELEMENTS = (
    'abbr address area article aside audio base big blockquote body br button canvas caption '
    'center cite code col colgroup dd del dfn div dl dt em embed fieldset font footer form '
    'frame frameset h[1-6] head header hr html iframe img input ins kbd label legend li link main '
    'map mark meta nav noscript object ol optgroup option param picture pre samp section select '
    'small source span strike strong sub sup svg table tbody td textarea tfoot th thead time title '
    'tr track tt ul var video wbr').replace(' ', '|')
_VALUE = r'''(?:"[^"<>]*"?|'[^'<>]*'?'''
# Each alternative consumes what it scans, so the time is linear in the text's length. A tag that
# never closes ends after its attributes: the words that follow may be the title.
_MARKUP = re.compile(
    r'<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)|<[!?][a-z\[][^<>]*>?|<%.*?(?:%>|\Z)'
    rf'|</?(?:{_ELEMENTS}|[abipqsu]|[a-z]\w*:\w+)\b[^<>]*>'
    rf'|<[a-z][\w:.-]*(?:\s+[\w:.-]+\s*=\s*{_VALUE}|[^\s"\'<>]+))+\s*/?>?'
    rf'|<(?:{_ELEMENTS})(?=[\s/]|\Z)|</[a-z][\w:.-]*(?:>|\s*\Z)'
    rf'|(?<![\w-])(?:class|id|style|href|src|rel|on[a-z]+|(?:data|aria)-[\w-]+)\s*=\s*{_VALUE})(?:/?>)?'
    r'|"(?: ?/)?>| ?/>', re.IGNORECASE | re.DOTALL)
_SIGNS = re.compile(r'[{}();=$&|]')  # every piece of code has some of them
_SPECIAL = re.compile(r'[{}();=$&|<>]')  # and every piece of markup of these
# Beginnings of code, by a sign that each pattern needs. A text without it is not searched: trying
# all patterns at every character takes milliseconds.
_CODE = {sign: re.compile('|'.join(patterns), re.IGNORECASE) for sign, patterns in {
    # declarations, functions, control flow
    '=': (r'\b(?:var|let|const) [\w$]+ ?=(?!=)', r'\([\w$, ]*\) ?=> ?[\w${(]',
          r'[\w$)\]] ?(?:===|!==)'),
    '{': (r'\bfunction ?[\w$]* ?\([\w$, ]*\) ?\{',
          r'\b(?:if|for|while|switch|catch) ?\([^()]{0,99}'
          r'(?:\([^()]{0,99}\)[^()]{0,99}){0,9}\) ?\{',
          # style sheets
          r'[.#][a-z_][\w-]*[^{}<>]{0,99}\{ ?(?:\Z|\}|[\w-]+ ?:)',
          r'\{ ?(?:font|margin|padding|background|border|display|position|float|overflow|cursor)'
          r' ?:',
          r'\{ ?[a-z]+-[a-z-]+ ?: ?[^{};:]{1,60}[;}]',
          r'\b(?:h[1-6]|body|html|p|a|ul|li|div|span|table|td|img) ?\{ ?[a-z-]+ ?:',
          # data and templates
          r'\{ ?"[\w@$-]+" ?:', r'\{\{[^{}]{0,99}\}\}', r'\$\{[\w.$]+\}'),
    ';': (r'\bvar [\w$]+ ?;', r'\breturn (?:false|true|this|null|[\w$.]+\(.{0,99}?\)) ?;',
          r'\b(?:margin|padding) ?: ?(?:0|auto|[\d.]+px)[\w %.]{0,40};'),
    '}': (r'\} ?\) ?[;(]', r'\}\)\Z'),
    '"': (r'\bimport [\w{}*, $]{1,60} from "', r'"use strict["\']'),
    "'": (r"\bimport [\w{}*, $]{1,60} from '", r"'use strict[\"']"),
    # calls, members and operators
    '(': (r'[\w$)\]]\.[a-z_$][\w$]*\((?:["\'{[]|\)|function\b|[\w$.]+\) ?;)',
          r'\$\((?:["\']|document\b|window\b|function\b|this\b)', r'\bjavascript:[\w$.]+\(',
          r'\bnew [A-Z]\w+\(\)'),
    '.': (r'\b(?:window|document|self|this)\.[\w$.]+ ?(?:[=([;]|&&|\|\|)',),
    '&&': (r'[\w$)\]] ?&& ?(?:[\w$]+[.(]|[+{[])',),
    '||': (r'[\w$)\]] ?\|\| ?(?:[\w$]+[.(]|[+{[])',),
    '@': (r'@(?:media|font-face|keyframes|supports)\b[^{}]{0,99}(?:\{|\Z)',
          r'@(?:import|charset) ?[u"\']'),
    ':': (r'(?:[{;] ?|\b)(?:font|margin|padding|background|border|text|line|list|vertical|white)'
          r'-[a-z]+ ?: ?[^{};:]{1,60}[;}]',
          r'\b[a-z]+ ?: ?-?[\d.]+(?:(?:px|em|rem|pt)(?: ?!important)?| ?!important) ?[;}]'
          r' ?(?:[a-z-]+ ?: ?[^;]{1,60};|\})'),
}.items()}
# Every text that `clean` changes matches this: white space, a sign of markup or of one of the
# patterns above, or words that are none. polars' pattern is a machine without steps back.
_UNUSUAL = (r"""^ | $|  |[^\S ]|[\x00-\x1f\x7f-\x9f]|[{};=$|<>]|&[^ ]|&$"""
            r"""|^[^\p{L}\p{N}]*$|^(?:null|undefined|NaN|\[object Object\])$|(?:^| )a-[a-z]"""
            r"""|\.\w+\(|\(\)|(?i: from ["']|use strict|javascript:"""
            r"""|(?:window|document|self|this)\.|@(?:media|font|keyframes|supports|import|charset))""")
# names that programs write where a value is missing
_PLACEHOLDERS = ('null', 'undefined', 'NaN', '[object Object]')
_CLASS_NAME = re.compile(r'a-[a-z]+(?:-[a-z0-9]+)*|[a-z]+(?:[-_][a-z0-9]+){2,}')
_REST = re.compile(r'</?[a-z]\w*|[\w-]+=', re.IGNORECASE)  # what is left of a tag that was cut
# control characters and halves of a surrogate pair, which no UTF-8 file can hold
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]+')
# a character number that Python would refuse to read: it has a limit to a number's digits
_NO_CHARACTER = re.compile('&#[0-9]{1000,};?')


def clean(text: str) -> str:
    """Turn a fragment of a web page into plain text.

    Entities are resolved first, twice where they are escaped themselves, because the raw files hold
    escaped tags as well as plain ones. Then tags are removed, closed or not, every line ends where
    a program or style sheet begins, and white space collapses. A lone `<` or `>` stays.

    Args:
      text: the fragment.

    Returns:
      One line of text; '' where no words are left, or little more than code.
    """
    # most texts have no sign of markup or code
    plain = text.isprintable() and not _SPECIAL.search(text)
    words = ' '.join(text.split()) if plain else _without_code(text)
    debris = (words in _PLACEHOLDERS or _REST.fullmatch(words) or not any(map(str.isalnum, words))
              or (words.count('-') > 1 and all(map(_CLASS_NAME.fullmatch, words.split()))
                  and any(name.startswith('a-') for name in words.split())))
    return '' if debris else words


def clean_all(texts: list[str]) -> list[str]:
    """Turn fragments of web pages into plain text, as `clean` does one by one.

    Args:
      texts: the fragments.
    """
    try:
        unusual = pl.Series(texts, dtype=pl.String).str.contains(_UNUSUAL).arg_true()
    except UnicodeEncodeError:  # half of a surrogate pair
        unusual = range(len(texts))
    cleaned = texts.copy()
    for number in unusual:
        cleaned[number] = clean(texts[number])
    return cleaned


def _without_code(text: str) -> str:
    """The words of a text without markup and code; '' where these were most of it."""
    if '&' in text:
        for _ in range(2):
            text = html.unescape(_NO_CHARACTER.sub('\ufffd', text))
    lines = [' '.join(_UNPRINTABLE.sub(' ', line).split())
             for line in _MARKUP.sub(' ', text).splitlines()]
    kept = [_before_code(line) if _SIGNS.search(line) else line for line in lines]
    words = ' '.join(filter(None, kept))
    short = kept != lines and len(words.split()) < ENOUGH
    return '' if short and 2 * len(words) < sum(map(len, lines)) else words


def _before_code(line: str) -> str:
    matches = [pattern.search(line) for sign, pattern in _CODE.items() if sign in line]
    return line[:min((match.start() for match in matches if match), default=len(line))].rstrip()
