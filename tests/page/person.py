"""What a person does with the page, and sees of it."""

import json

# Expressions of the page's state.
BUSY = "document.getElementById('send').textContent === 'Stop'"
TURNS = "document.querySelectorAll('.turn').length"
BODIES = "[...document.querySelectorAll('.turn .body')].map(e => e.innerHTML)"
TITLES = "[...document.querySelectorAll('#list .open')].map(e => e.textContent)"
FOCUS = "(e => e.id || e.textContent.slice(0, 40) || e.tagName)(document.activeElement)"


class Page:
    """The page in a browser, with what a person does to it."""

    def __init__(self, browser, url):
        self.browser, self.url, self.js = browser, url, browser.evaluate

    def open(self):
        self.browser.open(self.url)
        self.browser.wait("document.getElementById('input').placeholder !== ''")

    def type(self, text):
        self.js("document.getElementById('input').focus()")
        self.browser.type(text)

    def send(self, text, wait=True):
        before = self.js(TURNS)
        self.type(text)
        self.browser.press("Enter")
        self.browser.wait(f"{TURNS} >= {before + 2}")
        if wait:
            self.idle()

    def idle(self):
        self.browser.wait(f"!({BUSY})", 120)

    def last(self):
        return self.js("document.querySelector('.turn:last-child .body').textContent")

    def notice(self):
        return self.js("document.querySelector('.turn:last-child .notice')?.textContent ?? ''")

    def act(self, turn, name):
        """Presses a button below a message; turns count from 0."""
        found = self.js(
            f"(() => {{ const b = [...document.querySelectorAll('.turn')[{turn}].querySelectorAll('button')].find(b => b.ariaLabel === {json.dumps(name)} "
            f"|| b.textContent === {json.dumps(name)}); b?.click(); return !!b; }})()"
        )
        assert found, f"no button {name} in message {turn}"

    def fresh(self):
        self.browser.press("n", "alt")
        self.browser.wait(f"{TURNS} === 0")

    def sideways(self):
        """What is wider than the window: the document, or an element that nothing scrolls or cuts."""
        return self.js(
            "document.documentElement.scrollWidth > innerWidth ? 'document' : [...document.querySelectorAll('#log, #turns, #welcome, #side, dialog[open]')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id).join()"
        )


def wait_stored(page):
    """Waits until the database has what the page shows: a transaction that follows has ended."""
    page.js("store.run('readonly', s => s.count())")
