// The labelling page. The server gives a hand of pairs, the first is shown; an answer moves on at once and is saved
// behind it, in order, until it is. Of a pair the page knows its texts and an opaque name, nothing else.

const $ = (id) => document.getElementById(id);
const POLL = 15; // seconds, where nothing is left
const AT_A_TIME = 8; // pairs in a heartbeat, at the most
const CAP = 600; // seconds of an item at the most: whoever looks longer is elsewhere
const STORED = "align-page"; // where this browser keeps what its person wishes
const csrf = document.querySelector("meta[name=csrf]")?.content ?? "";

const DRESSING = 300; // milliseconds for a pair's formulas and colours
const DEPTH = 200; // of a formula's elements: some 28 fractions in each other; at a thousand Chromium falls over
const ELEMENTS = 3000; // of a formula
const CODE = 4000; // characters of code that are coloured at once
const FORMULAS = {
  throwOnError: true, // then it stays as it was written
  strict: "ignore", // what is not quite TeX is set all the same: a Persian or Chinese word in it
  trust: false,
  maxSize: 5, // em
  maxExpand: 200,
};
const MACROS = { "\\vec": "\\overrightarrow", "\\pmb": "\\boldsymbol" }; // without style attributes, which this page forbids

let hand = []; // pairs leased to this person; the first is in front of them
const leaving = new Set(); // names of pairs whose answer is on its way
let line = Promise.resolve(); // what is to be saved, one after another
let unsaved = 0;
let isDone = false; // the server has nothing more
let missing = 0; // labels of all people that are not in
let hasLeft = false; // the session is over
let strength = null;
let visible = 0; // milliseconds that the pair has been seen
const wishes = { keys: true, together: false, ...remembered() };
let follower = null; // the answer whose scrolling is the other's doing
let since = 0; // when it was last come back to, 0 while the page is hidden

async function post(path, body) {
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": csrf };
  const signal = AbortSignal.timeout(15000);
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({}));
  throw Object.assign(new Error(error ?? "The server could not answer."), { status: response.status });
}

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const isPassing = (error) => !error.status || error.status >= 500 || [408, 429].includes(error.status);
const keepDraft = () => hand[0] && (hand[0].comment = $("comment").value);
const newKey = () => crypto.getRandomValues(new Uint32Array(4)).join("-");
const refresh = async () => hasLeft || take(await insist("/api/next", {}));
const say = (text) => ($("status").textContent = text);

// Posts until the server has answered; a refusal is shown and ends it, with undefined.
async function insist(path, body) {
  for (let wait = 1; ; wait = Math.min(2 * wait, POLL)) {
    try {
      return await post(path, body);
    } catch (error) {
      if (!isPassing(error)) {
        say(error.message);
        if (error.status === 401) leave(error.message);
        return undefined;
      }
      if (unsaved) say("Not saved, trying again …");
      await pause(wait);
    }
  }
}

function save(path, body, then) {
  unsaved += 1;
  say("Saving …");
  line = line.then(async () => {
    const said = await insist(path, body);
    unsaved -= 1;
    leaving.delete(body.item);
    if (said && !unsaved) say("Saved");
    if (said) then(said);
    else await refresh();
  });
}

function take(said) {
  if (!said) return;
  const before = hand[0];
  const known = new Set([...hand.map((item) => item.id), ...leaving]);
  hand.push(...said.items.filter((item) => !known.has(item.id)));
  isDone = !said.items.length;
  showProgress(said.progress);
  if (hand[0] !== before || !before) show();
}

const notice = (text) => Object.assign($("notice"), { textContent: text, hidden: !text });

function leave(why) {
  hand = [];
  hasLeft = true;
  show();
  notice(why);
}

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(STORED));
  } catch {
    return null; // a browser that keeps nothing, or kept something else
  }
}

function wish(name, is) {
  wishes[name] = is;
  try {
    localStorage.setItem(STORED, JSON.stringify(wishes));
  } catch {} // then it holds for this visit
  showWishes();
}

function showWishes() {
  for (const box of document.querySelectorAll("[data-wish]")) box.checked = wishes[box.dataset.wish];
  document.body.classList.toggle("no-keys", !wishes.keys);
  for (const button of document.querySelectorAll("[data-shortcut]")) {
    if (wishes.keys) button.setAttribute("aria-keyshortcuts", button.dataset.shortcut);
    else button.removeAttribute("aria-keyshortcuts");
  }
}

// Where one answer is scrolled to, the other goes too, as far in proportion, if that is wished.
function follow(one, other) {
  if (follower === one) return (follower = null);
  const [room, others] = [one, other].map((pane) => pane.scrollHeight - pane.clientHeight);
  const to = Math.round((one.scrollTop / Math.max(room, 1)) * others);
  if (!wishes.together || Math.abs(to - other.scrollTop) <= 1) return null;
  follower = other;
  other.scrollTop = to;
}

