// A conversation is a tree of messages: an edited question or a new answer is a sibling of the old one, so nothing is lost.
// Messages are only added, and only the tab that added one changes it. So what several tabs did can always be merged.

const added = new WeakSet(); // the messages that this tab added

// Pages on plain http have no randomUUID.
const newId = () => crypto.randomUUID?.() ?? `c${Date.now()}${Math.random()}`.replace(".", "");

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), nodes: [], leaf: -1 };
}

/** Add a message below `parent` (an id, -1 for the start), and show it. */
export function addNode(conversation, parent, message) {
  const node = { ...message, id: newId(), parent };
  added.add(node);
  conversation.nodes.push(node);
  conversation.leaf = node.id;
  return node;
}

export function nodeOf(conversation, id) {
  return conversation.nodes.find((node) => node.id === id);
}

/** Return the messages from the first to the one with the id `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const nodes = new Map(conversation.nodes.map((node) => [node.id, node]));
  const shown = [];
  for (let node = nodes.get(leaf); node; node = nodes.get(node.parent)) shown.unshift(node);
  return shown;
}

/** Put the stored messages and title into this tab's copy of a conversation. Messages keep the order of the storage. */
export function merge(conversation, stored) {
  const nodes = stored.nodes.map((node) => {
    const old = nodeOf(conversation, node.id) ?? {};
    return added.has(old) ? old : Object.assign(old, node);
  });
  const unsaved = conversation.nodes.filter((node) => !nodeOf(stored, node.id));
  conversation.nodes = [...nodes, ...unsaved];
  conversation.title = stored.title;
  conversation.updated = Math.max(conversation.updated, stored.updated);
}

/** Return the versions of a message, itself among them. Of failures without a text only the one that is shown counts. */
export function versions(conversation, node) {
  return conversation.nodes.filter((other) =>
    other.parent === node.parent && other.role === node.role && (other === node || !isBareFailure(other)));
}

const isBareFailure = (node) => node.error && !node.text && !node.thinking && !node.calls.length;

/** Show a version of a message, and the newest messages below it. */
export function showVersion(conversation, node) {
  let leaf = node;
  for (;;) {
    const below = conversation.nodes.findLast((other) => other.parent === leaf.id);
    if (!below) break;
    leaf = below;
  }
  conversation.leaf = leaf.id;
}

/** Show the newest messages below those that are shown. */
export function showNewest(conversation) {
  showVersion(conversation, nodeOf(conversation, conversation.leaf));
}

/** Return the messages down to `node` in the form of the API. */
export function apiMessages(conversation, node, system) {
  const messages = [];
  for (const message of path(conversation, node.id).flatMap(apiMessage)) {
    const last = messages.at(-1);
    // Many chat templates refuse two questions in a row. The first one had no answer.
    if (message.role === "user" && last?.role === "user") last.content += `\n\n${message.content}`;
    else messages.push(message);
  }
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

function apiMessage(node) {
  if (node.role === "user") return [{ role: "user", content: node.text }];
  if (node.role === "tool") return [{ role: "tool", tool_call_id: node.callId, content: node.text }];
  if (!node.text && !node.calls.length) return [];
  const calls = node.calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return [{ role: "assistant", content: node.text, ...(calls.length ? { tool_calls: calls } : {}) }];
}

/** Return whether this tab receives the answer. If not, another tab does, or its tab was closed. */
export function isRunning(answer) {
  return answer.state === "running" && added.has(answer);
}

export function newAnswer(model) {
  return { role: "assistant", state: "running", model, text: "", thinking: "", thinkingSeconds: 0, calls: [], error: "", finish: "", stats: null };
}

/** Put a chunk of the stream into the answer. `clock` is {start, first, last, thought}, in milliseconds. */
export function addChunk(answer, chunk, clock, now) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const thinking = delta.reasoning_content ?? delta.reasoning ?? "";
  if (thinking || delta.content || delta.tool_calls) {
    clock.first ??= now;
    clock.last = now;
  }
  if (thinking) {
    answer.thinking += thinking;
    answer.thinkingSeconds = (now - clock.first) / 1000;
  }
  answer.text += delta.content ?? "";
  for (const piece of delta.tool_calls ?? []) addCall(answer.calls, piece);
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  if (chunk.usage) answer.stats = statsOf(chunk.usage, clock);
}

function addCall(calls, piece) {
  const call = (calls[piece.index ?? 0] ??= { id: "", name: "", arguments: "" });
  if (piece.id) call.id = piece.id;
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}

function statsOf(usage, clock) {
  const tokens = usage.completion_tokens;
  const seconds = (clock.last - clock.first) / 1000;
  return {
    tokens,
    promptTokens: usage.prompt_tokens,
    // A burst of a few chunks says nothing about the speed.
    perSecond: tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : null,
    firstSeconds: clock.first === undefined ? null : (clock.first - clock.start) / 1000,
  };
}

/** Return a title: the first words of the first question. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length <= 48 ? line : `${line.slice(0, 48).replace(/\s+\S*$/, "")}…`;
}
