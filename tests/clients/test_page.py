"""The chat page in a real browser. A scripted server gives the answers, so no engine is needed."""

import re
import shutil
from collections.abc import Iterator

import httpx
import pytest

from tests.clients.scripted_api import Script, ScriptedApi, serve_scripts

sync_api = pytest.importorskip("playwright.sync_api")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe

Page, expect = sync_api.Page, sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 60_000

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.xdist_group("page"),
]

MARKDOWN = """# Sorting

Use **merge sort**, *not* `bogosort`; see [the notes](https://example.com/notes).

| name | cost |
|:-----|-----:|
| merge | n log n |

1. split
2. merge
   - in order

```python
def merge(a, b):
    return sorted(a + b)  # <b>short</b>
```
"""

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

<iframe src="javascript:window.parent.hacked = 3"></iframe> <svg onload="window.hacked = 4">

[click](javascript:window.hacked=5)
[tab](java\tscript:window.hacked=6) <javascript:window.hacked=7> [d](data:text/html,hi)

![picture](https://outside.example/pixel.png) ![x](x" onerror="window.hacked=8)

[a](https://outside.example/"onmouseover="window.hacked=9) **<b onclick=window.hacked=10>bold</b>**

| <img src=x onerror=window.hacked=11> | b |
|---|---|
| <style>*{display:none}</style> | `<script>` |

```html"><script>window.hacked=12</script>
</code></pre><script>window.hacked = 13</script>
```
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedApi]:
    with serve_scripts() as api:
        yield api


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@pytest.fixture
def api(server):
    server.reset()
    yield server
    server.released.set()


@pytest.fixture
def open_page(browser, api):
    """Return a function that opens the page in a fresh browser profile. No script may fail or break the policy."""
    contexts, faults = [], []

    def open_one(**options) -> Page:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if "Security Policy" in line.text else None)
        page.goto(api.url)
        page.wait_for_selector("body[data-ready]")
        return page

    expect.set_options(timeout=TIMEOUT_MS)
    yield open_one
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


@pytest.fixture(scope="module")
def render(browser, server):
    """Return a function that renders Markdown and gives the HTML and the number of blocks."""
    page = browser.new_page()
    page.goto(server.url)
    script = """async (text) => {
        const { MarkdownView } = await import('/page/markdown.js');
        const root = document.createElement('div');
        new MarkdownView(root).update(text);
        return { html: root.innerHTML, num_elements: root.childElementCount };
    }"""
    return lambda text: page.evaluate(script, text)


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def answers(page: Page):
    return page.locator(".assistant .answer")


def wait_until_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_answer_streams_while_the_server_still_writes(page, api):
    api.scripts.append(Script(["Hello", " there", ", friend."], hold_after=2))
    send(page, "Hi")
    expect(answers(page)).to_have_text("Hello there")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    api.released.set()
    expect(answers(page)).to_have_text("Hello there, friend.")
    expect(page.locator(".stats")).to_contain_text("3 tokens")
    request = api.requests[0]
    assert request["messages"] == [{"role": "user", "content": "Hi"}]
    assert request["model"] == "tiny-model" and request["stream"] is True
    assert not {"temperature", "top_p", "max_tokens", "tools"} & set(request)


def test_next_question_is_sent_with_the_conversation_so_far(page, api):
    api.scripts.append(Script([{"reasoning_content": "Hm."}, "One."]))
    send(page, "First")
    expect(page.locator(".stats")).not_to_be_empty()
    send(page, "Second")
    expect(answers(page)).to_have_text(["One.", "An answer."])
    assert [message["content"] for message in api.requests[1]["messages"]] == ["First", "One.", "Second"]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_keeps_the_partial_answer_and_closes_the_request(page, api, way):
    api.scripts.append(Script(["Partial", " never"], hold_after=1))
    send(page, "Hi")
    expect(answers(page)).to_have_text("Partial")
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_have_text("Stopped")
    assert api.disconnected.wait(60)
    expect(answers(page)).to_have_text("Partial")


