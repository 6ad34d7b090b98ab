// The page: built once from the first state, then only its texts and bars change.

const $ = id => document.getElementById(id);

// el makes an element; attributes that are functions are listeners.
function el(tag, attrs = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (typeof v === 'function') e.addEventListener(k, v);
    else e.setAttribute(k, v);
  }
  e.append(...children);
  return e;
}

function svg(tag, attrs) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v);
  return e;
}

const number = new Intl.NumberFormat('en', { useGrouping: true });
const num = n => n < 0 ? '–' : number.format(n);
const set = (e, text) => { if (e.textContent !== text) e.textContent = text; };

async function order(o) {
  try {
    await fetch('orders', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(o) });
  } catch {
    // The server is gone: the events tell.
  }
}

// arm makes a button order what() when it is pressed. It is never really disabled:
// it would lose the focus of the keyboard.
function arm(e, what) {
  e.addEventListener('click', () => {
    if (e.getAttribute('aria-disabled') !== 'true') order(what());
  });
  return e;
}
const button = (label, name, what) => arm(el('button', { type: 'button', 'aria-label': name }, label), what);
const enable = (e, on) => e.setAttribute('aria-disabled', String(!on));

const kinds = ['ours', 'theirs'];
let page; // what update changes

function build(s) {
  page = { sides: [], workers: [], seen: 0 };
  s.sides.forEach((side, i) => {
    const v = { title: el('h2', {}, side.by), addr: el('span', { class: 'addr' }), now: el('span'), counts: {} };
    const field = (key, label, dd = el('dd')) => {
      v.counts[key] = dd;
      return el('div', {}, el('dt', {}, label), dd);
    };
    v.svg = svg('svg', { class: 'spark', role: 'img', viewBox: `0 0 ${side.history.length - 1} 40`, preserveAspectRatio: 'none' });
    for (const c of ['area', 'line', 'lost']) v.svg.append(v[c] = svg('path', { class: c }));
    $('sides').append(el('article', { class: `card side ${kinds[i]}`, 'aria-label': side.by },
      el('header', {}, v.title, v.addr),
      el('dl', { class: 'score' }, field('lost', 'lost'), field('died', 'died with the process')),
      el('dl', { class: 'counts' }, field('tried', 'tried'), field('served', 'served'), field('waiting', 'waiting'),
        field('refused', 'refused'), field('other', 'other')),
      v.svg,
      el('p', { class: 'caption' }, v.now, el('span', {}, `last ${Math.round(side.history.length * s.tick)} s`))));
    page.sides.push(v);
  });

  s.sides[0].workers.forEach((w, i) => {
    const v = { rows: [], pids: [], info: {} };
    const info = (key, label) => {
      v.info[key] = el('dd');
      return el('div', { title: terms[key] }, el('dt', {}, label), v.info[key]);
    };
    v.kill = button('SIGKILL', `Kill worker ${i + 1} with SIGKILL`, () => ({ do: 'kill', worker: i }));
    v.restart = button('Restart', `Restart worker ${i + 1}`, () => ({ do: 'restart', worker: i }));
    v.pids = s.sides.map(() => el('span'));
    v.reason = el('p', { class: 'reason' });
    const head = side => el('div', { class: 'cell', role: 'columnheader' },
      el('span', {}, side.by), el('span', {}, '/s'), el('span', {}, 'total'), el('span', {}, 'queue'));
    const table = el('div', { role: 'table', 'aria-label': `Listeners of worker ${i + 1}` },
      el('div', { class: 'row head', role: 'row' }, el('span', { role: 'columnheader' }, ''), ...s.sides.map(head), el('span', { role: 'columnheader' }, '')));
    w.listeners.forEach((_, k) => {
      const name = `${i + 1}.${k + 1}`;
      const r = { cells: [] };
      const cells = s.sides.map((side, n) => {
        const c = { rate: el('i'), queue: el('i'), texts: [el('span'), el('span'), el('span')] };
        c.cell = el('div', { class: `cell ${kinds[n]}`, role: 'cell' },
          el('div', { class: 'bars', 'aria-hidden': 'true' }, el('span', {}, c.rate), el('span', {}, c.queue)), ...c.texts);
        r.cells.push(c);
        return c.cell;
      });
      r.stall = button('Stall', `Stall listener ${name} for ${s.stall} seconds`, () => ({ do: 'stall', worker: i, listener: k }));
      r.close = button('Close', `Close listener ${name}`, () => ({ do: r.closed ? 'open' : 'close', worker: i, listener: k }));
      r.label = name;
      table.append(el('div', { class: 'row', role: 'row' }, el('span', { class: 'name', role: 'rowheader' }, name), ...cells,
        el('div', { class: 'buttons', role: 'cell' }, r.stall, r.close)));
      v.rows.push(r);
    });
    $('workers').append(el('section', { class: 'card worker', 'aria-label': `Worker ${i + 1}` },
      el('header', {}, el('h2', {}, `Worker ${i + 1}`), el('div', { class: 'pids' }, ...v.pids),
        el('div', { class: 'actions' }, v.kill, v.restart)),
      el('dl', { class: 'info' }, info('balancer', 'balanced by'), info('steering', 'steered by'), info('onClose', 'if a listener closes'),
        info('onKill', 'if it is killed'), info('sockets', 'sockets'), info('inherited', 'inherited')),
      v.reason, table));
    page.workers.push(v);
  });

  for (const m of ['kernel', 'dispatcher']) arm($(m), () => ({ do: 'mode', mode: m }));
  arm($('keeper'), () => ({ do: 'keeper' }));
  arm($('burst'), () => ({ do: 'burst' }));
  arm($('reset'), () => ({ do: 'reset' }));
  set($('work'), `Each accept loop takes ${number.format(s.work)} ms for a connection, so that queues form.`);
  set($('about'), `What becomes of ${number.format(s.rate)} connections a second when a listener goes away, on ${s.system}.`);
  $('notes').append(...s.notes.map(n => el('li', {}, n)));
  $('notes').hidden = s.notes.length === 0;
}

