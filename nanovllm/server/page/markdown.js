// Markdown as DOM nodes. The model's text only becomes text nodes and checked link addresses, never HTML.

import { highlight } from "./highlight.js";

// Bounds on nesting, so that hostile text cannot build a tree that is too deep for the browser.
const MAX_BLOCK_DEPTH = 6;
const MAX_OPEN_MARKS = 24;

/** Show a growing text. Only blocks that changed are rendered again, so a long answer streams smoothly. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = null;
    this.blocks = [];
  }

  update(text) {
    if (text === this.text) return;
    this.text = text;
    const blocks = readBlocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
    blocks.forEach((block, i) => {
      const old = this.blocks[i];
      if (old?.source === block.source) {
        block.node = old.node;
      } else if (old?.kind === "code" && block.kind === "code" && old.language === block.language) {
        block.node = old.node;
        fillCode(block.node.querySelector("code"), block);
      } else {
        block.node = renderBlock(block);
        if (old) old.node.replaceWith(block.node);
        else this.root.append(block.node);
      }
    });
    this.blocks.slice(blocks.length).forEach((block) => block.node.remove());
    this.blocks = blocks;
  }
}

// Blocks. A reader gets the lines and an index; it returns [block, index after the block], or null.

const READERS = [readFence, readMath, readHeading, readRule, readQuote, readTable, readList];

function readBlocks(lines, depth) {
  const blocks = [];
  let end = 0;
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const [block, next] = readSpecial(lines, i, depth) ?? readParagraph(lines, i, depth);
    block.source = lines.slice(i, next).join("\n");
    block.hasGap = blocks.length > 0 && i > end; // a blank line is between this block and the one before
    end = next;
    blocks.push(block);
    i = next;
  }
  return blocks;
}

function readSpecial(lines, i, depth) {
  if (depth > MAX_BLOCK_DEPTH) return null;
  for (const reader of READERS) {
    const found = reader(lines, i, depth);
    if (found) return found;
  }
  return null;
}

function readParagraph(lines, i, depth) {
  let next = i + 1;
  while (next < lines.length && lines[next].trim() && !interruptsParagraph(lines, next, depth)) next++;
  return [{ kind: "paragraph", text: lines.slice(i, next).map(trimLine).join("\n") }, next];
}

function interruptsParagraph(lines, i, depth) {
  return depth <= MAX_BLOCK_DEPTH && (startsSpecial(lines[i]) || isTable(lines, i));
}

function startsSpecial(line) {
  return /^ {0,3}(```|~~~|#{1,6}\s|>|\$\$|\\\[)/.test(line) || ITEM.test(line) || RULE.test(line);
}

// Two spaces at the end of a line are a line break, so they stay.
const trimLine = (line) => line.trimStart().replace(/(\S) ?$/, "$1");

const FENCE = /^( *)(`{3,}|~{3,})[ \t]*([^`]*)$/;

function readFence(lines, i) {
  const [, indent, marks, info] = FENCE.exec(lines[i]) ?? [];
  if (!marks) return null;
  let end = i + 1;
  while (end < lines.length && !closesFence(lines[end].trim(), marks)) end++;
  const code = lines.slice(i + 1, end).map((line) => line.slice(Math.min(indent.length, indentOf(line))));
  return [{ kind: "code", language: info.trim().split(/\s/)[0].slice(0, 30), text: code.join("\n") }, end + 1];
}

const closesFence = (line, marks) =>
  line.length >= marks.length && line.startsWith(marks) && line === marks[0].repeat(line.length);

const indentOf = (line) => line.length - line.trimStart().length;

function readMath(lines, i) {
  const open = /^ {0,3}(\$\$|\\\[)/.exec(lines[i])?.[1];
  if (!open) return null;
  const close = open === "$$" ? "$$" : "\\]";
  const first = lines[i].trim();
  if (first.length > open.length + 1 && first.endsWith(close)) return [{ kind: "math", text: first.slice(2, -2) }, i + 1];
  for (let end = i + 1; end < Math.min(lines.length, i + 60) && lines[end].trim(); end++) {
    if (!lines[end].trimEnd().endsWith(close)) continue;
    const text = lines.slice(i, end + 1).join("\n").trim();
    return [{ kind: "math", text: text.slice(2, -2).trim() }, end + 1];
  }
  return null;
}

function readHeading(lines, i) {
  const marks = /^ {0,3}(#{1,6})(?=\s|$)/.exec(lines[i]);
  if (!marks) return null;
  const text = lines[i].slice(marks[0].length).trim().replace(/(^|\s)#+$/, "");
  return [{ kind: "heading", level: marks[1].length, text }, i + 1];
}

const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;

function readRule(lines, i) {
  return RULE.test(lines[i]) ? [{ kind: "rule" }, i + 1] : null;
}

function readQuote(lines, i, depth) {
  let next = i;
  while (next < lines.length && /^ {0,3}>/.test(lines[next])) next++;
  if (next === i) return null;
  const inner = lines.slice(i, next).map((line) => line.replace(/^ {0,3}> ?/, ""));
  return [{ kind: "quote", blocks: readBlocks(inner, depth + 1) }, next];
}

function isTable(lines, i) {
  const line = lines[i + 1];
  if (!lines[i].includes("|") || !line?.includes("-") || !line.includes("|")) return false;
  const rule = splitCells(line);
  return rule.every((cell) => /^:?-+:?$/.test(cell)) && rule.length === splitCells(lines[i]).length;
}

function readTable(lines, i) {
  if (!isTable(lines, i)) return null;
  const align = splitCells(lines[i + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "left";
  });
  let next = i + 2;
  while (next < lines.length && lines[next].includes("|")) next++;
  const rows = lines.slice(i + 2, next).map((line) => splitCells(line).slice(0, align.length));
  return [{ kind: "table", align, head: splitCells(lines[i]), rows }, next];
}

function splitCells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/([^\\])\|$/, "$1");
  const cells = [""];
  for (let i = 0; i < inner.length; i++) {
    if (inner[i] === "\\" && inner[i + 1] === "|") cells[cells.length - 1] += inner[++i];
    else if (inner[i] === "|") cells.push("");
    else cells[cells.length - 1] += inner[i];
  }
  return cells.map((cell) => cell.trim());
}

const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;

function readList(lines, i, depth) {
  const first = ITEM.exec(lines[i]);
  if (!first) return null;
  const isOrdered = /\d/.test(first[2]);
  const list = { kind: "list", isOrdered, start: parseInt(first[2], 10), isLoose: false, items: [] };
  let next = i;
  let end = i;
  while (next < lines.length) {
    const marker = ITEM.exec(lines[next]);
    if (!marker || /\d/.test(marker[2]) !== isOrdered || marker[1].length > first[1].length + 1) break;
    if (RULE.test(lines[next])) break;
    list.isLoose ||= next > end;
    [next, end] = readItem(lines, next, marker, list, depth);
  }
  return [list, end];
}

/**
 * Read an item into `list`. Return the index of the next line that is not blank, and the index after the item.
 * A blank line between two blocks of an item makes the whole list loose, and so does one between two items.
 */