def test_regenerated_answer_keeps_the_old_one_as_a_version(page, api):
    api.scripts += [Script(["old"]), Script(["new"])]
    send(page, "Hi")
    expect(answers(page)).to_have_text("old")
    page.get_by_role("button", name="Regenerate answer").click()
    expect(answers(page)).to_have_text("new")
    assert api.requests[1]["messages"] == api.requests[0]["messages"]
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text("old")
    expect(page.locator(".assistant .versions")).to_have_text("1 / 2")


def test_edited_message_is_sent_again_without_what_followed_it(page, api):
    api.scripts += [Script(["one"]), Script(["two"]), Script(["three"])]
    send(page, "First")
    expect(answers(page)).to_have_text("one")
    wait_until_idle(page)
    send(page, "Second")
    expect(answers(page).nth(1)).to_have_text("two")
    wait_until_idle(page)
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit message").first.click()
    page.get_by_role("textbox", name="Edit message").first.fill("Changed")
    page.locator(".editor").first.get_by_role("button", name="Send").click()
    expect(answers(page)).to_have_text(["three"])
    assert api.requests[2]["messages"] == [{"role": "user", "content": "Changed"}]


def test_reload_keeps_conversation_and_settings(page, api):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Max tokens").fill("64")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Model", exact=True).select_option("other-model")
    send(page, "Remember me")
    expect(page.locator(".stats")).not_to_be_empty()
    wait_until_idle(page)
    page.reload()
    expect(answers(page)).to_have_text("An answer.")
    expect(page.locator(".bubble")).to_have_text("Remember me")
    send(page, "More")
    expect(answers(page)).to_have_count(2)
    for request in api.requests:
        assert request["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.5, 0.9, 64)
        assert request["model"] == "other-model"


def test_conversation_can_be_renamed_deleted_and_restored(page, api):
    send(page, "A question about birds")
    expect(page.locator(".stats")).not_to_be_empty()
    wait_until_idle(page)
    page.get_by_role("button", name="Rename A question about birds").click()
    page.get_by_label("Title of the conversation").fill("Birds")
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="Birds", exact=True)
    expect(link).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    link.click()
    expect(answers(page)).to_have_text("An answer.")
    page.get_by_role("button", name="Delete Birds").click()
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text("An answer.")
    page.get_by_role("button", name="Delete Birds").click()
    expect(link).to_be_hidden()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#conversations a")).to_have_count(0)


def test_title_that_is_typed_survives_the_end_of_an_answer(page, api):
    api.scripts.append(Script(["slow", " end"], hold_after=1))
    send(page, "A question")
    expect(answers(page)).to_have_text("slow")
    page.get_by_role("button", name="Rename A question").click()
    title = page.get_by_label("Title of the conversation")
    title.fill("Half a ti")
    api.released.set()
    expect(answers(page)).to_have_text("slow end")
    wait_until_idle(page)
    expect(title).to_have_value("Half a ti")
    title.press("Escape")
    expect(page.get_by_role("link", name="A question")).to_be_focused()


def test_answer_goes_on_while_another_conversation_is_shown(page, api):
    api.scripts.append(Script(["slow", " end"], hold_after=1))
    send(page, "Slow one")
    expect(answers(page)).to_have_text("slow")
    page.get_by_role("button", name="New chat").click()
    send(page, "Quick one")
    expect(answers(page)).to_have_text("An answer.")
    api.released.set()
    page.get_by_role("link", name="Slow one").click()
    expect(answers(page)).to_have_text("slow end")


def test_thinking_is_folded_and_opens(page, api):
    api.scripts.append(Script([{"reasoning_content": "Let me see"}, "Yes."]))
    send(page, "Hi")
    expect(answers(page)).to_have_text("Yes.")
    thought = page.get_by_text("Let me see")
    expect(thought).to_be_hidden()
    page.locator(".thinking summary").click()
    expect(thought).to_be_visible()


