'use strict';
// A pointer over a chart: the legend shows the value of every curve at its place.
for (const figure of document.querySelectorAll('figure.chart')) {
  const curves = JSON.parse(figure.querySelector('.points').textContent);
  const [left, top, right, bottom] = figure.dataset.box.split(' ').map(Number);
  const [begin, end] = figure.dataset.range.split(' ').map(Number);
  const svg = figure.querySelector('svg'), cursor = svg.querySelector('.cursor');
  const cells = [...figure.querySelectorAll('.legend b')], first = cells.map(cell => cell.textContent);
  const digits = figure.dataset.digits;
  const shown = y => y === null ? '–' : digits ? y.toFixed(digits) : String(+y.toPrecision(4));
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const here = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = begin + (here - left) / (right - left) * (end - begin);
    let x = null;
    curves.forEach((curve, i) => {
      let best = 0;
      curve.x.forEach((value, j) => { if (Math.abs(value - wanted) < Math.abs(curve.x[best] - wanted)) best = j; });
      cells[i + 1].textContent = shown(curve.y[best]);
      if (x === null || Math.abs(curve.x[best] - wanted) < Math.abs(x - wanted)) x = curve.x[best];
    });
    cells[0].textContent = x;
    cursor.setAttribute('d', `M${left + (x - begin) / (end - begin) * (right - left)} ${top}V${bottom}`);
  });
  svg.addEventListener('pointerleave', () => {
    cells.forEach((cell, i) => { cell.textContent = first[i]; });
    cursor.removeAttribute('d');
  });
}

// The gallery: one session at a time, and the reasons for an item. Titles are set as text only.
const data = document.getElementById('gallery-data');
if (data) {
  const {items, sides, why} = JSON.parse(data.textContent);
  const sessions = [...document.querySelectorAll('.session')];
  const SVG = 'http://www.w3.org/2000/svg', NAMES = {k: 'k, their content', r: 'r, their use in sessions'};
  let at = 0;

  const make = (tag, text, parent, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = text;
    if (kind) made.className = kind;
    if (parent) parent.append(made);
    return made;
  };

  const bar = (value, parent, colour) => {
    const svg = document.createElementNS(SVG, 'svg');
    svg.setAttribute('class', colour);
    svg.setAttribute('aria-hidden', 'true');
    for (const width of [100, 100 * Math.max(value, 0)]) {
      const rect = document.createElementNS(SVG, 'rect');
      for (const [name, set] of Object.entries({width: width + '%', height: 8, rx: 4})) rect.setAttribute(name, set);
      svg.append(rect);
    }
    parent.append(svg);
  };

  const picture = (id, parent) => {
    if (!items[id].picture) return make('span', 'no picture', parent, 'nothing');
    const image = make('img', null, parent);
    image.src = items[id].picture;
    image.alt = items[id].title;
    return image;
  };

  const ask = button => {
    const session = sessions[at], id = button.dataset.ask, {prefix, of} = why[at], reasons = of[id];
    for (const other of session.querySelectorAll('[data-ask]')) other.setAttribute('aria-pressed', other === button);
    const panel = session.querySelector('.why');
    panel.replaceChildren();
    make('h4', `Reasons for “${items[id].title}”`, panel);
    const last = items[prefix[prefix.length - 1]].title;
    const sentences = [reasons.followed ? `Training went from “${last}” to it ${reasons.followed === 1 ? 'once' : reasons.followed + ' times'}.`
      : `Training never went from “${last}” to it.`];
    if (!items[id].warm) sentences.push('It is cold: it is in no training session.');
    if (reasons.true !== undefined) sentences.push(`Its true probability here is ${(100 * reasons.true).toFixed(1)} %.`);
    if (reasons.expert) sentences.push(`In the served score, “${reasons.expert}” adds most to it.`);
    make('p', sentences.join(' '), panel);
    const columns = make('div', null, panel, 'sides');
    sides.forEach((side, place) => {
      const column = make('div', null, columns);
      make('h5', `Likeness to the session’s items in ${NAMES[side] || side}`, column);
      const list = make('ul', null, column, 'like');
      prefix.forEach((item, i) => {
        const line = make('li', null, list);
        make('span', items[item].title, line);
        bar(reasons[side][i], line, 's' + place);
        make('b', reasons[side][i].toFixed(2), line);
      });
      if (!items[id].near) return;
      make('h5', `Nearest of the catalogue in ${side}`, column);
      const row = make('div', null, column, 'near');
      for (const [other, cosine] of items[id].near[side]) {
        const tile = make('div', null, row, 'tile');
        picture(other, tile);
        make('b', cosine.toFixed(2), tile);
        make('span', items[other].title, tile, 'name');
      }
    });
  };

  const show = (place, focus) => {
    at = (place + sessions.length) % sessions.length;
    sessions.forEach((session, i) => { session.hidden = i !== at; });
    for (const image of sessions[at].querySelectorAll('img[data-item]')) image.src = items[image.dataset.item].picture;
    document.getElementById('place').textContent = `${at + 1} / ${sessions.length}`;
    ask(sessions[at].querySelector('.five [data-ask]'));
    if (focus) document.getElementById('gallery').scrollIntoView({block: 'nearest'});
  };

  for (const session of sessions) session.addEventListener('click', event => {
    const button = event.target.closest('[data-ask]');
    if (button) ask(button);
  });
  document.getElementById('back').addEventListener('click', () => show(at - 1));
  document.getElementById('on').addEventListener('click', () => show(at + 1));
  document.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const box = document.getElementById('gallery').getBoundingClientRect();
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (box.bottom < 0 || box.top > innerHeight || event.target.closest('.scroll')) return;
    event.preventDefault();
    show(at + step);
  });
  show(0);
}