function readItem(lines, i, marker, list, depth) {
  const base = marker[1].length;
  const offset = marker[3].length > 4 ? base + marker[2].length + 1 : marker[0].length;
  const inner = [lines[i].slice(Math.min(offset, lines[i].length))];
  let next = i + 1;
  let end = next;
  let fence = openFence(inner[0], null);
  for (; next < lines.length; next++) {
    const line = lines[next];
    const indent = indentOf(line);
    if (!line.trim()) {
      inner.push("");
      continue;
    }
    const isLazy = next === end && !startsSpecial(line);
    if (indent <= base && !(isLazy && !fence)) break;
    inner.push(line.slice(Math.min(indent, offset)));
    fence = openFence(inner.at(-1), fence);
    end = next + 1;
  }
  inner.length = end - i;
  const task = /^\[([ xX])\] /.exec(inner[0]);
  if (task) inner[0] = `${task[1] === " " ? "☐" : "☑"} ${inner[0].slice(4)}`;
  const blocks = readBlocks(inner, depth + 1);
  list.isLoose ||= blocks.some((block) => block.hasGap);
  list.items.push({ isTask: Boolean(task), blocks });
  return [next, end];
}

/** Return the marks of the fence that is open after `line`, or null. */
function openFence(line, open) {
  if (open) return closesFence(line.trim(), open) ? null : open;
  return FENCE.exec(line)?.[2] ?? null;
}

// Rendering of blocks.

