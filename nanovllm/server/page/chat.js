// The chat page: what is shown, what a person does, and the answers that arrive.

import { ApiProblem, listModels, streamChat } from "./api.js";
import {
  addChunk, addNode, apiMessages, merge, newAnswer, newConversation, nodeOf, path, showNewest, showVersion, titleOf,
  versions,
} from "./conversation.js";
import { element } from "./markdown.js";
import { messageView } from "./message.js";
import { applyTheme, bindSettings, isDark, openSettings, requestFields } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore, loadSettings, saveSetting } from "./store.js";

const SUGGESTIONS = [
  "Explain how a KV cache speeds up a language model",
  "Write a Python function that merges two sorted lists",
  "Compare tea and coffee in a small table",
  "Draft a kind note that declines an invitation",
];
const SAVE_INTERVAL_MS = 1000;
const UNDO_MS = 8000;

const byId = (id) => document.getElementById(id);
const [input, send, stop, scroller, thread] = ["input", "send", "stop", "scroller", "thread"].map(byId);
const prefersTouch = matchMedia("(pointer: coarse)");

const store = new ConversationStore(refreshStored);
const settings = loadSettings();
const conversations = new Map(); // id -> conversation, all that the browser keeps
const running = new Map(); // id of a conversation -> AbortController of its answer
let current = newConversation();
let views = [];
let isFollowing = true; // the end of the thread stays in view
let isFramePending = false;

const sidebar = new Sidebar({ rename, remove });
const actions = {
  again: (node) => generate(current, nodeOf(current, node.parent)),
  edit: (node, text) => ask(text, node.parent),
  show: showSibling,
  sendResults,
  versions: (node) => versions(current, node),
};

// Showing.

function render() {
  const nodes = path(current);
  let same = 0;
  while (same < nodes.length && views[same]?.node === nodes[same]) same++;
  views.splice(same).forEach((view) => view.root.remove());
  for (const node of nodes.slice(same)) {
    const view = messageView(node, actions);
    views.push(view);
    thread.append(view.root);
  }
  refreshMessages();
  byId("welcome").hidden = nodes.length > 0;
  document.title = current.title ? `${current.title} · nanovllm` : "nanovllm";
  refreshComposer();
  renderSidebar();
}

function renderIfShown(conversation) {
  if (conversation === current) render();
  else renderSidebar();
}

function renderSidebar() {
  sidebar.render([...conversations.values()], current.id, (conversation) => running.has(conversation.id));
}

function refreshMessages() {
  const isBusy = running.has(current.id);
  views.forEach((view, i) => view.refresh(isBusy, i === views.length - 1));
  followEnd();
}

/** Show what the stream brought, once a frame. */
function refreshSoon(conversation) {
  if (conversation !== current || isFramePending) return;
  isFramePending = true;
  requestAnimationFrame(() => {
    isFramePending = false;
    views.at(-1)?.refresh(running.has(current.id), true);
    followEnd();
  });
}

function refreshComposer() {
  const isBusy = running.has(current.id);
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  send.disabled = !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function followEnd() {
  if (isFollowing) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  isFollowing = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  byId("to-end").hidden = isFollowing;
});

byId("to-end").onclick = () => {
  scroller.scrollTo({ top: scroller.scrollHeight, behavior: "smooth" });
  input.focus();
};

const announce = (text) => (byId("status").textContent = text);

function focusInput() {
  if (!prefersTouch.matches) input.focus();
}

// Asking and answering.

function ask(text, parent) {
  if (running.has(current.id)) return;
  const question = addNode(current, parent, { role: "user", text });
  current.title ||= titleOf(text);
  if (!conversations.has(current.id)) {
    conversations.set(current.id, current);
    history.pushState(null, "", `#${current.id}`);
  }
  generate(current, question);
}

function sendResults(answer, results) {
  let parent = answer;
  answer.calls.forEach((call, i) => {
    parent = addNode(current, parent.id, { role: "tool", callId: call.id, name: call.name, text: results[i] });
  });
  generate(current, parent);
}

/** Answer `parent`. Earlier answers stay as versions. */
async function generate(conversation, parent) {
  if (running.has(conversation.id)) return;
  const answer = addNode(conversation, parent.id, newAnswer(settings.model));
  const controller = new AbortController();
  running.set(conversation.id, controller);
  conversation.updated = Date.now();
  isFollowing = true;
  render();
  announce("The model is answering");
  // The button that was pressed may be gone.
  if (document.activeElement === document.body) focusInput();
  await save(conversation);
  await receive(conversation, parent, answer, controller);
  running.delete(conversation.id);
  showNewest(conversation);
  await save(conversation);
  renderIfShown(conversation);
}

async function receive(conversation, parent, answer, controller) {
  const clock = { start: performance.now() };
  let saved = clock.start;
  try {
    // The server may have started after the page.
    if (!settings.model || !byId("banner").hidden) await loadModels();
    const body = { ...requestFields(settings), messages: apiMessages(conversation, parent, settings.system) };
    for await (const chunk of streamChat(body, settings.apiKey, controller.signal)) {
      const now = performance.now();
      addChunk(answer, chunk, clock, now);
      refreshSoon(conversation);
      if (now - saved > SAVE_INTERVAL_MS) {
        saved = now;
        save(conversation);
      }
    }
    answer.state = "done";
    announce("The answer is complete");
  } catch (error) {
    answer.state = controller.signal.aborted ? "stopped" : "failed";
    if (controller.signal.aborted) announce("Stopped");
    else fail(answer, error);
  }
}

function fail(answer, error) {
  if (!(error instanceof ApiProblem)) console.error(error);
  answer.error = error instanceof ApiProblem ? error.message : `The page cannot read the answer: ${error.message}`;
  if (error.isAboutKey) showBanner(error);
  announce(answer.error);
}

