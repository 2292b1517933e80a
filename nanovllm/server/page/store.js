// What the browser keeps: conversations in IndexedDB, settings in localStorage.

import { merge } from "./conversation.js";

const SETTINGS_KEY = "nanovllm.settings";

export const DEFAULTS = {
  model: "",
  system: "",
  temperature: "",
  topP: "",
  maxTokens: "",
  thinking: "",
  tools: "",
  apiKey: "",
  theme: "",
};

export function loadSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS_KEY)) };
  } catch {
    return { ...DEFAULTS };
  }
}

/** Keep one setting. Other tabs may have changed the others. */
export function saveSetting(name, value) {
  try {
    localStorage.setItem(SETTINGS_KEY, JSON.stringify({ ...loadSettings(), [name]: value }));
  } catch {
    // Without storage the settings last until the page is closed.
  }
}

function settle(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Return a conversation as it is now written. Older pages numbered the messages. */
function upgrade(conversation) {
  for (const node of conversation?.nodes ?? []) node.id ??= node.index;
  return conversation;
}

/** The conversations that this browser keeps. */
export class ConversationStore {
  #channel = new BroadcastChannel("nanovllm.conversations");

  /** `changed` is called with the id of a conversation after another tab stored or deleted it. */
  constructor(changed) {
    this.#channel.onmessage = ({ data }) => changed(data);
  }

  async #objects(mode) {
    this.opening ??= this.#open();
    const database = await this.opening;
    return database.transaction("conversations", mode).objectStore("conversations");
  }

  #open() {
    const request = indexedDB.open("nanovllm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    return settle(request);
  }

  async all() {
    return (await settle((await this.#objects("readonly")).getAll())).map(upgrade);
  }

  /** Return a conversation, or undefined. */
  async get(id) {
    return upgrade(await settle((await this.#objects("readonly")).get(id)));
  }

  /** Merge what other tabs stored into `conversation`, set `fields` and store it, all in one transaction. */
  async save(conversation, fields = {}) {
    const objects = await this.#objects("readwrite");
    const stored = upgrade(await settle(objects.get(conversation.id)));
    if (stored) merge(conversation, stored);
    await settle(objects.put(Object.assign(conversation, fields)));
    this.#channel.postMessage(conversation.id);
  }

  async delete(id) {
    await settle((await this.#objects("readwrite")).delete(id));
    this.#channel.postMessage(id);
  }
}
