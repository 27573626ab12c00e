/**
 * A client of the mlx-serving WebSocket protocol, for any page of a site that serves it.
 *
 *   import { ChatSocket } from "/static/mlx_serving/chat/socket.js";
 *   const socket = new ChatSocket();
 *   for await (const event of socket.chat({ messages: [{ role: "user", content: "Hello" }] })) {
 *     if (event.type === "delta") output.append(event.text);
 *   }
 *
 * One socket carries any number of chats at once. It reconnects by itself, with a growing pause; chats that were
 * running when the connection broke fail with the code "connection_lost", and new ones wait for the connection.
 */

export const PROTOCOL = "mlx-serving.v1";
export const PATH = "/ws/chat/";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15_000;
const CONNECT_WAIT_MS = 10_000;

/** What a chat failed with: the fields of the server's error object, or a code of this client's own. */
export class ChatError extends Error {
  /**
   * @param {string} message
   * @param {{code?: string, type?: string, param?: string|null}} [details]
   */
  constructor(message, { code = "unknown", type = "client_error", param = null } = {}) {
    super(message);
    this.name = "ChatError";
    this.code = code;
    this.type = type;
    this.param = param;
  }
}

/** Events that wait for their reader, in order, with an end or an error behind them. */
class EventQueue {
  #events = [];
  #ended = false;
  #error = null;
  #wake = null;

  push(event) {
    this.#events.push(event);
    this.#wake?.();
  }

  end(error = null) {
    if (this.#ended) return;
    this.#ended = true;
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator]() {
    for (;;) {
      while (this.#events.length) yield this.#events.shift();
      if (this.#ended) {
        if (this.#error) throw this.#error;
        return;
      }
      await new Promise((resolve) => (this.#wake = resolve));
      this.#wake = null;
    }
  }
}

/**
 * A connection that is kept open until `close()`. Its `state` is "connecting", "open", "waiting" (until the next
 * attempt) or "closed"; every change of it dispatches a "state" event.
 */
export class ChatSocket extends EventTarget {
  #url;
  #socket = null;
  #state = "connecting";
  #attempts = 0;
  #timer = null;
  #chats = new Map();
  #lastId = 0;
  #onOnline = () => this.#retryNow();

  /** @param {string|URL} [url] where the protocol is served; by default `PATH` of this page's own site */
  constructor(url = new URL(PATH, window.location.href)) {
    super();
    this.#url = new URL(url, window.location.href);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    window.addEventListener("online", this.#onOnline);
    this.#connect();
  }

  get state() {
    return this.#state;
  }

  /**
   * Start a chat and return its events ("accepted", "delta" ..., "finished") as an async iterable.
   *
   * Aborting the signal, or leaving the loop, tells the server to stop.
   *
   * @param {object} request the body of POST /v1/chat/completions, without `stream`
   * @param {{signal?: AbortSignal}} [options]
   * @throws {ChatError} the server refused or failed, or the connection broke
   * @throws {DOMException} named AbortError, after an abort
   */
  async *chat(request, { signal } = {}) {
    signal?.throwIfAborted();
    await this.#opened(signal);
    const id = `c${++this.#lastId}`;
    const queue = new EventQueue();
    const abort = () => queue.end(new DOMException("The chat was stopped.", "AbortError"));
    signal?.addEventListener("abort", abort, { once: true });
    this.#chats.set(id, queue);
    try {
      this.#send({ type: "chat", id, request });
      yield* queue;
    } finally {
      signal?.removeEventListener("abort", abort);
      // Still registered means that the server has not ended it.
      if (this.#chats.delete(id)) this.#send({ type: "cancel", id });
    }
  }

  /** Close the connection for good. */
  close() {
    window.removeEventListener("online", this.#onOnline);
    clearTimeout(this.#timer);
    this.#setState("closed");
    this.#socket?.close();
  }

  #send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #setState(state) {
    if (this.#state === state || this.#state === "closed") return;
    this.#state = state;
    this.dispatchEvent(new Event("state"));
  }

  #opened(signal) {
    if (this.#state === "open") return Promise.resolve();
    if (this.#state === "closed") return Promise.reject(lost("The connection is closed."));
    this.#retryNow();
    return new Promise((resolve, reject) => {
      const done = (settle, value) => {
        clearTimeout(timer);
        this.removeEventListener("state", check);
        signal?.removeEventListener("abort", abort);
        settle(value);
      };
      const check = () => {
        if (this.#state === "open") done(resolve);
        if (this.#state === "closed") done(reject, lost("The connection is closed."));
      };
      const abort = () => done(reject, new DOMException("The chat was stopped.", "AbortError"));
      const timer = setTimeout(() => done(reject, lost("The server cannot be reached.")), CONNECT_WAIT_MS);
      this.addEventListener("state", check);
      signal?.addEventListener("abort", abort, { once: true });
    });
  }

  #retryNow() {
    if (this.#state !== "waiting") return;
    clearTimeout(this.#timer);
    this.#connect();
  }

  #connect() {
    this.#setState("connecting");
    const socket = new WebSocket(this.#url, PROTOCOL);
    this.#socket = socket;
    socket.addEventListener("open", () => {
      this.#attempts = 0;
      this.#setState("open");
    });
    socket.addEventListener("message", ({ data }) => this.#receive(JSON.parse(data)));
    socket.addEventListener("close", () => this.#closed());
  }

  #closed() {
    for (const queue of this.#chats.values()) queue.end(lost("The connection was lost."));
    this.#chats.clear();
    if (this.#state === "closed") return;
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** this.#attempts++, LONGEST_PAUSE_MS);
    // Up to half of the pause is random, so that pages do not all come back in the same instant.
    this.#timer = setTimeout(() => this.#connect(), pause * (0.5 + Math.random() / 2));
    this.#setState("waiting");
  }

  #receive(message) {
    const queue = this.#chats.get(message.id);
    if (message.type === "error" && message.id == null) {
      const error = new ChatError(message.error.message, message.error);
      this.dispatchEvent(new CustomEvent("error", { detail: error }));
      return;
    }
    if (!queue) return; // the rest of a chat that was cancelled
    switch (message.type) {
      case "error":
        this.#chats.delete(message.id);
        queue.end(new ChatError(message.error.message, message.error));
        break;
      case "cancelled":
        this.#chats.delete(message.id);
        queue.end(new DOMException("The chat was stopped.", "AbortError"));
        break;
      case "finished":
        this.#chats.delete(message.id);
        queue.push(message);
        queue.end();
        break;
      default:
        queue.push(message);
    }
  }
}

function lost(message) {
  return new ChatError(message, { code: "connection_lost" });
}
