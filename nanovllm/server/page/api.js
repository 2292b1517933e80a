// The public API of the server: the list of models, and chat completions as a stream.

// Relative addresses, so that the page also works behind a proxy that adds a prefix.
const MODELS = "v1/models";
const CHAT = "v1/chat/completions";

/** A failed request, with a message in words for the person who chats. */
export class ApiProblem extends Error {
  constructor(message, isAboutKey = false) {
    super(message);
    this.isAboutKey = isAboutKey;
  }
}

export async function listModels(key) {
  const response = await request(MODELS, { headers: headers(key) });
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/** Send a chat completion. Yield its chunks; throw ApiProblem if it fails, AbortError if `signal` stops it. */
export async function* streamChat(body, key, signal) {
  const response = await request(CHAT, {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiProblem(`The server stopped the answer: ${chunk.error.message ?? "unknown error"}`);
    yield chunk;
  }
  throw new ApiProblem("The connection was lost before the answer was complete.");
}

/** Return what is wrong with an API key, or "". Headers carry printable ASCII and Latin-1 only. */
export function keyProblem(key) {
  const [bad] = /[^\x20-\x7e\xa0-\xff]/u.exec(key) ?? [];
  if (!bad) return "";
  const code = bad.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return `The API key has a character that cannot be sent (U+${code}). Copy or type the key again.`;
}

function headers(key) {
  if (keyProblem(key)) throw new ApiProblem(keyProblem(key), true);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  // Here a TypeError means that the request is wrong. From `fetch` it means that no response came.
  const prepared = new Request(path, { ...options, credentials: "omit", cache: "no-store" });
  let response;
  try {
    response = await fetch(prepared);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiProblem("The server cannot be reached. Check that it runs and that you are online, then try again.");
  }
  if (!response.ok) throw await problemOf(response, prepared.headers.has("authorization"));
  return response;
}

/** Return what a failed response means for a person. */
async function problemOf(response, hasKey) {
  if (response.status !== 401 && response.status !== 403) return new ApiProblem(await words(response));
  return new ApiProblem(hasKey ? "The server does not accept this API key." : "The server wants an API key.", true);
}

async function words(response) {
  const { status } = response;
  const detail = await messageOf(response);
  if (status === 413) return "The conversation is too long for the server. Start a new chat or edit an earlier message.";
  if (status === 429) return `The server is busy: too many requests are waiting. ${retryWords(response)}`;
  if (status === 503) return `The server cannot answer now${detail ? `: ${detail}` : "."} ${retryWords(response)}`;
  if (status >= 500) return `The server failed (status ${status})${detail ? `: ${detail}` : "."}`;
  return `The server refused the request${detail ? `: ${detail}` : ` (status ${status}).`}`;
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    return String(error.message ?? "").slice(0, 600);
  } catch {
    return "";
  }
}

function retryWords(response) {
  const seconds = Number(response.headers.get("retry-after"));
  if (!(seconds > 0)) return "Try again in a moment.";
  return seconds === 1 ? "Try again in a second." : `Try again in ${seconds} seconds.`;
}

/** Yield the data of server-sent events. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiProblem) throw error;
    throw new ApiProblem("The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