// terms explain what Info says.
const terms = {
  balancer: 'Who spreads connections over the listeners: the kernel, or the process itself.',
  steering: 'By what: flow is the hash of addresses and ports.',
  onClose: 'Who takes over the queue of a listener that closes. process: its siblings; kernel: any socket of the address; handoff: other processes that hold the socket.',
  onKill: 'Who takes over all queues of the worker if it is killed now.',
  sockets: 'Sockets that the worker accepts from. It has more than listeners when it serves those of one that is gone.',
  inherited: 'Connections that came through the socket of a listener or a worker that is gone.',
};

// ceiling is the next of 1, 2, 5, 10, ...: a scale that seldom moves.
function ceiling(n, least) {
  let c = least;
  for (let i = 0; c < n; i++) c *= i % 3 === 1 ? 2.5 : 2;
  return c;
}

const path = (points, top) => points.map((n, x) => `${x ? 'L' : 'M'}${x} ${(38 - 36 * n / top).toFixed(1)}`).join('');

function update(s) {
  const listeners = s.sides.flatMap(d => d.workers.flatMap(w => w.listeners));
  const most = ceiling(Math.max(...listeners.map(l => l.rate)), 10);
  const longest = ceiling(Math.max(...listeners.map(l => l.queued)), 10);
  const top = ceiling(Math.max(...s.sides.flatMap(d => d.history.map(h => h.served))), 10);

  s.sides.forEach((d, i) => {
    const v = page.sides[i], t = d.tally;
    set(v.addr, d.err ? 'not here' : d.addr);
    v.addr.title = d.err || '';
    for (const [key, dd] of Object.entries(v.counts)) set(dd, d.err ? '–' : num(t[key]));
    if (!d.exact && !d.err) {
      set(v.counts.lost, `≤ ${num(t.lost)}`);
      set(v.counts.died, `≥ ${num(t.died)}`);
    }
    v.counts.lost.classList.toggle('bad', t.lost > 0);
    const h = d.history, line = path(h.map(x => x.served), top);
    v.line.setAttribute('d', line);
    v.area.setAttribute('d', `${line}L${h.length - 1} 40L0 40Z`);
    v.lost.setAttribute('d', h.map((x, n) => x.lost ? `M${n} 40V2` : '').join(''));
    const now = `${num(h[h.length - 1].served)} answers a second`;
    set(v.now, now);
    v.svg.setAttribute('aria-label', now);
  });

  page.workers.forEach((v, i) => {
    const both = s.sides.map(d => d.workers[i]);
    const [ours] = both;
    both.forEach((w, n) => {
      set(v.pids[n], `${s.sides[n].by} ${w.pid ? 'pid ' + w.pid : w.state}`);
      v.pids[n].classList.toggle('bad', !w.pid && !s.sides[n].err);
    });
    const parts = heirs => heirs?.replaceAll('+', ' + ');
    const info = ours.pid ? { ...ours, onClose: parts(ours.onClose), onKill: parts(ours.onKill), sockets: `${ours.sockets}, ${ours.members} listeners`, inherited: num(ours.inherited) } : {};
    for (const [key, dd] of Object.entries(v.info)) set(dd, info[key] || '–');
    const reason = info.reason ? `Nothing stronger because ${info.reason}` : '';
    set(v.reason, reason);
    v.reason.title = reason;
    const running = both.some(w => w.pid);
    enable(v.kill, running && !s.busy);
    enable(v.restart, !s.busy);
    set(v.restart, running ? 'Restart' : 'Start');
    v.restart.setAttribute('aria-label', `${running ? 'Restart' : 'Start'} worker ${i + 1}`);
    v.rows.forEach((r, k) => {
      r.cells.forEach((c, n) => {
        const l = both[n].listeners[k];
        c.rate.style.transform = `scaleX(${l.rate / most})`;
        c.queue.style.transform = `scaleX(${Math.max(l.queued, 0) / longest})`;
        [l.rate, l.total, l.queued].forEach((x, j) => set(c.texts[j], num(x)));
        c.cell.classList.toggle('off', l.state === 'closed');
      });
      const l = ours.listeners[k];
      r.closed = l.state === 'closed';
      enable(r.stall, ours.pid && l.state === 'open' && !s.busy);
      enable(r.close, ours.pid && !s.busy);
      set(r.stall, l.state === 'stalled' ? 'Stalls' : 'Stall');
      set(r.close, r.closed && ours.pid ? 'Open' : 'Close');
      r.close.setAttribute('aria-label', `${r.closed ? 'Open' : 'Close'} listener ${r.label}`);
    });
  });

  for (const m of ['kernel', 'dispatcher']) {
    $(m).setAttribute('aria-pressed', String(s.mode === m));
    enable($(m), !s.busy && s.mode !== m && (m === 'dispatcher' || s.canKernel));
  }
  $('keeper').setAttribute('aria-pressed', String(s.keeper));
  enable($('keeper'), !s.busy && s.canKeep);
  $('keeper').title = s.canKeep ? '' : 'This system has no handoff, which a keeper is part of.';
  $('kernel').title = s.canKernel ? '' : 'The kernel of this system doesn’t balance.';
  set($('burst'), `Burst of ${number.format(s.burst)}`);
  enable($('burst'), !s.busy);
  enable($('reset'), !s.busy);

  const log = $('log');
  for (const l of s.log.filter(l => l.n > page.seen)) {
    log.prepend(el('li', {}, el('time', {}, l.at), l.text));
    page.seen = l.n;
  }
  while (log.children.length > 40) log.lastChild.remove();
}

let events;

function status(is, text) {
  $('status').dataset.is = is;
  set($('status'), text);
}

function watch() {
  events?.close();
  events = null;
  if (document.hidden) {
    status('waiting', 'paused');
    return;
  }
  events = new EventSource('events');
  events.onmessage = e => {
    const s = JSON.parse(e.data);
    if (!page) build(s);
    update(s);
    status('live', 'live');
  };
  events.onerror = () => status('gone', 'disconnected');
}

document.addEventListener('visibilitychange', watch);
watch();
