"""Fragments of web pages -> plain text: scraped fields hold markup, programs and style sheets.

A rule describes a kind of code, not a case, and asks for signs that prose does not have, so that
titles such as "size < 5", "C++ {2nd edition}" or "Case <Black>" stay.
"""

import html
import re

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
_CODE = re.compile('|'.join((
    # declarations, functions, control flow
    r'\b(?:var|let|const) [\w$]+ ?=(?!=)', r'\bvar [\w$]+ ?;',
    r'\bfunction ?[\w$]* ?\([\w$, ]*\) ?\{', r'\([\w$, ]*\) ?=> ?[\w${(]',
    r'\bimport [\w{}*, $]{1,60} from ["\']', r'["\']use strict["\']',
    r'\b(?:if|for|while|switch|catch) ?\([^()]{0,99}(?:\([^()]{0,99}\)[^()]{0,99}){0,9}\) ?\{',
    r'\breturn (?:false|true|this|null|[\w$.]+\(.{0,99}?\)) ?;', r'\} ?\) ?[;(]', r'\}\)\Z',
    # calls, members and operators
    r'[\w$)\]]\.[a-z_$][\w$]*\((?:["\'{[]|\)|function\b|[\w$.]+\) ?;)',
    r'\$\((?:["\']|document\b|window\b|function\b|this\b)',
    r'\b(?:window|document|self|this)\.[\w$.]+ ?(?:[=([;]|&&|\|\|)', r'\bjavascript:[\w$.]+\(',
    r'[\w$)\]] ?(?:===|!==|(?:&&|\|\|) ?(?:[\w$]+[.(]|[+{[]))', r'\bnew [A-Z]\w+\(\)',
    # style sheets
    r'[.#][a-z_][\w-]*[^{}<>]{0,99}\{ ?(?:\Z|\}|[\w-]+ ?:)',
    r'@(?:media|font-face|keyframes|supports)\b[^{}]{0,99}(?:\{|\Z)',
    r'@(?:import|charset) ?[u"\']',
    r'(?:[{;] ?|\b)(?:font|margin|padding|background|border|text|line|list|vertical|white)-[a-z]+'
    r' ?: ?[^{};:]{1,60}[;}]',
    r'\{ ?(?:font|margin|padding|background|border|display|position|float|overflow|cursor) ?:',
    r'\{ ?[a-z]+-[a-z-]+ ?: ?[^{};:]{1,60}[;}]',
    r'\b(?:margin|padding) ?: ?(?:0|auto|[\d.]+px)[\w %.]{0,40};',
    r'\b(?:h[1-6]|body|html|p|a|ul|li|div|span|table|td|img) ?\{ ?[a-z-]+ ?:',
    r'\b[a-z]+ ?: ?-?[\d.]+(?:(?:px|em|rem|pt)(?: ?!important)?| ?!important) ?[;}]'
    r' ?(?:[a-z-]+ ?: ?[^;]{1,60};|\})',
    # data and templates
    r'\{ ?"[\w@$-]+" ?:', r'\{\{[^{}]{0,99}\}\}', r'\$\{[\w.$]+\}',
)), re.IGNORECASE)
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
    for _ in range(2):
        text = html.unescape(_NO_CHARACTER.sub('\ufffd', text))
    lines = [' '.join(_UNPRINTABLE.sub(' ', line).split())
             for line in _MARKUP.sub(' ', text).splitlines()]
    kept = [_CODE.split(line, 1)[0].rstrip() if _SIGNS.search(line) else line for line in lines]
    words = ' '.join(filter(None, kept))
    names = words.split()
    debris = (
        (kept != lines and len(names) < ENOUGH and 2 * len(words) < sum(map(len, lines)))
        or words in _PLACEHOLDERS or _REST.fullmatch(words) or not any(map(str.isalnum, words))
        or (all(map(_CLASS_NAME.fullmatch, names)) and words.count('-') > 1
            and any(name.startswith('a-') for name in names)))
    return '' if debris else words