// Each block in the direction of its first letter, Han characters beside kana in their Japanese shapes, code from left to right.
function direct(view) {
  for (const block of view.children) block.dir = block.tagName === "PRE" ? "ltr" : "auto";
  view.lang = /[\u3040-\u30ff]/.test(view.textContent) ? "ja" : ""; // empty: not known, and not English
  return view;
}

function text(content) {
  const views = { rendered: ["div", content.html], raw: ["pre", content.raw] };
  return Object.entries(views).map(([name, [tag, html]]) => {
    const view = Object.assign(document.createElement(tag), { className: `text ${name}`, dir: "auto" });
    view.innerHTML = html; // cleaned by the server, which also forbids this page all foreign code
    return direct(view);
  });
}

function message(said) {
  const role = Object.assign(document.createElement("h3"), { textContent: said.role });
  const box = document.createElement("article");
  box.append(...(said.role ? [role] : []), ...text(said)); // without one it is a word of the page itself
  return box;
}

const size = (id) => [...$(id).querySelectorAll(".raw")].reduce((sum, one) => sum + one.textContent.length, 0);
const panes = () => [...document.querySelectorAll("#pair > section, .answers > section")];

const inside = (kind) => [...document.querySelectorAll(`.text:not(.raw) ${kind}`)].filter((code) => !code.childElementCount);

// Formulas and code of what is in front, from their sources that the server marked; with what they need fetched first.
async function dress() {
  const item = hand[0];
  const [formulas, codes] = [inside("code.math"), inside("pre > code[class^=language-]")];
  try {
    if (formulas.length) await import("/static/katex/katex.min.js");
    const colours = codes.length ? (await import("/static/highlight/highlight.min.js")).default : null;
    if (hand[0] !== item) return;
    const end = performance.now() + DRESSING; // whatever is left then stays as it was written
    const isInTime = () => performance.now() < end;
    for (const code of formulas) isInTime() && setFormula(code);
    for (const code of codes) isInTime() && colour(code, colours);
  } catch {} // not to be had: the sources say the same
  reach();
}

function setFormula(code) {
  const [, opening, tex] = code.textContent.match(/^(\\[([]|\$\$?)(.*?)(?:\\[)\]]|\$\$?)$/s) ?? [];
  const shown = Object.assign(document.createElement("span"), { className: "formula" });
  try {
    katex.render(tex, shown, { ...FORMULAS, macros: { ...MACROS }, displayMode: ["$$", "\\["].includes(opening) });
  } catch {
    return;
  }
  if (!isTooMuch(shown)) code.replaceWith(shown);
}

function isTooMuch(root) {
  let depth = 0;
  for (let row = [root]; row.length && depth <= DEPTH; row = row.flatMap((element) => [...element.children])) depth += 1;
  return depth > DEPTH || root.querySelectorAll("*").length > ELEMENTS;
}

function colour(code, colours) {
  const language = code.className.replace("language-", "");
  if (code.textContent.length > CODE || !colours.getLanguage(language)) return;
  code.innerHTML = colours.highlight(code.textContent, { language, ignoreIllegals: true }).value; // escapes the rest
}

// What is wider than its place can be scrolled from the keyboard too.
function reach() {
  for (const wide of document.querySelectorAll(".text pre, .text table, .katex-display")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
    else wide.removeAttribute("tabindex");
  }
}

// What somebody who does not see the page learns of a new pair, and where they go on from.
function announce() {
  const [asked, one, other] = ["prompt", "left", "right"].map(size);
  $("news").textContent = `A new pair: ${asked} characters of conversation, ${one} in answer 1, ${other} in answer 2.`;
}

function show({ isMoving = false } = {}) {
  const item = hand[0];
  $("pair").hidden = !item;
  for (const button of $("choices").children) button.disabled = !item;
  strength = null;
  showStrength();
  visible = 0;
  since = document.hidden ? 0 : performance.now();
  $("comment").value = item?.comment ?? "";
  $("comment-box").hidden = !$("comment").value;
  notice(item ? "" : isDone ? nothingLeft() : "Loading …");
  if (!item && isMoving) $("notice").focus();
  if (!item) return;
  item.key ??= newKey();
  $("prompt").replaceChildren(...item.prompt.map(message));
  $("left").replaceChildren(...text(item.left));
  $("right").replaceChildren(...text(item.right));
  for (const pane of panes()) pane.scrollTop = 0;
  window.scrollTo(0, 0);
  announce();
  dress();
  if (isMoving) $("pair-name").focus({ preventScroll: true });
}

// A label that is missing and not asked of this person is in front of somebody, or of a pair that wants a second one.
function nothingLeft() {
  const others = missing && !unsaved ? `Labels that other people have to give: ${missing}. ` : "";
  return `Nothing is left to label for now. ${others}This page looks again by itself.`;
}

function showProgress({ mine, done, wanted }) {
  missing = wanted - done;
  $("bar").max = Math.max(wanted, 1);
  $("bar").value = done;
  $("counts").textContent = `${done} of ${wanted} · ${mine} by you`;
}

