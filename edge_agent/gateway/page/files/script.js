// The page's script: keeps what the page says up to date, and chats. Nothing that it gets is ever read as HTML by it:
// the device's state comes as a document, parsed by the browser, and what a model says is text.
"use strict";

const LOOK_MS = 2000;
const TOKEN_KEY = "edge-agent-token";
const $ = (id) => document.getElementById(id);

function headers(more) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// --- What the device is ------------------------------------------------------------------------------------

const look = {
  timer: 0,
  request: null,

  // Asks once. While the page is hidden nobody asks, so that the interface may end when it is idle.
  now() {
    clearTimeout(look.timer);
    if (document.hidden || look.request || ($("entry") && !sessionStorage.getItem(TOKEN_KEY))) return;
    const request = (look.request = new XMLHttpRequest());
    request.open("GET", "/page/state");
    request.responseType = "document";
    request.timeout = 20000;
    for (const [name, value] of Object.entries(headers({}))) request.setRequestHeader(name, value);
    request.onloadend = () => {
      look.request = null;
      look.take(request);
      if (!document.hidden) look.timer = setTimeout(look.now, LOOK_MS);
    };
    request.send();
  },

  take(request) {
    $("lost").hidden = request.status !== 0 || document.hidden;
    if (request.status === 401) return askForToken();
    if (request.status !== 200 || !request.response) return;
    enter();
    document.title = request.response.title;
    for (const id of ["top", "more"]) become($(id), request.response.getElementById(id));
    offerModels();
  },
};

// Makes an element's content that of another one. What is alike stays, with the focus in it and as far as it is unfolded;
// the parts come in one order always, and some of them are missing at times.
function become(old, fresh) {
  let here = old.firstChild;
  for (const node of [...fresh.childNodes]) {
    let same = here;
    while (same && !alike(same, node)) same = node.nodeType === Node.ELEMENT_NODE ? same.nextSibling : null;
    if (!same) {
      old.insertBefore(node, here);
      continue;
    }
    for (; here !== same; here = removed(here));
    if (node.nodeType === Node.ELEMENT_NODE) {
      takeAttributes(same, node);
      become(same, node);
    } else if (same.nodeValue !== node.nodeValue) same.nodeValue = node.nodeValue;
    here = same.nextSibling;
  }
  while (here) here = removed(here);
}

function alike(one, other) {
  if (one.nodeName !== other.nodeName) return false;
  if (one.nodeType !== Node.ELEMENT_NODE) return true;
  return ["id", "class", "data-model"].every((name) => one.getAttribute(name) === other.getAttribute(name));
}

function takeAttributes(old, fresh) {
  for (const { name } of [...old.attributes])
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
}

// Takes a node away; the one behind it.
function removed(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

document.addEventListener("visibilitychange", look.now);

// --- The token, where the device asks for one ----------------------------------------------------------------

function askForToken() {
  const wrong = sessionStorage.getItem(TOKEN_KEY);
  sessionStorage.removeItem(TOKEN_KEY);
  if (!$("entry")) return location.reload(); // the token was changed: back to the page that asks for it
  if (wrong) show($("entry-problem"), "The device does not take this token.");
}

function enter() {
  if (!$("entry")) return;
  $("entry").remove();
  document.querySelector("main").classList.remove("stranger");
  $("chat").hidden = false;
  $("text").focus();
}

$("entry")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  const usable = /^[\x21-\x7e]+$/.test(token);
  show($("entry-problem"), usable ? "" : "A token has no spaces, and only ASCII characters.");
  if (!usable) return;
  sessionStorage.setItem(TOKEN_KEY, token);
  $("token").value = "";
  look.now();
});

// --- The chat --------------------------------------------------------------------------------------------------

const messages = [];
let running = null;

// The models of the page; one has to be chosen where there are several.
function offerModels() {
  const names = [...document.querySelectorAll("[data-model]")].map((each) => each.dataset.model);
  const offered = [...$("model").options].map((each) => each.value);
  if (names.join("\n") !== offered.join("\n")) {
    const chosen = $("model").value;
    $("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  }
  $("model").hidden = names.length < 2;
}

function add(role, text) {
  $("empty").hidden = true;
  $("new").hidden = false;
  const said = document.createElement("div");
  said.className = `said ${role}`;
  const who = document.createElement("span");
  who.className = "unseen";
  who.textContent = role === "user" ? "You: " : "Model: ";
  const words = document.createElement("p");
  words.textContent = text;
  said.append(who, words);
  $("log").append(said);
  $("log").scrollTop = $("log").scrollHeight;
  return said;
}

function note(said, text) {
  const line = document.createElement("p");
  line.className = "note";
  line.textContent = text;
  said.append(line);
}

// Adds to an answer. Who has scrolled up to read stays there.
function append(said, text) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  said.querySelector("p").append(text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// The documents of a stream of events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function answer(said, began) {
  const asked = { messages, stream: true, stream_options: { include_usage: true } };
  if ($("model").value) asked.model = $("model").value;
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(asked),
    signal: running.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let first = 0;
  let usage = null;
  let reason = "";
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const [choice] = event.choices;
    const text = choice?.delta.content;
    if (text) {
      first ||= performance.now() - began;
      append(said, text);
    }
    reason = choice?.finish_reason ?? reason;
    usage = event.usage ?? usage;
  }
  const parts = [`${usage?.completion_tokens ?? 0} tokens`, `first after ${seconds(first)}`];
  parts.push(`${seconds(performance.now() - began)} in all`);
  if (reason === "length") parts.push("cut at its limit");
  note(said, parts.join(" · "));
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

async function ask(text) {
  running = new AbortController();
  show($("chat-problem"), "");
  $("text").value = "";
  swapButtons(true);
  const question = add("user", text);
  const said = add("model", "");
  messages.push({ role: "user", content: text });
  try {
    await answer(said, performance.now());
  } catch (error) {
    if (error.name === "AbortError") note(said, "stopped");
    else show($("chat-problem"), error.message);
  }
  const words = said.querySelector("p").textContent;
  if (words) messages.push({ role: "assistant", content: words });
  else {
    // It was not answered: it can be sent again.
    messages.pop();
    question.remove();
    said.remove();
    if (!$("text").value) $("text").value = text;
  }
  running = null;
  swapButtons(false);
}

function swapButtons(busy) {
  const focused = document.activeElement;
  $("log").setAttribute("aria-busy", busy);
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("new").disabled = busy;
  if (focused === $("send")) $("stop").focus();
  if (focused === $("stop")) $("text").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (text && !running) ask(text);
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

$("stop").addEventListener("click", () => running?.abort());

$("new").addEventListener("click", () => {
  messages.length = 0;
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("new").hidden = true;
  show($("chat-problem"), "");
  $("text").focus();
});

offerModels();
look.now();
