// What one message looks like.

import { isRunning } from "./conversation.js";
import { element, MarkdownView } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  const button = element("button", { type: "button", className: "icon small", title: label, onclick }, icon(name));
  button.setAttribute("aria-label", label);
  return button;
}

/** Copy text, and let the button show that it worked. Pages on plain http have no clipboard API. */
export async function copyText(text, button) {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { value: text, className: "unseen" });
    button.after(area);
    area.select();
    isCopied = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  document.getElementById("status").textContent = isCopied ? "Copied" : "The browser does not allow copying";
  const old = [...button.childNodes];
  if (button.dataset.copied || !isCopied) return;
  button.dataset.copied = "yes";
  button.replaceChildren(button.classList.contains("icon") ? icon("check") : "Copied");
  setTimeout(() => {
    button.replaceChildren(...old);
    delete button.dataset.copied;
  }, 1600);
}

const clone = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

/** Return a view of `node`. `actions` are the page's: again, edit, show, sendResults, versions. */
export function messageView(node, actions) {
  return new { user: UserView, tool: ToolView, assistant: AssistantView }[node.role](node, actions);
}

class View {
  constructor(node, actions, template) {
    this.node = node;
    this.actions = actions;
    this.root = clone(template);
    this.root.addEventListener("click", (event) => this.click(event.target.closest("button")));
  }

  click(button) {
    const action = button?.dataset.action;
    if (action === "copy") copyText(this.node.text, button);
    else if (button?.className === "copy-code") copyText(button.closest(".code").querySelector("code").textContent, button);
    else if (action) this[action]();
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  /** Show `‹ 2 / 3 ›` if the message has several versions. */
  refreshVersions() {
    const all = this.actions.versions(this.node);
    const at = all.indexOf(this.node);
    const key = `${at}/${all.length}`;
    const slot = this.part(".versions");
    if (slot.dataset.key === key) return;
    slot.dataset.key = key;
    slot.replaceChildren();
    if (all.length < 2) return;
    const button = (name, label, to) => {
      const made = iconButton(name, label, () => this.actions.show(all[to], name));
      made.disabled = !all[to];
      return made;
    };
    slot.append(
      button("previous", "Previous version", at - 1),
      element("span", {}, `${at + 1} / ${all.length}`),
      button("next", "Next version", at + 1),
    );
  }
}

class UserView extends View {
  constructor(node, actions) {
    super(node, actions, "user-template");
    this.part(".bubble").textContent = node.text;
    this.editor = this.part(".editor");
    this.editor.addEventListener("submit", (event) => this.submit(event));
    this.editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.cancel();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.submit(event);
      else return;
      event.stopPropagation();
    });
  }

  edit() {
    const area = this.part("textarea");
    area.value = this.node.text;
    this.toggle(true);
    area.rows = Math.min(12, Math.max(2, this.node.text.split("\n").length));
    area.focus();
  }

  cancel() {
    this.toggle(false);
    this.part("[data-action=edit]").focus();
  }

  submit(event) {
    event.preventDefault();
    const text = this.part("textarea").value.trim();
    if (!text) return;
    this.toggle(false);
    this.actions.edit(this.node, text);
  }

  toggle(isEditing) {
    this.editor.hidden = !isEditing;
    this.part(".bubble").hidden = isEditing;
    this.part(".actions").hidden = isEditing;
  }

  refresh(isBusy) {
    this.part("[data-action=edit]").disabled = isBusy;
    this.refreshVersions();
  }
}

class ToolView extends View {
  constructor(node, actions) {
    super(node, actions, "tool-template");
    this.part("summary span").textContent = `Result of ${node.name}`;
    this.part("pre").textContent = node.text;
  }

  refresh() {}
}