/** Make an element. A child is a node, a text or an array of them, which may be long. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const child of children.flat()) node.append(child);
  return node;
}

const RENDERERS = {
  paragraph: (block) => element("p", {}, renderInline(block.text)),
  // The page's own headings are h1 and h2.
  heading: (block) => element(`h${Math.min(block.level + 2, 6)}`, {}, renderInline(block.text)),
  rule: () => element("hr"),
  quote: (block) => element("blockquote", {}, block.blocks.map(renderBlock)),
  math: (block) => element("p", { className: "math" }, block.text),
  code: renderCode,
  table: renderTable,
  list: renderList,
};

function renderBlock(block) {
  return RENDERERS[block.kind](block);
}

function renderCode(block) {
  const copy = element("button", { type: "button", className: "copy-code" }, "Copy");
  const code = element("code");
  fillCode(code, block);
  const scroller = element("pre", { tabIndex: 0 }, code);
  scroller.setAttribute("role", "group");
  scroller.setAttribute("aria-label", block.language ? `${block.language} code` : "Code");
  const bar = element("div", { className: "code-bar" }, element("span", {}, block.language || "text"), copy);
  return element("div", { className: "code", dir: "ltr" }, bar, scroller);
}

function fillCode(code, block) {
  code.replaceChildren();
  for (const piece of highlight(block.text, block.language)) code.append(piece);
}

function renderTable(block) {
  const row = (cells, tag) =>
    element("tr", {}, block.align.map((align, i) => {
      const cell = element(tag, { className: align }, renderInline(cells[i] ?? ""));
      if (tag === "th") cell.scope = "col";
      return cell;
    }));
  const head = element("thead", {}, row(block.head, "th"));
  const body = element("tbody", {}, block.rows.map((cells) => row(cells, "td")));
  const scroller = element("div", { className: "table", tabIndex: 0 }, element("table", {}, head, body));
  scroller.setAttribute("role", "group");
  scroller.setAttribute("aria-label", "Table");
  return scroller;
}

function renderList(block) {
  const list = element(block.isOrdered ? "ol" : "ul");
  if (block.isOrdered && block.start !== 1) list.start = block.start;
  for (const item of block.items) {
    const children = item.blocks.flatMap((inner) =>
      inner.kind === "paragraph" && !block.isLoose ? renderInline(inner.text) : [renderBlock(inner)]);
    list.append(element("li", { className: item.isTask ? "task" : "" }, children));
  }
  return list;
}

// Text within a block: code, links, emphasis. One pass; `items` holds text, nodes, and marks that are not closed yet.

const ESCAPED = /[!-/:-@[-`{-~]/;
const TARGET = /\(\s*<?([^\s<>()]{0,2000}(?:\([^\s()]{0,500}\)[^\s<>()]{0,500}){0,9})>?(?:\s+(?:"[^"\n]{0,300}"|'[^'\n]{0,300}'))?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`|\\^{}]{1,2000}/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BREAK = /<br *\/?>/iy;
// \w is ASCII only. \p{M} are marks that belong to a letter, such as the vowel signs of Hindi.
const UNDERSCORES_IN_WORD = /(?<=[\p{L}\p{M}\p{N}])_+(?=[\p{L}\p{M}\p{N}])/uy;
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const TAGS = { "*": "em", "**": "strong", _: "em", __: "strong", "~~": "del" };

export function renderInline(text) {
  return new InlineReader(text).read();
}

class InlineReader {
  constructor(text) {
    this.text = text;
    this.index = 0;
    this.items = [];
    this.marks = []; // {mark, at}: open marks and where they are in items
    this.missing = new Set(); // closing strings that do not occur in the rest of the text
  }

  read() {
    while (this.index < this.text.length) {
      const char = this.text[this.index];
      const isRead =
        (char === "\\" && this.readEscape()) ||
        (char === "`" && this.readCode()) ||
        (char === "[" && this.open("[", 1)) ||
        (char === "!" && this.text[this.index + 1] === "[" && this.open("[", 2)) ||
        (char === "]" && this.readTarget()) ||
        ((char === "*" || char === "_" || char === "~") && this.readMarks(char)) ||
        (char === "<" && this.readAngle()) ||
        (char === "&" && this.match(ENTITY, (found) => ENTITIES[found[1]])) ||
        (char === "$" && this.readMath("$$", "$$")) ||
        (char === "h" && this.readAddress()) ||
        (char === "\n" && this.readNewline());
      if (!isRead) this.add(this.text[this.index++]);
    }
    return this.items;
  }

  add(item) {
    const last = this.items.length - 1;
    const isMark = this.marks.at(-1)?.at === last;
    if (typeof item === "string" && typeof this.items[last] === "string" && !isMark) this.items[last] += item;
    else this.items.push(item);
    return true;
  }

  /** Take `text`, which comes next, as it is. */
  skip(text) {
    this.index += text.length;
    return this.add(text);
  }

  match(pattern, make) {
    pattern.lastIndex = this.index;
    const found = pattern.exec(this.text);
    if (!found) return false;
    this.index += found[0].length;
    return this.add(make(found));
  }

  /** Return where `string` comes next, or -1. A string that is missing once is not searched for again. */
  find(string, from) {
    if (this.missing.has(string)) return -1;
    const at = this.text.indexOf(string, from);
    if (at < 0) this.missing.add(string);
    return at;
  }

  readEscape() {
    const next = this.text[this.index + 1];
    if (next === "(") return this.readMath("\\(", "\\)") || this.skipBackslash();
    if (next === "[") return this.readMath("\\[", "\\]") || this.skipBackslash();
    if (next === "\n") return this.skipBackslash(element("br"));
    return next !== undefined && ESCAPED.test(next) && this.skipBackslash();
  }

  skipBackslash(item = this.text[this.index + 1]) {
    this.index += 2;
    return this.add(item);
  }

  readMath(open, close) {
    if (!this.text.startsWith(open, this.index)) return false;
    const end = this.find(close, this.index + 2);
    if (end <= this.index + 2) return false;
    const math = element("span", { className: "math" }, this.text.slice(this.index + 2, end).trim());
    this.index = end + 2;
    return this.add(math);
  }

  readCode() {
    let width = 1;
    while (this.text[this.index + width] === "`") width++;
    const marks = "`".repeat(width);
    let end = this.find(marks, this.index + width);
    while (end >= 0 && this.text[end + width] === "`") {
      let after = end + width;
      while (this.text[after] === "`") after++;
      end = this.find(marks, after);
    }
    const start = this.index + width;
    if (end < 0) return this.skip(marks);
    let code = this.text.slice(start, end).replaceAll("\n", " ");
    if (code.trim() && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
    this.index = end + width;
    return this.add(element("code", {}, code));
  }

  readAngle() {
    return this.match(AUTOLINK, (found) => link(found[1], [found[1]])) || this.match(BREAK, () => element("br"));
  }

  readAddress() {
    const before = this.text[this.index - 1];
    // ASCII letters only: Chinese and Japanese put no space between a word and an address.
    if ((before && /\w/.test(before)) || this.isOpen("[")) return false;
    ADDRESS.lastIndex = this.index;
    let address = ADDRESS.exec(this.text)?.[0];
    if (!address) return false;
    address = address.replace(/[.,;:!?*_~\]]+$/, "");
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, address.indexOf(")"));
    this.index += address.length;
    return this.add(link(address, [address]));
  }

  readNewline() {
    const isBreak = this.text.endsWith("  ", this.index);
    this.index++;
    if (!isBreak) return this.add("\n");
    const last = this.items.length - 1;
    if (typeof this.items[last] === "string") this.items[last] = this.items[last].trimEnd();
    return this.add(element("br"));
  }

  isOpen(mark) {
    return this.marks.some((open) => open.mark === mark);
  }

  /** Keep a mark that may turn out to open something. Until it is closed it is text. */
  open(mark, width = mark.length) {
    const source = this.text.substr(this.index, width);
    this.index += width;
    if (this.marks.length >= MAX_OPEN_MARKS) return this.add(source);
    this.marks.push({ mark, at: this.items.length });
    this.items.push(source);
    return true;
  }

  /** Close the nearest open `mark`: wrap what came after it. Marks within that were not closed stay text. */
  close(mark, wrap) {
    const opened = this.marks.findLastIndex((open) => open.mark === mark);
    if (opened < 0) return false;
    const at = this.marks[opened].at;
    if (at === this.items.length - 1) return false;
    const inner = this.items.splice(at).slice(1);
    this.marks.length = opened;
    this.items.push(wrap(inner));
    return true;
  }

  readTarget() {
    if (this.text[this.index + 1] !== "(" || !this.isOpen("[")) return false;
    TARGET.lastIndex = this.index + 1;
    const found = TARGET.exec(this.text);
    if (!found || !this.close("[", (inner) => link(found[1], inner))) return false;
    this.index += 1 + found[0].length;
    return true;
  }

  readMarks(char) {
    if (this.match(UNDERSCORES_IN_WORD, (found) => found[0])) return true;
    let width = 1;
    while (this.text[this.index + width] === char) width++;
    const before = this.text[this.index - 1] ?? " ";
    const after = this.text[this.index + width] ?? " ";
    if (width > 3 || (char === "~" && width !== 2)) return this.skip(char.repeat(width));
    let left = width;
    while (left > 0 && !/\s/.test(before)) {
      const mark = this.nearest(char, left);
      if (!mark || !this.close(mark, (inner) => element(TAGS[mark], {}, inner))) break;
      this.index += mark.length;
      left -= mark.length;
    }
    const mayOpen = !/\s/.test(after);
    for (; left > 0; left -= left > 1 ? 2 : 1) {
      const mark = char.repeat(left > 1 ? 2 : 1);
      if (mayOpen) this.open(mark);
      else this.skip(mark);
    }
    return true;
  }

  nearest(char, width) {
    return this.marks.findLast((open) => open.mark[0] === char && open.mark.length <= width)?.mark;
  }
}

/** Make a link to a web page or a mail address. Anything else, such as javascript:, is shown as text. */
function link(address, children) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return element("span", { title: address }, children);
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
