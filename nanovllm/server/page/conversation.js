// A conversation is a tree of messages: an edited question or a new answer is a sibling of the old one, so nothing is lost.

export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `c${now}${Math.random()}`.replace(".", ""), title: "", updated: now, nodes: [], leaf: -1 };
}

/** Add a message below `parent` (an index, -1 for the start), and show it. */
export function addNode(conversation, parent, message) {
  const node = { ...message, index: conversation.nodes.length, parent };
  conversation.nodes.push(node);
  conversation.leaf = node.index;
  return node;
}

/** Return the messages that are shown, from the first to the last. */
export function path(conversation) {
  const shown = [];
  for (let index = conversation.leaf; index >= 0; index = conversation.nodes[index].parent) {
    shown.unshift(conversation.nodes[index]);
  }
  return shown;
}

/** Return the versions of a message, itself among them. */
export function versions(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent && other.role === node.role);
}

/** Show a version of a message, and the newest messages below it. */
export function showVersion(conversation, node) {
  let leaf = node;
  for (;;) {
    const below = conversation.nodes.findLast((other) => other.parent === leaf.index);
    if (!below) break;
    leaf = below;
  }
  conversation.leaf = leaf.index;
}

/** Return the messages down to `node` in the form of the API. */
export function apiMessages(conversation, node, system) {
  const messages = path({ ...conversation, leaf: node.index }).flatMap(apiMessage);
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
