/**
 * The part of Markdown that answers use: headings, paragraphs, lists, quotes, fenced and inline code, emphasis, links.
 * Everything is built as DOM nodes from text, never from HTML, so that no answer can bring markup of its own.
 */

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const BULLET = /^\s*[-*+•]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![\w*])\*(?=\S)([^*]+?)(?<=\S)\*(?![\w*])|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

/**
 * Shows a text that grows. Only blocks that changed are built again, so a long answer costs no more per update than a
 * short one and a selection in its earlier part survives.
 */
export class MarkdownView {
  #root;
  #shown = [];

  /** @param {Element} root the element that holds the text */
  constructor(root) {
    this.#root = root;
  }

  /** @param {string} text the whole text so far */
  update(text) {
    const blocks = parseBlocks(text);
    const keys = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < keys.length && keys[same] === this.#shown[same]) same++;
    while (this.#root.childNodes.length > same) this.#root.lastChild.remove();
    this.#root.append(...blocks.slice(same).map(buildBlock));
    this.#shown = keys;
  }
}

/** Return the blocks of a text as plain data. */
export function parseBlocks(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const [, fence, language] = match;
      const body = [];
      at++;
      while (at < lines.length && !(lines[at].trim().startsWith(fence) && !lines[at].trim().replaceAll(fence[0], ""))) {
        body.push(lines[at++]);
      }
      at++;
      blocks.push({ kind: "code", language, text: body.join("\n") });
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ kind: "heading", level: match[1].length, text: match[2] });
      at++;
    } else if (BULLET.test(line) || NUMBER.test(line)) {
      const marker = BULLET.test(line) ? BULLET : NUMBER;
      const start = marker === NUMBER ? Number(NUMBER.exec(line)[1]) : null;
      const items = [];
      while (at < lines.length && lines[at].trim()) {
        if ((match = marker.exec(lines[at]))) items.push(match.at(-1));
        else if (startsBlock(lines[at])) break;
        else items[items.length - 1] += ` ${lines[at].trim()}`;
        at++;
        // A blank line between two items leaves them in one list.
        if (at + 1 < lines.length && !lines[at].trim() && marker.test(lines[at + 1])) at++;
      }
      blocks.push({ kind: "list", start, items });
    } else if (QUOTE.test(line)) {
      const body = [];
      while (at < lines.length && (match = QUOTE.exec(lines[at]))) {
        body.push(match[1]);
        at++;
      }
      blocks.push({ kind: "quote", text: body.join("\n") });
    } else {
      const body = [];
      while (at < lines.length && lines[at].trim() && (!body.length || !startsBlock(lines[at]))) body.push(lines[at++]);
      blocks.push({ kind: "paragraph", text: body.join("\n") });
    }
  }
  return blocks;
}

function startsBlock(line) {
  return [FENCE, HEADING, BULLET, NUMBER, QUOTE].some((pattern) => pattern.test(line));
}

function buildBlock(block) {
  switch (block.kind) {
    case "code": {
      const pre = element("pre");
      const code = element("code", block.text);
      if (block.language) pre.dataset.language = block.language;
      pre.tabIndex = 0; // so that the keyboard can scroll it
      pre.append(code);
      return pre;
    }
    case "heading":
      // The page's own headings are h1 and h2.
      return withInline(element(`h${Math.min(block.level + 2, 6)}`), block.text);
    case "list": {
      const list = element(block.start === null ? "ul" : "ol");
      if (block.start > 1) list.start = block.start;
      list.append(...block.items.map((item) => withInline(element("li"), item)));
      return list;
    }
    case "quote":
      return withInline(element("blockquote"), block.text);
    default:
      return withInline(element("p"), block.text);
  }
}

function withInline(parent, text) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, , code, strong, emphasis, label, href] = match;
    parent.append(text.slice(end, match.index));
    end = match.index + whole.length;
    if (code !== undefined) parent.append(element("code", code.trim() || code));
    else if (strong !== undefined) parent.append(withInline(element("strong"), strong));
    else if (emphasis !== undefined) parent.append(withInline(element("em"), emphasis));
    else {
      const link = element("a", label);
      link.href = href;
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      parent.append(link);
    }
  }
  parent.append(text.slice(end));
  return parent;
}

function element(tag, text = "") {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  return node;
}