def test_tool_call_is_shown_and_its_result_is_sent(page, api):
    start = {"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "get_weather", "arguments": ""}}]}
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ['{"city":', '"Oslo"}']]
    api.scripts += [Script([start, *pieces], finish_reason="tool_calls"), Script(["Cold."])]
    tools = '[{"type": "function", "function": {"name": "get_weather"}}]'
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions that the model may call").fill(tools)
    page.get_by_role("button", name="Done").click()
    send(page, "Weather?")
    expect(page.get_by_text("Called get_weather")).to_be_visible()
    expect(page.locator(".call pre")).to_contain_text('"city": "Oslo"')
    page.get_by_label("Result of get_weather").fill("-3")
    page.get_by_role("button", name="Send results").click()
    expect(answers(page).last).to_have_text("Cold.")
    assert api.requests[0]["tools"][0]["function"]["name"] == "get_weather"
    call, result = api.requests[1]["messages"][1:]
    assert call["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"Oslo"}'}
    assert result == {"role": "tool", "tool_call_id": "call-1", "content": "-3"}


def test_markdown_is_rendered_and_code_is_copied(page, api):
    api.scripts.append(Script(re.findall(r"[^ ]* ?", MARKDOWN)))
    send(page, "Sort")
    expect(page.locator(".stats")).not_to_be_empty()
    answer = answers(page)
    expect(answer.locator("h3")).to_have_text("Sorting")
    expect(answer.locator("strong")).to_have_text("merge sort")
    expect(answer.locator("em")).to_have_text("not")
    expect(answer.locator("p code")).to_have_text("bogosort")
    expect(answer.locator("a")).to_have_attribute("href", "https://example.com/notes")
    expect(answer.locator("td")).to_have_text(["merge", "n log n"])
    expect(answer.locator("ol > li > ul > li")).to_have_text("in order")
    answer.get_by_role("button", name="Copy").click()
    expect(answer.get_by_role("button", name="Copied")).to_be_visible()
    code = "def merge(a, b):\n    return sorted(a + b)  # <b>short</b>"
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.get_by_role("button", name="Copy answer").click()
    page.wait_for_function("text => navigator.clipboard.readText().then(read => read === text)", arg=MARKDOWN)


def test_streamed_markdown_equals_markdown_at_once(page):
    assert page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import('/page/markdown.js');
            const [streamed, whole] = [0, 1].map(() => document.createElement('div'));
            const view = new MarkdownView(streamed);
            for (let end = 0; end <= text.length; end++) view.update(text.slice(0, end));
            new MarkdownView(whole).update(text);
            return streamed.isEqualNode(whole) && whole.childElementCount > 4;
        }""",
        MARKDOWN,
    )


RENDERED = [
    ("a *b **c*** d", "<p>a <em>b <strong>c</strong></em> d</p>"),
    ("***a*** __b__ ~~c~~", "<p><strong><em>a</em></strong> <strong>b</strong> <del>c</del></p>"),
    ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
    (r"\*a\* `*b*` ``c`d``", "<p>*a* <code>*b*</code> <code>c`d</code></p>"),
    ("a  \nb<br>c\nd", "<p>a<br>b<br>c\nd</p>"),
    ("&lt;b&gt; &bogus; AT&T", "<p>&lt;b&gt; &amp;bogus; AT&amp;T</p>"),
    ("## Two ##\ntext\n---", "<h4>Two</h4><p>text</p><hr>"),
    ("> q\n> > r", "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>"),
    ("3. a\n4. b\n\nc", '<ol start="3"><li class="">a</li><li class="">b</li></ol><p>c</p>'),
    ("- [x] a\n- [ ] b", '<ul><li class="task">☑ a</li><li class="task">☐ b</li></ul>'),
    ("- a\n  more\n- b\nlazy", '<ul><li class="">a\nmore</li><li class="">b\nlazy</li></ul>'),
    ("1.\ta\n2.\tb", '<ol><li class="">a</li><li class="">b</li></ol>'),
    ("- a\n\n  b\n- c", '<ul><li class=""><p>a</p><p>b</p></li><li class=""><p>c</p></li></ul>'),
    ("- a\n\n  > b\n  >\n  > c", '<ul><li class=""><p>a</p><blockquote><p>b</p><p>c</p></blockquote></li></ul>'),
    ("1. a\n   - b\n\n     c", '<ol><li class="">a<ul><li class=""><p>b</p><p>c</p></li></ul></li></ol>'),
    ("- a\n  - b\n\n  c", '<ul><li class=""><p>a</p><ul><li class="">b</li></ul><p>c</p></li></ul>'),
    ("- [x] a\n\n- [ ] b", '<ul><li class="task"><p>☑ a</p></li><li class="task"><p>☐ b</p></li></ul>'),
    ("имя_файла_здесь été_à_Paris", "<p>имя_файла_здесь été_à_Paris</p>"),
    ("नमस्ते_दुनिया_है 𐐀_𐐁_𐐂 (_é_)", "<p>नमस्ते_दुनिया_है 𐐀_𐐁_𐐂 (<em>é</em>)</p>"),
    (r"\(a_1*b*\) costs $5 or $6", '<p><span class="math">a_1*b*</span> costs $5 or $6</p>'),
    ("| a |\nnot a table", "<p>| a |\nnot a table</p>"),
]


@pytest.mark.parametrize(("text", "html"), RENDERED)
def test_markdown_becomes_these_elements(render, text, html):
    assert render(text)["html"] == html


def test_colors_leave_the_code_as_it_is(render):
    code = "def f(x):\n    return \"a # b\" + 'c' * 12  # <done>\n"
    html = render(f"```python\n{code}\n```")["html"]
    shown = re.sub("<[^>]*>", "", html.partition("<code>")[2].partition("</code>")[0])
    assert shown.replace("&lt;", "<").replace("&gt;", ">") == code
    for kind, text in [("keyword", "def"), ("call", "f"), ("string", '"a # b"'), ("number", "12")]:
        assert f'<span class="code-{kind}">{text}</span>' in html


def test_keywords_and_numbers_within_names_of_other_alphabets_stay_plain(render):
    assert render("```python\néif = é12 + été#x\n```")["html"].endswith("<code>éif = é12 + été#x</code></pre></div>")


def test_hostile_markdown_stays_text(page, api):
    outside = []
    page.on("request", lambda request: None if request.url.startswith(api.url) else outside.append(request.url))
    api.scripts.append(Script([{"reasoning_content": HOSTILE}, HOSTILE]))
    send(page, HOSTILE)
    expect(page.locator(".stats")).not_to_be_empty()
    page.locator(".thinking summary").click()
    expect(page.get_by_text("window.hacked = 1").last).to_be_visible()
    for node in page.locator(".message a, .message b, .answer span[title]").all():
        node.dispatch_event("mouseover")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".message :is(script, img, iframe, style, b, object, embed)").count() == 0
    assert (
        page.locator(".message [onclick], .message [onerror], .message [onload], .message [onmouseover]").count() == 0
    )
    links = page.locator(".message a").evaluate_all("nodes => nodes.map(node => node.href)")
    assert all(link.startswith("https://outside.example/") for link in links)
    assert not outside


PATHOLOGICAL = ["*a* ", "*a ", "**a", "_*", "~~a", "[", "](", "[a](", "`", "``a`", "<", "http://a)", "$$"]
PATHOLOGICAL += ["> ", "- ", "  - a\n", "|", "|a\n|-\n", "\\[\n", "a\n", "```\n"]


@pytest.mark.parametrize("unit", PATHOLOGICAL)
def test_pathological_markdown_is_rendered(render, unit):
    assert render(unit * (200_000 // len(unit)))["num_elements"] > 0


def test_pathological_code_is_highlighted(render):
    code = "'a\\" * 30_000
    assert render(f"```python\n{code}\n```")["num_elements"] > 0


FAILURES = [
    (Script(status=429, retry_after=7), "The server is busy: too many requests are waiting. Try again in 7 seconds."),
    (Script(status=503, message="the engine failed"), "The server cannot answer now: the engine failed"),
    (Script(status=400, message="temperature is 9; use 0 to 2"), "refused the request: temperature is 9; use 0 to 2"),
    (Script(status=500, message="internal"), "The server failed (status 500): internal"),
    (Script(["half"], ends_early=True), "The connection was lost before the answer was complete."),
]


@pytest.mark.parametrize(("script", "words"), FAILURES, ids=["429", "503", "400", "500", "cut"])
def test_failure_is_shown_in_words_and_can_be_tried_again(page, api, script, words):
    api.scripts.append(script)
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text(words)
    expect(page.get_by_role("status")).to_contain_text(words)
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("An answer.")
    expect(page.locator(".problem")).to_be_hidden()
    assert api.requests[1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_question_without_an_answer_is_part_of_the_next_one(page, api):
    """Many chat templates refuse two questions in a row."""
    api.scripts.append(Script(status=500))
    send(page, "First")
    expect(page.locator(".problem")).to_be_visible()
    wait_until_idle(page)
    send(page, "Second")
    expect(answers(page).last).to_have_text("An answer.")
    assert api.requests[1]["messages"] == [{"role": "user", "content": "First\n\nSecond"}]


def test_failed_answer_is_no_version_after_a_new_one(page, api):
    api.scripts += [Script(["old"]), Script(status=500), Script(["new"])]
    send(page, "Hi")
    expect(answers(page)).to_have_text("old")
    page.get_by_role("button", name="Regenerate answer").click()
    expect(page.locator(".assistant .versions")).to_have_text("2 / 2")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("new")
    expect(page.locator(".assistant .versions")).to_have_text("2 / 2")
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text("old")


def test_unreachable_server_is_shown_in_words(page):
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text("The server cannot be reached.")


def test_server_that_comes_back_answers_without_a_reload(open_page, api):
    api.models_status = 503
    page = open_page()
    expect(page.locator("#banner")).to_contain_text("The server cannot answer now: the model is loading")
    api.models_status = 200
    send(page, "Hi")
    expect(answers(page)).to_have_text("An answer.")
    expect(page.locator("#banner")).to_be_hidden()
    assert api.requests[0]["model"] == "tiny-model"


def test_missing_key_is_asked_for_and_then_kept(open_page, api):
    api.wanted_key = "secret"
    page = open_page()
    expect(page.locator("#banner")).to_contain_text("The server wants an API key.")
    page.get_by_role("button", name="Enter the key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model option")).to_have_text(["tiny-model", "other-model"])
    expect(page.locator("#banner")).to_be_hidden()
    page.reload()
    send(page, "Hi")
    expect(answers(page)).to_have_text("An answer.")
    assert api.keys == ["Bearer secret"]


def test_key_that_no_header_carries_is_explained_in_the_dialog(page, api):
    page.get_by_role("button", name="Settings").click()
    key = page.get_by_label("API key")
    key.fill("abc\u200bdef")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    words = "The API key has a character that cannot be sent (U+200B)."
    assert words in key.evaluate("field => field.validationMessage")
    key.fill("abcdéf")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_hidden()
    send(page, "Hi")
    expect(answers(page)).to_have_text("An answer.")
    assert api.keys == ["Bearer abcdéf"]


def test_stored_key_that_no_header_carries_is_explained(page):
    page.evaluate("localStorage.setItem('nanovllm.settings', JSON.stringify({apiKey: '“abc”'}))")
    page.reload()
    expect(page.locator("#banner")).to_contain_text("The API key has a character that cannot be sent (U+201C).")
    send(page, "Hi")
    expect(page.locator(".problem")).to_contain_text("The API key has a character that cannot be sent (U+201C).")
    page.get_by_role("button", name="Enter the key").click()
    expect(page.get_by_label("API key")).to_be_focused()


@pytest.mark.parametrize(("label", "value"), [("Temperature", "5"), ("API key", "a\u200b")])
def test_invalid_setting_is_gone_when_the_dialog_is_closed(page, label, value):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(label).fill(value)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label(label)).to_have_value("")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_hidden()


def test_settings_of_two_tabs_are_both_kept(page, api):
    other = open_tab(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    other.get_by_label("Model", exact=True).select_option("other-model")
    other.get_by_role("button", name="Settings").click()
    expect(other.get_by_label("System prompt")).to_have_value("Be brief.")
    other.get_by_label("Temperature").fill("0.5")
    other.get_by_role("button", name="Done").click()
    other.reload()
    send(other, "Hi")
    expect(answers(other)).to_have_text("An answer.")
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-model")
    [request] = api.requests
    assert request["messages"][0]["content"] == "Be brief."
    assert (request["temperature"], request["model"]) == (0.5, "other-model")


def test_questions_of_tabs_that_do_not_hear_of_each_other_are_both_kept(page, api):
    page.context.add_init_script("window.BroadcastChannel = class { postMessage() {} }")
    page.reload()
    api.scripts += [Script([text]) for text in ("one", "two", "three")]
    send(page, "First")
    expect(answers(page)).to_have_text(["one"])
    wait_until_idle(page)
    other = open_tab(page)
    send(page, "From here")
    expect(answers(page)).to_have_text(["one", "two"])
    wait_until_idle(page)
    send(other, "From there")
    expect(answers(other)).to_have_text(["one", "three"])
    wait_until_idle(other)
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["First", "From there"])
    expect(answers(page)).to_have_text(["one", "three"])
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".bubble")).to_have_text(["First", "From here"])
    expect(answers(page)).to_have_text(["one", "two"])


def test_tab_shows_what_happens_to_its_conversation_in_another_tab(page, api):
    api.scripts += [Script([text]) for text in ("one", "two", "three")]
    send(page, "First")
    expect(answers(page)).to_have_text(["one"])
    wait_until_idle(page)
    other = open_tab(page)
    send(page, "Second")
    expect(answers(other)).to_have_text(["one", "two"])
    send(other, "Third")
    expect(page.locator(".bubble")).to_have_text(["First", "Second", "Third"])
    expect(answers(page)).to_have_text(["one", "two", "three"])
    texts = [message["content"] for message in api.requests[2]["messages"]]
    assert texts == ["First", "one", "Second", "two", "Third"]
    other.get_by_role("button", name="Rename First").click()
    other.get_by_label("Title of the conversation").fill("Numbers")
    other.keyboard.press("Enter")
    link = page.get_by_role("link", name="Numbers", exact=True)
    expect(link).to_be_visible()
    page.get_by_role("button", name="Delete Numbers").click()
    page.get_by_role("button", name="Undo").click()
    other.get_by_role("link", name="Numbers", exact=True).click()
    expect(answers(other)).to_have_text(["one", "two", "three"])
    page.get_by_role("button", name="Delete Numbers").click()
    expect(other.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    expect(other.locator("#conversations a")).to_have_count(0)


def test_answer_that_another_tab_receives_is_incomplete_until_it_ends(page, api):
    api.scripts.append(Script(["Hello", " there"], hold_after=1))
    send(page, "Hi")
    expect(answers(page)).to_have_text("Hello")
    other = open_tab(page)
    expect(other.locator(".stats")).to_have_text("Incomplete")
    expect(other.get_by_role("button", name="Stop")).to_be_hidden()
    send(other, "Meanwhile")
    expect(answers(other).last).to_have_text("An answer.")
    wait_until_idle(other)
    api.released.set()
    for tab in page, other:
        expect(answers(tab)).to_have_text(["Hello there", "An answer."])
    expect(other.locator(".stats").first).to_contain_text("2 tokens")


def test_conversation_of_an_older_page_is_continued(page, api):
    page.evaluate(
        """(nodes) => new Promise((resolve) => {
            indexedDB.open("nanovllm").onsuccess = ({ target: { result } }) => {
                const old = { id: "old", title: "Old", updated: Date.now(), leaf: 1, nodes };
                const change = result.transaction("conversations", "readwrite");
                change.objectStore("conversations").put(old);
                change.oncomplete = resolve;
            };
        })""",
        [
            {"role": "user", "text": "First", "index": 0, "parent": -1},
            {"role": "assistant", "state": "done", "text": "one", "thinking": "", "calls": [], "index": 1, "parent": 0},
        ],
    )
    page.reload()
    page.get_by_role("link", name="Old", exact=True).click()
    expect(answers(page)).to_have_text(["one"])
    send(page, "Second")
    expect(answers(page)).to_have_text(["one", "An answer."])
    wait_until_idle(page)
    page.reload()
    expect(page.locator(".bubble")).to_have_text(["First", "Second"])
    expect(answers(page)).to_have_text(["one", "An answer."])
    assert [message["content"] for message in api.requests[0]["messages"]] == ["First", "one", "Second"]


def open_tab(page: Page) -> Page:
    """Open the address of `page` in another tab of the same browser profile."""
    tab = page.context.new_page()
    tab.goto(page.url)
    tab.wait_for_selector("body[data-ready]")
    return tab


def test_dark_mode_follows_the_system_and_can_be_switched(open_page):
    page = open_page(color_scheme="dark")
    brightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(brightness) < 60
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate(brightness) > 200
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(brightness) > 200


def test_mobile_width_fits_and_its_list_opens_and_closes(open_page, api):
    page = open_page(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    api.scripts.append(Script([MARKDOWN, "\n\n", "long" * 80, "\n\n| a | b |\n|---|---|\n| ", "cell " * 60, " | x |"]))
    send(page, "Hi")
    expect(page.locator(".stats")).not_to_be_empty()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
    expect(page.locator("#conversations")).not_to_be_in_viewport()
    page.get_by_role("button", name="Show conversations").click()
    expect(page.get_by_role("link", name="Hi")).to_be_in_viewport()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#conversations")).not_to_be_in_viewport()
    expect(page.get_by_role("heading", name="What would you like to know?")).to_be_in_viewport()


def test_keyboard_alone_is_enough(page, api):
    api.scripts += [Script(["one"]), Script(["two"]), Script(["three"])]
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("line 1")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line 2")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("one")
    wait_until_idle(page)
    assert api.requests[0]["messages"][0]["content"] == "line 1\nline 2"
    press_tab_until(page, "Regenerate answer", back=True)
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("two")
    wait_until_idle(page)
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("edited")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("three")
    assert api.requests[2]["messages"][0]["content"] == "edited"
    wait_until_idle(page)
    press_tab_until(page, "Settings", back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    press_tab_until(page, "Delete line 1", back=True)
    page.keyboard.press("Enter")
    expect(page.locator("#conversations a")).to_have_count(0)


def press_tab_until(page: Page, label: str, back: bool) -> None:
    """Move the focus with the Tab key until it is on the control with this label."""
    for _ in range(40):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == label:
            return
    pytest.fail(f"Tab does not reach {label}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, api, scheme):
    page = open_page(color_scheme=scheme)
    call = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": "{}"}}]}
    api.scripts += [Script([{"reasoning_content": "Hm."}, MARKDOWN]), Script(status=429), Script([call])]
    assert_accessible(page)
    send(page, "Hi")
    expect(page.locator(".stats")).not_to_be_empty()
    wait_until_idle(page)
    page.locator(".thinking summary").click()
    assert_accessible(page)
    send(page, "Again")
    expect(page.locator(".problem:visible")).to_be_visible()
    assert_accessible(page)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Result of look")).to_be_visible()
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit message").first.click()
    assert_accessible(page)
    page.get_by_role("button", name="Settings").click()
    assert_accessible(page)


def assert_accessible(page: Page) -> None:
    findings = Axe().run(page).response["violations"]
    serious = [f for f in findings if f["impact"] in ("serious", "critical")]
    assert not serious, [(f["id"], [node["html"] for node in f["nodes"]]) for f in serious]


def test_axe_finds_nothing_serious_on_a_narrow_screen(open_page, api):
    page = open_page(viewport={"width": 360, "height": 700}, has_touch=True)
    send(page, "Hi")
    expect(page.locator(".stats")).not_to_be_empty()
    assert_accessible(page)
    page.get_by_role("button", name="Show conversations").click()
    assert_accessible(page)


FILES = [("", "text/html"), ("page/chat.js", "text/javascript"), ("page/style.css", "text/css")]


@pytest.mark.parametrize(("path", "kind"), FILES)
def test_files_have_types_and_a_strict_policy(api, path, kind):
    response = httpx.get(api.url + path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{kind}; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    again = httpx.get(api.url + path, headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("path", ["page/nothing.js", "page/../page.py", "page/%2e%2e/page.py", "page/"])
def test_other_files_are_not_served(api, path):
    assert httpx.get(api.url + path).status_code == 404
