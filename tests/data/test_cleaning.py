"""Scraped fields: page code and markup go; titles that look a little like them stay."""

import numpy as np
import pytest

from tpad_jax.data import cleaning
from tpad_jax.data.cleaning import clean, clean_all

REAL = r"""
size < 5 and > 3 <3|Warranty >>> THT|C++ Primer (5th Edition)|Vector<int> basics|Phone Case <Black>
A && B Boutique|Set {Color: Red; Size: L}|JavaScript: The Good Parts|f(x) = x^2 poster|Price=Quality
Auto-off function (saves battery)|Function() Album|100% Cotton; width: 12 in; height: 5 in;|a => b
No.5 {Limited}|Mr.Clean {2 pack}|Java: var and let explained|$5.00 (each)|12" > 10"|<3|42|汉字
return policy: none;|Staples Stickies 3" x 3" Notes, 6/Pack OF 100= 600|all-in-one|#1 Dad Mug|AT&T
""".strip().replace('\n', '|').split('|')
DEBRIS = r"""
<span class="a-size-medium a-color-secondary"
<span class=a-size-medium
<div id="x"><span
class="a-size-medium a-color-secondary">
&amp;lt;span class=&amp;quot;x&amp;quot;
<a href="javascript:void(0)"
<img src="http://x/y.jpg" alt="
<![CDATA[
var aPageStart = (new Date()).getTime();
P.when('A').execute(function(A){
window.ue_t0=ue_t0||+new Date();
$(document).ready(function() {
for (var i = 0; i < n; i++) {
})();
#productTitle {
.a-row { margin: 0 }
body { margin:0; padding:0 }
*,*::before { box-sizing: border-box; }
@media screen and (max-width: 100px) {
font-size: 12px; color: #333;
{"@context": "http://schema.org"}
{{ product.title }}
<%= title %>
[object Object]
a-size-medium a-color-secondary
&nbsp;
...
""".strip().splitlines()


@pytest.mark.parametrize('title', REAL)
def test_real_titles_stay(title):
    assert clean(title) == title


@pytest.mark.parametrize('title', DEBRIS)
def test_debris_goes(title):
    assert clean(title) == ''
    assert clean(f'Blue pen for left hands\n{title}').startswith('Blue pen for left hands')


def test_a_tag_that_never_closes_takes_no_words():
    assert clean('<span class="a" id=b Blue pen') == 'Blue pen'
    assert clean('Sargent Pencils" />') == 'Sargent Pencils'


@pytest.mark.parametrize('piece', ['<a x="', '<a b=', 'if(', '.a ', 'a.b(', 'a-', '}) ', '{{',
                                   'function ( ', '@media ', 'return x('])
def test_cleaning_takes_linear_time(piece):
    # a quadratic pattern would take minutes here
    assert len(clean(piece * 100_000)) <= len(piece) * 100_000

def test_many_texts_are_cleaned_as_each_alone(monkeypatch):
    # words and single signs, so that every pattern occurs almost, and without the sign it needs
    pieces = ('Pen a- a-b-c a-row x.y( f() this.x [ window. javascript:go new Date() null NaN . , '
              'import from "a" use strict @media @a & && &amp &copy A&B = { } ; || | < > - ! $( '
              '\ud800 \x01 \xa0 \u200b \u3000 \u2028 汉 é ² ٣ margin: 0 [object Object]').split(' ')
    pieces += '"use strict" (', 'import a from "b" (', 'new Date() '
    rng = np.random.default_rng(0)
    texts = ['', 'undefined', *REAL, *DEBRIS]
    for glue in rng.choice(['', ' ', ' '], 20_000):
        texts.append(glue.join(rng.choice(pieces, rng.integers(1, 6))))
    expected = list(map(clean, texts))
    assert clean_all(texts) == expected  # halves of surrogate pairs are among them
    texts, expected = zip(*((text, words) for text, words in zip(texts, expected, strict=True)
                            if '\ud800' not in text), strict=True)
    called = []
    monkeypatch.setattr(cleaning, 'clean', lambda text: called.append(text) or clean(text))
    assert clean_all(list(texts)) == list(expected)
    assert len(called) < 0.9 * len(texts)
