/** The chat page: what its parts do. Talks to the server through `socket.js` and shows answers through `markdown.js`. */

import { MarkdownView } from "./markdown.js";
import { ChatError, ChatSocket } from "./socket.js";

const byId = (id) => document.getElementById(id);
const page = {
  log: byId("log"),
  turns: byId("turns"),
  welcome: byId("welcome"),
  form: byId("composer"),
  input: byId("input"),
  send: byId("send"),
  stop: byId("stop"),
  latest: byId("latest"),
  fresh: byId("new-chat"),
  model: byId("model"),
  settings: byId("settings"),
  settingsToggle: byId("settings-toggle"),
  system: byId("system"),
  temperature: byId("temperature"),
  temperatureValue: byId("temperature-value"),
  maxTokens: byId("max-tokens"),
  connection: byId("connection"),
  announcer: byId("announcer"),
};
const config = JSON.parse(byId("chat-config").textContent);

const SAVED = "mlx-serving.chat";
const NEAR_BOTTOM_PX = 64;
const COPIED_MS = 1500;

/** What to do about an error, by its code; the server's own message says what happened. */
const ADVICE = {
  connection_lost: "Try again once the connection is back.",
  model_not_ready: "The model is still loading. Try again in a moment.",
  overloaded: "The server is busy. Try again in a moment.",
  context_length_exceeded: "Start a new chat, or ask for fewer tokens.",
  authentication_required: "Log in, then reload this page.",
  worker_lost: "The worker is being restarted. Try again in a moment.",
  worker_draining: "The worker is being restarted. Try again in a moment.",
};

const socket = new ChatSocket(new URL(config.socket, window.location.href));
/** The conversation: {role: "user"|"assistant", content}. */
let messages = [];
/** The answer that is being written: {controller}, or null. */
let running = null;
/** Why the site does not serve this visitor, or "". A refused socket looks to a page like one that cannot be reached. */
let refusal = "";
let follow = true;

// --- the conversation ------------------------------------------------------------------------------------------------

async function ask(text) {
  if (running) return;
  // A question that got no answer is left out: chat templates want the two to take turns.
  if (messages.at(-1)?.role === "user") messages.pop();
  for (const old of page.turns.querySelectorAll(".retry")) old.hidden = true;
  messages.push({ role: "user", content: text });
  page.welcome.hidden = true;
  const question = fromTemplate("question-template");
  question.querySelector(".text").textContent = text;
  page.turns.append(question);
  scrollToEnd();
  await answer();
}

async function answer() {
  const view = new AnswerView();
  const controller = new AbortController();
  const mine = messages;
  running = { controller };
  showRunning();
  let text = "";
  try {
    if (refusal && socket.state !== "open") throw new ChatError(refusal, { code: "authentication_required" });
    for await (const event of socket.chat(requestBody(), { signal: controller.signal })) {
      if (event.type === "delta") {
        text += event.text;
        view.delta(text, event.finish_reason);
      } else if (event.type === "finished") {
        view.finished(event.usage);
      }
    }
    announce(text);
  } catch (error) {
    if (error.name === "AbortError") {
      view.stopped();
      announce("Stopped.");
    } else {
      view.failed(error);
      announce(`Error: ${error.message}`);
    }
  } finally {
    if (text) mine.push({ role: "assistant", content: text });
    view.end();
    if (running?.controller === controller) running = null;
    showRunning();
  }
}

function requestBody() {
  const body = { messages: [...messages], temperature: Number(page.temperature.value) };
  if (page.system.value.trim()) body.messages.unshift({ role: "system", content: page.system.value.trim() });
  if (page.model.value) body.model = page.model.value;
  if (page.maxTokens.value) body.max_tokens = Number(page.maxTokens.value);
  return body;
}

function startAgain() {
  running?.controller.abort();
  running = null;
  messages = [];
  page.turns.replaceChildren();
  page.welcome.hidden = false;
  showRunning();
  page.input.focus();
}

/** One answer on the page, from its first moment to its last. */
class AnswerView {
  constructor() {
    this.started = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.text = "";
    this.reason = null;
    this.node = fromTemplate("answer-template");
    this.body = this.node.querySelector(".text");
    this.stats = this.node.querySelector(".stats");
    this.markdown = new MarkdownView(this.body);
    this.frame = 0;
    this.node.querySelector(".copy").addEventListener("click", ({ currentTarget }) => copy(this.text, currentTarget));
    page.turns.append(this.node);
    scrollToEnd();
  }

  delta(text, reason) {
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.text = text;
    this.reason ??= reason;
    this.node.classList.add("has-text");
    // However many deltas arrive between two frames, the page is drawn once.
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.markdown.update(this.text);
    if (follow) scrollToEnd();
  }

  finished(usage) {
    const parts = [];
    if (this.firstAt !== null) parts.push(["Time to first token", formatMs(this.firstAt - this.started)]);
    const seconds = (this.lastAt - this.firstAt) / 1000;
    // The first token's time is in the number before; the rest share what came after.
    if (usage.completion_tokens > 1 && seconds > 0) {
      parts.push(["Speed", `${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`]);
    }
    parts.push(["Tokens", `${usage.prompt_tokens} in, ${usage.completion_tokens} out`]);
    if (this.reason === "length") parts.push(["End", "token limit reached"]);
    this.stats.replaceChildren(
      ...parts.map(([name, value]) => {
        const item = document.createElement("span");
        const label = document.createElement("span");
        label.textContent = name;
        item.append(label, ` ${value}`);
        return item;
      }),
    );
  }

