// The list of conversations, and whether it is shown.

import { iconButton } from "./message.js";
import { element } from "./markdown.js";

const DAY = 86_400_000;

export class Sidebar {
  /** `actions` are the page's: rename(conversation, title), remove(conversation). */
  constructor(actions) {
    this.actions = actions;
    this.root = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.opener = document.getElementById("open-sidebar");
    this.backdrop = document.getElementById("backdrop");
    this.wide = matchMedia("(min-width: 800px)");
    this.opener.onclick = () => this.toggle(true, document.getElementById("close-sidebar"));
    document.getElementById("close-sidebar").onclick = () => this.toggle(false, this.opener);
    this.backdrop.onclick = () => this.toggle(false, this.opener);
    this.wide.onchange = () => this.toggle(this.wide.matches);
    this.toggle(this.wide.matches);
  }

  get coversPage() {
    return this.isOpen && !this.wide.matches;
  }

  /** Show or hide the list. On a narrow screen it covers the page, which cannot be reached meanwhile. */
  toggle(isOpen, focus) {
    this.isOpen = isOpen;
    document.body.classList.toggle("sidebar-open", isOpen);
    this.root.inert = !isOpen;
    this.backdrop.hidden = !this.coversPage;
    document.getElementById("page").inert = this.coversPage;
    this.opener.setAttribute("aria-expanded", isOpen);
    focus?.focus();
  }

  /** Give the page back after a choice on a narrow screen. */
  yield() {
    if (this.coversPage) this.toggle(false);
  }

  render(conversations, currentId, isRunning) {
    // What is pressed or has the focus stays in place as long as nothing changes. The end of renaming renders.
    const state = JSON.stringify([currentId, conversations.map((one) => [one.id, one.title, one.updated, isRunning(one)])]);
    if (this.isRenaming || state === this.state) return;
    this.state = state;
    const groups = new Map();
    for (const conversation of conversations.toSorted((a, b) => b.updated - a.updated)) {
      const name = groupOf(conversation.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(conversation);
    }
    const sections = [...groups].flatMap(([name, members]) => [
      element("h2", {}, name),
      element("ul", {}, ...members.map((member) => this.#item(member, currentId, isRunning(member)))),
    ]);
    const hadFocus = this.list.contains(document.activeElement) && document.activeElement.dataset.id;
    this.list.replaceChildren(...sections);
    if (hadFocus) this.list.querySelector(`a[data-id="${CSS.escape(hadFocus)}"]`)?.focus();
  }

  #item(conversation, currentId, isRunning) {
    const title = conversation.title || "New chat";
    const anchor = element("a", { href: `#${conversation.id}`, title, className: isRunning ? "running" : "" }, title);
    anchor.dataset.id = conversation.id;
    if (conversation.id === currentId) anchor.setAttribute("aria-current", "page");
    const item = element("li", {}, anchor);
    item.append(
      iconButton("edit", `Rename ${title}`, () => this.#rename(item, conversation)),
      iconButton("delete", `Delete ${title}`, () => this.#remove(conversation)),
    );
    return item;
  }

  #rename(item, conversation) {
    const input = element("input", { value: conversation.title, maxLength: 120 });
    input.setAttribute("aria-label", "Title of the conversation");
    let isDone = false;
    const finish = (isKept) => {
      if (isDone) return;
      isDone = true;
      this.isRenaming = false;
      this.actions.rename(conversation, (isKept && input.value.trim()) || conversation.title);
      this.list.querySelector(`a[data-id="${CSS.escape(conversation.id)}"]`)?.focus();
    };
    input.onkeydown = (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.stopPropagation();
      finish(event.key === "Enter");
    };
    input.onblur = () => finish(true);
    this.isRenaming = true;
    this.state = "";
    item.replaceChildren(input);
    input.select();
  }

  #remove(conversation) {
    this.actions.remove(conversation);
    document.getElementById("new-chat").focus();
  }
}

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 7 * DAY ? "Last 7 days" : "Older";
}