class AssistantView extends View {
  constructor(node, actions) {
    super(node, actions, "assistant-template");
    this.markdown = new MarkdownView(this.part(".answer"));
    this.thinking = new MarkdownView(this.part(".thinking .markdown"));
    this.calls = [];
    this.part(".thinking").addEventListener("toggle", () => this.refreshThinking());
  }

  again() {
    this.actions.again(this.node);
  }

  refresh(isBusy, isLast) {
    const { node } = this;
    const isGrowing = isRunning(node);
    this.root.classList.toggle("running", isGrowing);
    this.root.setAttribute("aria-busy", isGrowing);
    this.part(".waiting").hidden = !isGrowing || Boolean(node.text || node.thinking || node.calls.length);
    this.refreshThinking();
    this.markdown.update(node.text);
    this.refreshCalls(isGrowing, isLast && !isBusy);
    this.part(".problem").hidden = !node.error;
    this.part(".problem span").textContent = node.error;
    this.part(".problem button").hidden = isBusy;
    this.part(".actions").hidden = isGrowing;
    this.part(".actions [data-action=copy]").hidden = !node.text;
    this.part(".actions [data-action=again]").hidden = Boolean(node.error);
    this.part(".actions [data-action=again]").disabled = isBusy;
    this.part(".stats").textContent = statsWords(node);
    this.part(".stats").title = node.model;
    this.refreshVersions();
  }

  refreshThinking() {
    const { node } = this;
    const details = this.part(".thinking");
    details.hidden = !node.thinking;
    const isThinking = isRunning(node) && !node.text && !node.calls.length;
    details.classList.toggle("active", isThinking);
    this.part(".thinking summary span").textContent = thinkingWords(node, isThinking);
    if (details.open) this.thinking.update(node.thinking);
  }

  refreshCalls(isGrowing, mayReply) {
    this.node.calls.forEach((call, i) => {
      this.calls[i] ??= this.addCall(i);
      const root = this.calls[i];
      root.querySelector("summary span").textContent = `${isGrowing ? "Calls" : "Called"} ${call.name}`;
      root.querySelector("pre").textContent = isGrowing ? call.arguments : prettyJson(call.arguments);
      root.querySelector(".field").hidden = !mayReply;
    });
    this.refreshReply(mayReply && this.calls.length > 0);
  }

  addCall(i) {
    const root = clone("call-template");
    const area = root.querySelector("textarea");
    area.id = `result-${this.node.id}-${i}`;
    const label = root.querySelector("label");
    label.htmlFor = area.id;
    label.textContent = `Result of ${this.node.calls[i].name}`;
    this.part(".calls").append(root);
    return root;
  }

  refreshReply(isShown) {
    if (!isShown) {
      this.reply?.remove();
      this.reply = null;
    } else if (!this.reply) {
      const send = () => this.actions.sendResults(this.node, this.calls.map((root) => root.querySelector("textarea").value));
      this.reply = element("button", { type: "button", className: "primary", onclick: send }, "Send results");
      this.part(".calls").append(this.reply);
    }
  }
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function thinkingWords(node, isThinking) {
  if (isThinking) return "Thinking";
  return node.thinkingSeconds < 0.05 ? "Thought" : `Thought for ${seconds(node.thinkingSeconds)}`;
}

const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`);

function statsWords(node) {
  const words = [];
  if (node.state === "stopped") words.push("Stopped");
  if (node.state === "running" && !isRunning(node)) words.push("Incomplete");
  if (node.finish === "length") words.push("Cut at the token limit");
  if (node.state === "done" && !node.text && !node.calls.length) words.push("Empty answer");
  if (node.stats) {
    words.push(`${node.stats.tokens} ${node.stats.tokens === 1 ? "token" : "tokens"}`);
    if (node.stats.perSecond) words.push(`${node.stats.perSecond.toFixed(1)} tokens/s`);
    if (node.stats.firstSeconds !== null) words.push(`first token after ${node.stats.firstSeconds.toFixed(2)} s`);
  }
  return words.join(" · ");
}