  stopped() {
    this.stats.textContent = "Stopped";
  }

  failed(error) {
    const box = fromTemplate("error-template");
    const advice = ADVICE[error instanceof ChatError ? error.code : ""];
    box.querySelector(".message").textContent = error.message;
    box.querySelector(".advice").textContent = advice ?? "";
    box.querySelector(".retry").addEventListener("click", () => {
      if (running) return;
      this.node.remove();
      if (messages.at(-1)?.role === "assistant") messages.pop();
      answer();
      page.input.focus();
    });
    this.node.querySelector(".footer").before(box);
  }

  end() {
    this.draw();
    this.node.classList.remove("running");
    this.node.removeAttribute("aria-busy");
    this.node.classList.toggle("empty", !this.text);
  }
}

// --- the parts around it ---------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const response = await fetch(config.models, { headers: { Accept: "application/json" } });
    const body = await response.json();
    refusal = [401, 403].includes(response.status) ? (body.error?.message ?? response.statusText) : "";
    if (!response.ok) throw new Error(body.error?.message ?? response.statusText);
    const wanted = page.model.value || saved().model || config.defaultModel;
    const names = body.data.map((model) => model.id);
    page.model.replaceChildren(...names.map((name) => new Option(name, name, false, name === wanted)));
    if (!names.length) page.model.append(new Option("No model is served yet", ""));
  } catch (error) {
    page.model.replaceChildren(new Option(`Models unavailable: ${error.message}`, ""));
  }
  page.model.disabled = page.model.options.length < 2;
}

function showConnection() {
  const words = { open: "Connected", connecting: "Connecting …", waiting: "Reconnecting …", closed: "Disconnected" };
  page.connection.dataset.state = socket.state;
  page.connection.querySelector(".word").textContent = words[socket.state];
  if (socket.state === "open" || socket.state === "waiting") loadModels();
}

function showRunning() {
  // Hiding the button that has the focus would drop it on the floor.
  const focused = document.activeElement === page.send || document.activeElement === page.stop;
  page.send.hidden = Boolean(running);
  page.stop.hidden = !running;
  page.send.disabled = !page.input.value.trim();
  if (focused) page.input.focus();
}

function scrollToEnd() {
  follow = true;
  page.log.scrollTop = page.log.scrollHeight;
  page.latest.hidden = true;
}

function fitInput() {
  page.input.style.height = "auto";
  page.input.style.height = `${page.input.scrollHeight}px`;
  page.send.disabled = !page.input.value.trim();
}

function toggleSettings(open = page.settings.hidden) {
  page.settings.hidden = !open;
  page.settingsToggle.setAttribute("aria-expanded", String(open));
  if (open) page.system.focus();
}

/** Tell those who listen to the page; the whole answer once, not each of its tokens. */
function announce(text) {
  page.announcer.textContent = text;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard's own interface exists on HTTPS and localhost only.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "visually-hidden";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  button.disabled = true;
  setTimeout(() => {
    button.textContent = label;
    button.disabled = false;
  }, COPIED_MS);
}

function fromTemplate(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

function formatMs(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

function saved() {
  try {
    return JSON.parse(localStorage.getItem(SAVED)) ?? {};
  } catch {
    return {};
  }
}

function save() {
  const values = {
    model: page.model.value,
    system: page.system.value,
    temperature: page.temperature.value,
    maxTokens: page.maxTokens.value,
  };
  try {
    localStorage.setItem(SAVED, JSON.stringify(values));
  } catch {
    // Without storage the settings last as long as the page.
  }
}

function restore() {
  const values = saved();
  page.system.value = values.system ?? "";
  page.temperature.value = values.temperature ?? page.temperature.value;
  page.maxTokens.value = values.maxTokens ?? "";
  page.temperatureValue.value = Number(page.temperature.value).toFixed(1);
}

// --- events ----------------------------------------------------------------------------------------------------------

page.form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = page.input.value.trim();
  if (!text || running) return;
  page.input.value = "";
  fitInput();
  ask(text);
});
page.input.addEventListener("input", fitInput);
page.input.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    page.form.requestSubmit();
  }
});
page.stop.addEventListener("click", () => running?.controller.abort());
page.fresh.addEventListener("click", startAgain);
page.latest.addEventListener("click", () => {
  scrollToEnd();
  page.input.focus();
});
page.log.addEventListener("scroll", () => {
  follow = page.log.scrollHeight - page.log.scrollTop - page.log.clientHeight < NEAR_BOTTOM_PX;
  page.latest.hidden = follow;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.controller.abort();
  else if (!page.settings.hidden) {
    toggleSettings(false);
    page.settingsToggle.focus();
  }
});
for (const button of page.welcome.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    ask(button.dataset.prompt);
    page.input.focus();
  });
}
page.settingsToggle.addEventListener("click", () => toggleSettings());
page.temperature.addEventListener("input", () => {
  page.temperatureValue.value = Number(page.temperature.value).toFixed(1);
});
for (const field of [page.model, page.system, page.temperature, page.maxTokens]) field.addEventListener("change", save);
socket.addEventListener("state", showConnection);

restore();
fitInput();
showRunning();
showConnection();