function showStrength() {
  for (const button of document.querySelectorAll("[data-strength]"))
    button.setAttribute("aria-pressed", Number(button.dataset.strength) === strength);
}

function choose(choice) {
  const item = hand[0];
  if (!item) return;
  const seen = (visible + (since ? performance.now() - since : 0)) / 1000;
  const comment = $("comment").value.trim() || null;
  const body = { item: item.id, key: item.key, choice, seconds: Math.min(seen, CAP), strength, comment };
  if ($("comment-box").contains(document.activeElement)) document.activeElement.blur();
  leaving.add(item.id);
  hand.shift();
  show({ isMoving: true });
  save("/api/submit", body, take);
}

function undo() {
  save("/api/undo", { key: newKey() }, (said) => {
    keepDraft();
    showProgress(said.progress);
    if (!said.item) return say("Nothing to undo");
    hand = [said.item, ...hand.filter((item) => item.id !== said.item.id)];
    show({ isMoving: true });
    say("Undone: answer it again");
  });
}

function press(value) {
  strength = strength === value ? null : value;
  showStrength();
}

function writeComment() {
  $("comment-box").hidden = !hand[0];
  $("comment").focus();
}

const toggleRaw = () => $("raw").setAttribute("aria-pressed", document.body.classList.toggle("is-raw"));
const toggleHelp = () => $("keys")[$("keys").open ? "close" : "showModal"]();

const KEYS = {
  1: () => choose("left"),
  2: () => choose("right"),
  t: () => choose("tie"),
  b: () => choose("both_bad"),
  s: () => choose("skip"),
  3: () => press(1),
  4: () => press(2),
  5: () => press(3),
  u: undo,
  c: writeComment,
  r: toggleRaw,
  g: () => $("guidelines")?.toggleAttribute("open"),
  "?": toggleHelp,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if (event.target.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (!wishes.keys) return;
  const key = event.code?.startsWith("Digit") && event.key !== "?" ? event.code.at(-1) : event.key?.toLowerCase();
  if (!Object.hasOwn(KEYS, key) || ($("keys").open && key !== "?")) return;
  event.preventDefault();
  KEYS[key]();
}

// Says that the pairs are still looked at; a page that nobody sees gives them back in time.
async function beat() {
  const asked = hand.map((item) => item.id);
  if (document.hidden || !asked.length) return;
  const held = new Set();
  for (let i = 0; i < asked.length; i += AT_A_TIME) { // as many as the server takes
    const said = await post("/api/heartbeat", { items: asked.slice(i, i + AT_A_TIME) }).catch(() => null);
    if (!said) return;
    said.held.forEach((id) => held.add(id));
  }
  const lost = new Set(asked.filter((id) => !held.has(id)));
  const front = hand[0];
  if (!hand.some((item) => lost.has(item.id))) return;
  keepDraft();
  const next = await insist("/api/next", {});
  if (!next) return;
  const again = new Set(next.items.map((item) => item.id)); // nobody else has come: it stays
  hand = hand.filter((item) => !lost.has(item.id) || again.has(item.id));
  take(next);
  if (hand[0] === front || leaving.has(front.id)) return;
  show({ isMoving: true });
  say("The pair that you looked at went to somebody else meanwhile");
}

function onVisibility() {
  if (since && document.hidden) visible += performance.now() - since;
  since = document.hidden ? 0 : performance.now();
  if (!document.hidden) beat();
}

async function enter() {
  const token = location.hash.slice(1);
  history.replaceState(null, "", "/enter"); // before anything else can see it
  try {
    await post("/api/enter", { token });
    location.replace("/");
  } catch (error) {
    say(error.message);
  }
}

function start() {
  for (const button of $("choices").children) button.onclick = () => choose(button.dataset.choice);
  for (const button of document.querySelectorAll("[data-strength]"))
    button.onclick = () => press(Number(button.dataset.strength));
  const buttons = { undo, say: writeComment, raw: toggleRaw, help: toggleHelp, close: toggleHelp };
  for (const [id, act] of Object.entries(buttons)) $(id).onclick = act;
  for (const box of document.querySelectorAll("[data-wish]")) box.onchange = () => wish(box.dataset.wish, box.checked);
  for (const button of document.querySelectorAll("[aria-keyshortcuts]"))
    button.dataset.shortcut = button.getAttribute("aria-keyshortcuts");
  showWishes();
  const [left, right] = document.querySelectorAll(".answers > section");
  left.onscroll = () => follow(left, right);
  right.onscroll = () => follow(right, left);
  document.querySelectorAll("#guidelines .text").forEach(direct);
  window.addEventListener("resize", reach);
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", onVisibility);
  window.addEventListener("beforeunload", (event) => unsaved && event.preventDefault());
  setInterval(beat, 1000 * Number(document.body.dataset.beat));
  const isIdle = () => isDone && !hand.length && !document.hidden && !hasLeft;
  setInterval(() => isIdle() && post("/api/next", {}).then(take, () => {}), 1000 * POLL);
  refresh();
}

if (document.body.dataset.page === "enter") enter();
else start();
