// Colors for code: comments, strings, numbers and keywords. It knows no grammar, so it is short and never wrong by much.

const KEYWORDS = new Set(
  ("and as assert async await bool boolean break case catch char class const constexpr continue def default defer del do " +
    "double elif else enum except export extends false False final finally float fn for from func function global go if impl " +
    "implements import in include int interface is lambda let long loop match mod mut namespace new nil None nonlocal not null " +
    "or override package pass private protected pub public raise return self Self short signed sizeof static struct super " +
    "switch template this throw trait true True try type typedef typeof undefined union unsafe unsigned use using var virtual " +
    "void volatile where while with yield " +
    "echo fi then done esac local readonly " +
    "select insert update delete create table join left right inner outer on group order by having limit values into set"
  ).split(" "));

const HASH = new Set("python py bash sh shell zsh yaml yml toml ruby rb perl r dockerfile make makefile ini elixir".split(" "));
const DASH = new Set("sql lua haskell hs".split(" "));
const MARKUP = new Set("html xml svg vue".split(" "));
const PLAIN = new Set(["", "text", "txt", "plain", "plaintext", "markdown", "md", "output", "diff", "csv"]);
const MAX_LENGTH = 100_000;

const STRING = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n]){0,400}'|${"`"}(?:\\.|[^${"`"}\\])*${"`"}?`;
// \w and \b are ASCII only, but names may have letters of all alphabets.
const IN_NAME = String.raw`[\p{L}\p{M}\p{N}_$]`;
const NUMBER = String.raw`(?<!${IN_NAME})(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)(?!${IN_NAME})`;
const WORD = String.raw`[\p{L}_$]${IN_NAME}*`;

const C_COMMENT = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
const PATTERNS = {
  hash: tokens(String.raw`(?<!${IN_NAME})#[^\n]*`),
  dash: tokens(String.raw`--[^\n]*`),
  markup: tokens(String.raw`<!--[^]*?(?:-->|$)`),
  c: tokens(C_COMMENT),
};

function tokens(comment) {
  return new RegExp(`(?<comment>${comment})|(?<string>${STRING})|(?<number>${NUMBER})|(?<word>${WORD})`, "gu");
}

function patternOf(language) {
  if (HASH.has(language)) return PATTERNS.hash;
  if (DASH.has(language)) return PATTERNS.dash;
  return MARKUP.has(language) ? PATTERNS.markup : PATTERNS.c;
}

/** Return `code` as strings and colored spans. */
export function highlight(code, language) {
  const name = language.toLowerCase();
  if (PLAIN.has(name) || code.length > MAX_LENGTH) return [code];
  const pieces = [];
  let end = 0;
  for (const match of code.matchAll(patternOf(name))) {
    const kind = kindOf(match, code, name);
    if (!kind) continue;
    pieces.push(code.slice(end, match.index), span(kind, match[0]));
    end = match.index + match[0].length;
  }
  return [...pieces, code.slice(end)];
}

function kindOf({ 0: text, index, groups }, code, language) {
  if (groups.word === undefined) return groups.comment !== undefined ? "comment" : groups.string !== undefined ? "string" : "number";
  if (KEYWORDS.has(text) || (language === "sql" && KEYWORDS.has(text.toLowerCase()))) return "keyword";
  return code[index + text.length] === "(" ? "call" : null;
}

function span(kind, text) {
  const node = document.createElement("span");
  node.className = `code-${kind}`;
  node.textContent = text;
  return node;
}
