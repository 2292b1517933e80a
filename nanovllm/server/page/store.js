// What the browser keeps: conversations in IndexedDB, settings in localStorage.

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

/** The conversations that this browser keeps. */
export class ConversationStore {
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
    return settle((await this.#objects("readonly")).getAll());
  }

  async put(conversation) {
    return settle((await this.#objects("readwrite")).put(conversation));
  }

  async delete(id) {
    return settle((await this.#objects("readwrite")).delete(id));
  }
}