function showSibling(node, direction) {
  showVersion(current, node);
  isFollowing = false;
  render();
  const view = views.find((shown) => shown.node === node);
  const [previous, next] = view.root.querySelectorAll(".versions button");
  const [pressed, other] = direction === "previous" ? [previous, next] : [next, previous];
  (pressed.disabled ? other : pressed).focus();
  save(current);
}

// Conversations.

/** Merge a conversation into the storage. `fields`, which this tab changed, win over stored ones. */
async function save(conversation, fields) {
  if (!conversations.has(conversation.id)) return;
  try {
    await store.save(conversation, fields);
  } catch (error) {
    console.error(error);
    showToast("The browser could not keep this conversation.");
  }
}

/** Take over what another tab stored or deleted. */
async function refreshStored(id) {
  const stored = await store.get(id);
  const known = conversations.get(id);
  if (stored) {
    if (known) merge(known, stored);
    else conversations.set(id, stored);
    if (!running.has(id)) showNewest(known ?? stored);
    renderIfShown(known ?? stored);
  } else if (known) {
    forget(known);
  }
}

/** Show the conversation that the address names, or a new one. */
function openFromAddress() {
  const named = conversations.get(location.hash.slice(1));
  if (named === current) return;
  current = named ?? newConversation();
  views.forEach((view) => view.root.remove());
  views = [];
  isFollowing = true;
  render();
  sidebar.yield();
  focusInput();
}

function startNew() {
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  openFromAddress();
  sidebar.yield();
  focusInput();
}

async function rename(conversation, title) {
  const isChanged = title !== conversation.title;
  conversation.title = title;
  render();
  if (!isChanged) return;
  await save(conversation, { title });
  render();
}

/** Take a conversation off the page. */
function forget(conversation) {
  running.get(conversation.id)?.abort();
  conversations.delete(conversation.id);
  if (conversation === current) startNew();
  else renderSidebar();
}

function remove(conversation) {
  forget(conversation);
  store.delete(conversation.id).catch(() => {});
  showToast(`Deleted “${conversation.title}”.`, () => {
    conversations.set(conversation.id, conversation);
    save(conversation);
    location.hash = conversation.id;
    renderSidebar();
  });
}

let toastTimer = 0;

function showToast(text, undo) {
  const [words, button] = byId("toast").children;
  words.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    byId("toast").hidden = true;
    undo();
  };
  byId("toast").hidden = false;
  announce(text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (byId("toast").hidden = true), UNDO_MS);
}

async function loadConversations() {
  try {
    for (const conversation of await store.all()) {
      conversations.set(conversation.id, conversation);
      showNewest(conversation);
    }
  } catch {
    showToast("This browser does not let the page keep conversations.");
  }
}

// Models and settings.

async function loadModels() {
  const select = byId("model");
  try {
    const names = await listModels(settings.apiKey);
    select.replaceChildren(...names.map((name) => element("option", { value: name, title: name }, name)));
    if (!names.includes(settings.model)) settings.model = names[0] ?? "";
    select.value = settings.model;
    byId("banner").hidden = true;
  } catch (error) {
    showBanner(error);
  }
}

function showBanner(error) {
  const [words, button] = byId("banner").children;
  words.textContent = error instanceof ApiProblem ? error.message : "The server's list of models cannot be read.";
  button.textContent = error.isAboutKey ? "Enter the key" : "Try again";
  button.onclick = () => (error.isAboutKey ? openSettings("api-key") : loadModels());
  byId("banner").hidden = false;
}

function settingChanged(name) {
  if (name === "theme") applyTheme(settings.theme);
}

byId("model").onchange = ({ target }) => {
  settings.model = target.value;
  saveSetting("model", settings.model);
};

byId("toggle-theme").onclick = () => {
  settings.theme = isDark() ? "light" : "dark";
  saveSetting("theme", settings.theme);
  applyTheme(settings.theme);
};

byId("open-settings").onclick = () => openSettings();

let keyOfModels = settings.apiKey;
byId("settings").addEventListener("close", () => {
  if (settings.apiKey !== keyOfModels || !byId("banner").hidden) loadModels();
  keyOfModels = settings.apiKey;
});

byId("delete-all").onclick = () => {
  if (!confirm("Delete all conversations from this browser? This cannot be undone.")) return;
  for (const controller of running.values()) controller.abort();
  for (const id of conversations.keys()) store.delete(id).catch(() => {});
  conversations.clear();
  byId("settings").close();
  startNew();
  renderSidebar();
};

// Typing and keys.

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running.has(current.id)) return;
  input.value = "";
  ask(text, current.leaf);
  focusInput();
});

input.addEventListener("input", refreshComposer);

input.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey && !prefersTouch.matches) {
    event.preventDefault();
    byId("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !input.value && !running.has(current.id)) {
    const last = views.findLast((view) => view.node.role === "user");
    if (last) {
      event.preventDefault();
      last.edit();
    }
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("settings").open) return;
  if (sidebar.coversPage) sidebar.toggle(false, byId("open-sidebar"));
  else running.get(current.id)?.abort();
});

stop.onclick = () => {
  running.get(current.id)?.abort();
  input.focus();
};

document.querySelector(".skip").onclick = (event) => {
  event.preventDefault();
  input.focus();
};

byId("new-chat").onclick = startNew;
window.addEventListener("popstate", openFromAddress);

byId("suggestions").append(
  ...SUGGESTIONS.map((text) =>
    element("li", {}, element("button", { type: "button", onclick: () => ask(text, current.leaf) }, text))),
);

// Start.

bindSettings(settings, settingChanged);
applyTheme(settings.theme);
loadModels();
await loadConversations();
openFromAddress();
render();
focusInput();
document.body.dataset.ready = "yes";
