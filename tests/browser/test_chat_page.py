"""The chat page and the admin in a real browser, against a real web server and worker."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support import MODEL, Demo, running_demo

pytestmark = pytest.mark.timeout(300)

LONG = "Write a long guide to operating mlx-serving"


class ChatPage:
    """The page as its reader sees it."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.connection == "Connected" and self.models)

    def wait(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        WebDriverWait(self.browser, timeout_s, 0.05).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    @property
    def connection(self) -> str:
        return self.find("#connection .word").text

    @property
    def models(self) -> list[str]:
        return [
            option.get_attribute("value") or ""
            for option in self.browser.find_elements(By.CSS_SELECTOR, "#model option")
        ]

    @property
    def answers(self) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, ".answer")

    @property
    def answer(self) -> str:
        return self.answers[-1].find_element(By.CSS_SELECTOR, ".text").text

    @property
    def running(self) -> bool:
        return self.find("#stop").is_displayed()

    def ask(self, text: str) -> None:
        self.find("#input").send_keys(text, Keys.ENTER)

    def ask_and_wait(self, text: str) -> str:
        self.ask(text)
        self.wait(lambda: not self.running and "running" not in (self.answers[-1].get_attribute("class") or ""))
        return self.answer

    def complaints(self) -> list[str]:
        return [str(entry["message"]) for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def chat(browser: Chrome, demo: Demo) -> ChatPage:
    return ChatPage(browser, demo.url)


def test_an_answer_streams_and_shows_its_speed(chat: ChatPage) -> None:
    chat.ask(LONG)
    chat.wait(lambda: chat.running and chat.answer)
    length = len(chat.answer)
    chat.wait(lambda: len(chat.answer) > length)
    assert chat.running, "the text grew before it was complete"
    chat.find("#stop").click()
    assert "42" in chat.ask_and_wait("What is 17 + 25?")
    stats = chat.answers[-1].find_element(By.CSS_SELECTOR, ".stats").text
    assert "Time to first token" in stats
    assert "tokens/s" in stats
    assert chat.complaints() == []


def test_the_stop_button_ends_the_answer_and_the_next_question_is_answered(chat: ChatPage) -> None:
    chat.ask(LONG)
    chat.wait(lambda: len(chat.answer) > 40)
    chat.find("#stop").click()
    chat.wait(lambda: not chat.running)
    assert chat.answers[-1].find_element(By.CSS_SELECTOR, ".stats").text == "Stopped"
    stopped_at = chat.answer
    assert "42" in chat.ask_and_wait("What is 17 + 25?")
    assert chat.answers[-2].find_element(By.CSS_SELECTOR, ".text").text == stopped_at


def test_escape_stops_too(chat: ChatPage) -> None:
    chat.ask(LONG)
    chat.wait(lambda: chat.answer)
    chat.find("#input").send_keys(Keys.ESCAPE)
    chat.wait(lambda: not chat.running)
    assert chat.answers[-1].find_element(By.CSS_SELECTOR, ".stats").text == "Stopped"


def test_a_suggestion_is_asked_with_one_click(chat: ChatPage) -> None:
    chat.find("button[data-prompt='What is 17 + 25?']").click()
    chat.wait(lambda: chat.answers and not chat.running and chat.answer)
    assert "42" in chat.answer
    assert not chat.find("#welcome").is_displayed()


def test_an_error_is_readable_and_a_retry_asks_again(chat: ChatPage) -> None:
    chat.find("#settings-toggle").click()
    chat.find("#max-tokens").send_keys("99999999")
    chat.ask("What is 17 + 25?")
    chat.wait(lambda: chat.browser.find_elements(By.CSS_SELECTOR, ".error .message"))
    message = chat.find(".error .message").text
    assert "token" in message
    assert "{" not in message
    chat.find("#max-tokens").clear()
    chat.find(".error .retry").click()
    chat.wait(lambda: not chat.running and chat.answers and chat.answer)
    assert "42" in chat.answer
    assert len(chat.answers) == 1


def test_markup_in_a_question_stays_text(chat: ChatPage) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"> **bold**"
    chat.ask_and_wait(f"Repeat: {hostile}")
    assert hostile in chat.find(".question .text").text
    assert chat.browser.find_elements(By.CSS_SELECTOR, "#turns img") == []
    assert chat.browser.title != "owned"


def test_markdown_becomes_elements_and_never_markup(chat: ChatPage) -> None:
    html = chat.browser.execute_async_script(
        """
        const [text, done] = arguments;
        import("/static/mlx_serving/chat/markdown.js").then(({ MarkdownView }) => {
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          for (let end = 1; end <= text.length; end++) view.update(text.slice(0, end));
          done(root.innerHTML);
        });
        """,
        "# Title\n\nA **b** *c* `d<e>`, 2*3*4.\n\n- one\n- two\n\n3. three\n\n```py\n<b>x</b>\n```\n\n"
        "[ok](https://example.org/a) [no](javascript:alert(1)) <script>alert(1)</script>",
    )
    assert html == (
        "<h3>Title</h3><p>A <strong>b</strong> <em>c</em> <code>d&lt;e&gt;</code>, 2*3*4.</p>"
        "<ul><li>one</li><li>two</li></ul>"
        '<ol start="3"><li>three</li></ol>'
        '<pre data-language="py" tabindex="0"><code>&lt;b&gt;x&lt;/b&gt;</code></pre>'
        '<p><a href="https://example.org/a" rel="noopener noreferrer" target="_blank">ok</a> '
        "[no](javascript:alert(1)) &lt;script&gt;alert(1)&lt;/script&gt;</p>"
    )


def test_the_socket_client_runs_several_chats_and_leaving_a_loop_stops_one(browser: Chrome, demo: Demo) -> None:
    browser.get(demo.url)
    result = browser.execute_async_script(
        """
        const [long, done] = arguments;
        import("/static/mlx_serving/chat/socket.js").then(async ({ ChatSocket }) => {
          const socket = new ChatSocket();
          const request = (content) => ({ messages: [{ role: "user", content }], temperature: 0 });
          const whole = async (content) => {
            let text = "";
            for await (const event of socket.chat(request(content))) if (event.type === "delta") text += event.text;
            return text;
          };
          const first = async (content) => {
            for await (const event of socket.chat(request(content))) if (event.type === "delta") return "left";
          };
          const refused = socket.chat({ messages: [] }).next().catch((error) => [error.name, error.code, error.param]);
          done(await Promise.all([whole("What is 17 + 25?"), first(long), whole("What is 20 + 30?"), refused]));
        });
        """,
        LONG,
    )
    assert "42" in result[0]
    assert result[1] == "left"
    assert "50" in result[2]
    assert result[3][:2] == ["ChatError", "invalid_request"]


def test_scrolling_up_during_an_answer_stays_there(chat: ChatPage) -> None:
    chat.browser.set_window_size(700, 420)
    chat.ask(LONG)
    scrolled = "const log = document.getElementById('log'); return log.scrollHeight - log.clientHeight"
    chat.wait(lambda: chat.browser.execute_script(scrolled) > 200)
    chat.browser.execute_script("document.getElementById('log').scrollTop = 0")
    chat.wait(lambda: chat.find("#latest").is_displayed())
    length = len(chat.answer)
    chat.wait(lambda: len(chat.answer) > length)
    assert chat.browser.execute_script("return document.getElementById('log').scrollTop") == 0
    chat.find("#latest").click()
    chat.wait(lambda: not chat.find("#latest").is_displayed())


def test_the_page_reconnects_after_a_restart_of_the_site(
    browser: Chrome, tmp_path: Path, runtime_dir: Path, port: int
) -> None:
    with running_demo(tmp_path / "var", runtime_dir, port) as site:
        chat = ChatPage(browser, site.url)
        chat.ask(LONG)
        chat.wait(lambda: chat.answer)
        site.process.send_signal(signal.SIGTERM)
        chat.wait(lambda: chat.browser.find_elements(By.CSS_SELECTOR, ".error .message"))
        site.process.wait(60)
    with running_demo(tmp_path / "var", runtime_dir, port):
        chat.wait(lambda: chat.connection == "Connected")
        chat.find(".error .retry").click()
        chat.wait(lambda: chat.running and chat.answer)


def test_a_closed_site_says_so_and_serves_those_who_log_in(browser: Chrome, tmp_path: Path, runtime_dir: Path) -> None:
    with running_demo(tmp_path / "var", runtime_dir, MLX_SERVING_ALLOW_ANONYMOUS="false") as site:
        browser.get(site.url)
        picker = browser.find_element(By.ID, "model")
        WebDriverWait(browser, 20).until(lambda _: "log in" in picker.text)
        browser.find_element(By.ID, "input").send_keys("What is 17 + 25?", Keys.ENTER)
        WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".error .message"))
        assert "log in" in browser.find_element(By.CSS_SELECTOR, ".error .message").text
        log_in(browser, site)
        assert "42" in ChatPage(browser, site.url).ask_and_wait("What is 17 + 25?")


def log_in(browser: Chrome, site: Demo) -> None:
    browser.get(f"{site.url}/admin/")
    browser.find_element(By.NAME, "username").send_keys("admin")
    browser.find_element(By.NAME, "password").send_keys(site.password, Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.LINK_TEXT, "Models"))


def test_admin_login_and_its_pages_open(browser: Chrome, demo: Demo) -> None:
    log_in(browser, demo)
    browser.find_element(By.LINK_TEXT, "Models").click()
    WebDriverWait(browser, 20).until(lambda _: MODEL in browser.find_element(By.ID, "content").text)
    for page in ("worker", "featureflag"):
        browser.get(f"{demo.url}/admin/mlx_serving/{page}/")
        assert browser.find_elements(By.CSS_SELECTOR, "#content h1"), page
