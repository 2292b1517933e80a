// The settings dialog. Valid values are kept as they are typed, invalid ones are gone when the dialog closes.

import { keyProblem } from "./api.js";
import { loadSettings, saveSetting } from "./store.js";

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const PROBLEMS = { tools: toolsProblem, apiKey: keyProblem };

/** Fill the dialog with `settings` and keep both equal. `changed` is called after a change, with the field's name. */
export function bindSettings(settings, changed) {
  const fields = [...form.elements].filter((field) => field.name);
  const show = (field) => {
    field.value = settings[field.name];
    field.setCustomValidity(PROBLEMS[field.name]?.(field.value) ?? "");
  };
  fields.forEach(show);
  dialog.addEventListener("close", () => fields.forEach(show));
  form.addEventListener("input", ({ target }) => {
    const value = target.value.trim();
    target.setCustomValidity(PROBLEMS[target.name]?.(value) ?? "");
    if (!target.name || !target.checkValidity()) return;
    settings[target.name] = value;
    saveSetting(target.name, value);
    changed(target.name);
  });
  // Another tab changed settings. The model is not among the fields: each tab keeps its own.
  window.addEventListener("storage", () => {
    const stored = loadSettings();
    for (const field of fields.filter(({ name }) => stored[name] !== settings[name])) {
      settings[field.name] = stored[field.name];
      show(field);
      changed(field.name);
    }
  });
  document.getElementById("close-settings").onclick = () => dialog.close();
  // A field that is folded away cannot show what is wrong with it.
  form.addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
}

export function openSettings(fieldId) {
  dialog.showModal();
  if (fieldId) document.getElementById(fieldId).focus();
}

function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "This must be a JSON list of tools.";
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}

export function applyTheme(theme) {
  document.documentElement.dataset.theme = theme || "system";
  document.getElementById("theme").value = theme;
}

export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
}

/** Return the fields of a request that the settings give. An empty setting leaves the choice to the server. */
export function requestFields(settings) {
  const fields = { model: settings.model };
  if (settings.temperature !== "") fields.temperature = Number(settings.temperature);
  if (settings.topP !== "") fields.top_p = Number(settings.topP);
  if (settings.maxTokens !== "") fields.max_tokens = Number(settings.maxTokens);
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.tools) fields.tools = JSON.parse(settings.tools);
  return fields;
}
