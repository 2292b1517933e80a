"""Take the screenshots of the chat page in `docs/`: `python -m tests.clients.page_screenshots`."""

import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.clients.scripted_api import Script, ScriptedApi, serve_scripts

THINKING = "The user wants the idea and the cost. I show the formula for the size and a short example in Python."

ANSWER = """A **KV cache** keeps the keys and values of every token that the model has read. Each new token then needs \
attention over the cache, but no second pass over the prompt.

| | without a cache | with a cache |
|---|---|---|
| work for token *n* | all *n* tokens again | one token |
| memory | none | grows by one token a step |

The cache of one token takes `2 × layers × kv_heads × head_dim` numbers:

```python
def cache_bytes(tokens, layers=28, kv_heads=8, head_dim=128):
    # Keys and values, two bytes each in bfloat16.
    return 2 * layers * kv_heads * head_dim * 2 * tokens

print(cache_bytes(32_768) / 2**30)  # 3.5 GiB
```

So long contexts cost memory rather than time. *Paged* caches keep it in small blocks, and \
prompts with the same start share them.
"""

EARLIER = ["Name ideas for a small bakery", "Regular expression for ISO dates", "Translate a letter into French"]


def ask(page: Page, api: ScriptedApi, text: str, pieces: list) -> None:
    api.scripts.append(Script(pieces, pause=0.012))
    page.fill("#input", text)
    page.click("#send")
    page.wait_for_selector(".assistant:last-child .stats:not(:empty)")


def converse(page: Page, api: ScriptedApi) -> None:
    for text in EARLIER:
        ask(page, api, text, ["Here you are."])
        page.evaluate("document.getElementById('new-chat').click()")
    thinking = [{"reasoning_content": piece} for piece in THINKING.split(" ")]
    ask(page, api, "What does a KV cache cost, and what does it save?", thinking + re.findall(r"\s*\S+", ANSWER))


def take(browser: Browser, api: ScriptedApi, file: Path, width: int, height: int, scheme: str, scale: float) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        device_scale_factor=scale,
        has_touch=width < 800,
    )
    page = context.new_page()
    page.goto(api.url)
    page.wait_for_selector("body[data-ready]")
    converse(page, api)
    page.wait_for_timeout(300)
    page.screenshot(path=file)
    context.close()


def main(folder: Path) -> None:
    with serve_scripts() as api, sync_playwright() as playwright:
        api.models = ["Qwen/Qwen3-0.6B"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        take(browser, api, folder / "chat-page-light.png", 1200, 860, "light", 1)
        take(browser, api, folder / "chat-page-dark.png", 1200, 860, "dark", 1)
        take(browser, api, folder / "chat-page-mobile.png", 390, 844, "light", 1.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
