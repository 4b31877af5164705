"""Checks with the mock, which decides what the model says and what goes wrong."""

import json
import time

import mock
from person import BODIES, BUSY, TURNS, wait_stored

ELEMENTS = set("A BLOCKQUOTE BR BUTTON CODE DIV EM H3 H4 H5 H6 HR LI OL P PRE S SPAN STRONG TABLE TBODY TD TH THEAD TR UL".split())
ATTRIBUTES = {"aria-label", "class", "href", "rel", "role", "start", "tabindex", "target", "title", "type"}


def check_elements(page):
    found = page.js(
        "[...document.querySelectorAll('.answer .body *, .thought > div *')].map(e => [e.tagName, e.getAttributeNames(), e.href ?? ''])"
    )
    for tag, attributes, href in found:
        assert tag in ELEMENTS, f"the text of a model has made an element {tag}"
        assert set(attributes) <= ATTRIBUTES, f"{tag} has attributes {attributes}"
        assert not href or href.startswith(("https://example.invalid/", "mailto:a@example.invalid")), f"a link leads to {href}"
    return found


def hostile_text(page):
    for name in ("hostile", "deep", "table"):
        page.fresh()
        page.send(name)
        check_elements(page)
        assert page.js("window.broken") is None
        assert page.last().strip()
        depth = page.js("Math.max(...[...document.querySelectorAll('.answer .body *')].map(e => { let n = 0; for (; e; e = e.parentElement) n++; return n; }))")
        assert depth < 60, f"elements are nested {depth} deep"
        assert not page.sideways(), page.sideways()
    page.fresh()
    page.send("hostile")
    links = page.js("[...document.querySelectorAll('.answer .body a')].map(a => [a.textContent, a.getAttribute('rel')])")
    assert {"good", "image"} <= {text for text, _ in links} and not [text for text, _ in links if text == "bad"]
    assert all("noopener" in rel for _, rel in links)
    # What a person writes, a title and a system prompt are text too.
    page.fresh()
    page.send("<img src=x onerror=window.broken=1>")
    assert page.js("window.broken") is None and page.js("document.querySelector('img')") is None


def markdown(page):
    page.fresh()
    page.send("words")
    cases = [
        ("# Title\n\n###### Small", "<h3>Title</h3><h6>Small</h6>"),
        ("a *b* __c__ ***d*** ~~e~~ `f` snake_case_name 2 * 3", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <s>e</s> <code>f</code> snake_case_name 2 * 3</p>"),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("> a\n> > b\n\n---", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>"),
        ("text:\n- a\n\n1. x\n   ```\n   code\n   ```", "<p>text:</p><ul><li>a</li></ul>"),
        ("a  \nb\\*c", "<p>a<br>b*c</p>"),
        ("*open **bold", "<p>*open **bold</p>"),
        ("` a ` https://example.invalid/a_b_(c)_*d*.", '<p><code>a</code> <a href="https://example.invalid/a_b_(c)_*d" title='),
        ("**`a`**: b", "<p><strong><code>a</code></strong>: b</p>"),
    ]
    for text, html in cases:
        got = page.js(f"(() => {{ const e = document.createElement('div'); fill(e, {json.dumps(text)}.split('\\n'), 0); return e.innerHTML; }})()")
        assert got.startswith(html), f"{text!r} became {got!r}, not {html!r}"
    table = page.js("(() => { const e = document.createElement('div'); fill(e, ['| a | b |', '|---|--:|', '| `x\\\\|y` | 2 |'], 0); return e.querySelector('table').innerHTML; })()")
    assert '<code>x|y</code>' in table and '<td class="end">2</td>' in table, table


def grows_as_it_would_be_read(page):
    """A text shown piece by piece has the same elements as the text shown at once."""
    for name in ("long", "hostile", "deep"):
        page.fresh()
        page.send(name)
        streamed = page.js(BODIES)
        wait_stored(page)
        page.open()
        assert page.js(BODIES) == streamed, f"{name} looks different after a reload"
    same = page.js(f"""(() => {{
        const text = {json.dumps(mock.LONG[:4000] + mock.HOSTILE)}, one = document.createElement('div'), two = document.createElement('div');
        const grown = new Markdown(one, () => {{}});
        for (let i = 0; i <= text.length; i++) grown.show(text.slice(0, i));
        new Markdown(two, () => {{}}).show(text);
        return one.innerHTML === two.innerHTML;
    }})()""")
    assert same, "a text that arrives by characters looks different"


def streams_and_stops(page):
    page.fresh()
    mock.Mock.gone = False
    page.send("slow", wait=False)
    page.browser.wait("document.querySelector('.turn:last-child .body').textContent.includes('word5')")
    assert page.js(BUSY)
    short = len(page.last())
    page.browser.wait(f"document.querySelector('.turn:last-child .body').textContent.length > {short}")
    # Another conversation meanwhile, and back.
    page.fresh()
    page.send("words")
    page.browser.press("ArrowDown", "alt")
    assert page.js(BUSY)
    page.browser.press("Escape")
    page.browser.wait(f"!({BUSY})")
    assert page.notice() == "Stopped." and "word5" in page.last()
    end = time.monotonic() + 10
    while not mock.Mock.gone:
        assert time.monotonic() < end, "the server still writes"
        time.sleep(0.05)
    # A page that closes in the middle keeps what has arrived.
    page.fresh()
    page.send("slow", wait=False)
    page.browser.wait("document.querySelector('.turn:last-child .body').textContent.includes('word100 ')")
    page.open()
    assert "word5" in page.last() and "connection broke" in page.notice()


def reasoning(page):
    page.fresh()
    page.send("think")
    assert page.js("document.querySelector('details.thought').open") is False
    assert page.js("document.querySelector('.thought > div').innerHTML") == "<p>Let me think about <strong>this</strong> carefully.</p>"
    assert "think about" not in page.last()
    page.send("after")
    assert [m["content"] for m in mock.Mock.seen[-1]["messages"]][1] == "You said: think\n\nMessages: 1."


def screen_reader(page):
    page.fresh()
    page.js("document.getElementById('spoken').replaceChildren()")
    page.send("long")
    # Finished blocks are read, and the log does not grow without limit.
    spoken = page.js("[...document.getElementById('spoken').children].map(e => e.textContent)")
    assert 10 < len(spoken) <= 51 and "Code, 3 lines." in spoken and "Part 149" in spoken, spoken[-5:]
    assert page.js("document.getElementById('said').textContent") == "The answer is complete."
    assert page.js("document.getElementById('log').getAttribute('aria-live')") is None
    unnamed = page.js(
        "[...document.querySelectorAll('button, input, textarea, select')].filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim() || !e.offsetWidth)).map(e => e.outerHTML)"
    )
    assert not unnamed, unnamed


def errors(page):
    page.fresh()
    for command, words in (("429", "busy"), ("503", "cannot answer yet")):
        mock.Mock.refused.clear()
        page.send(command, wait=False)
        page.browser.wait(f"document.querySelector('.turn:last-child .notice')?.textContent.includes('{words}')")
        page.act(page.js(TURNS) - 1, "Try now")
        page.idle()
        assert page.last().startswith(f"You said: {command}") and not page.notice()
    page.send("cut")
    assert "connection broke" in page.notice() and page.last().startswith("You said")
    page.send("context")
    assert "no longer fits" in page.notice() and "2048" in page.notice()
    page.act(page.js(TURNS) - 1, "Leave out the oldest messages")
    page.browser.wait("document.querySelectorAll('.divider:not([hidden])').length === 1")
    page.idle()
    while "no longer fits" in page.notice():
        page.act(page.js(TURNS) - 1, "Leave out the oldest messages")
        page.idle()
    assert page.last().startswith("You said: context"), page.last()
    assert len(mock.Mock.seen[-1]["messages"]) == 1


def api_key(page):
    page.fresh()
    page.send("401", wait=False)
    for key in ("wrong", mock.KEY):
        page.browser.wait("document.getElementById('ask').open")
        page.browser.type(key)
        page.browser.press("Enter")
        page.browser.wait("!document.getElementById('ask').open || document.getElementById('askInput').value === ''")
    page.idle()
    assert page.last().startswith("You said: 401")
    assert page.js("Object.values(localStorage).concat(document.documentElement.outerHTML).join().includes('mock-key')") is False


def settings_reach_the_server(page):
    page.fresh()
    page.browser.press("o", "alt")
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repeat_penalty": 1.1, "max_tokens": 77, "seed": 1234}
    for name, value in [("system", "Be <b>brief</b>."), *values.items()]:
        page.js(f"document.getElementById('f-{name}').focus()")
        page.browser.type(str(value))
    page.browser.press("Escape")
    page.send("words")
    body = mock.Mock.seen[-1]
    assert {name: body[name] for name in values} == values
    assert body["messages"][0] == {"role": "system", "content": "Be <b>brief</b>."}
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    # A wrong value is named and not sent; new conversations start with the same settings.
    page.fresh()
    page.browser.press("o", "alt")
    assert page.js("document.getElementById('f-top_k').value") == "20"
    page.js("document.getElementById('f-top_p').select()")
    page.browser.type("7")
    assert page.js("document.getElementById('f-top_p').ariaInvalid") == "true" and "Not used" in page.js("document.getElementById('h-top_p').textContent")
    page.browser.press("Escape")
    page.send("words")
    assert "top_p" not in mock.Mock.seen[-1]
    page.browser.press("o", "alt")
    page.browser.click("#reset")
    page.browser.press("Escape")


def without_template(page):
    mock.Mock.info = {**mock.INFO, "has_template": False, "quality": None}
    try:
        page.open()
        page.fresh()
        assert "continues your text" in page.js("document.getElementById('welcome').textContent")
        assert "not measured" in page.js("document.getElementById('welcome').textContent")
        page.send("Once upon a time")
        assert mock.Mock.seen[-1]["prompt"] == "Once upon a time" and page.last()
    finally:
        mock.Mock.info = mock.INFO
    page.open()


def several_models(page):
    mock.Mock.models = ["mock-7b", "a-model-with-a-rather-long-name-of-its-own"]
    try:
        page.open()
        page.fresh()
        page.js("(m => { m.selectedIndex = 1; m.onchange(); })(document.getElementById('model'))")
        page.browser.wait("document.querySelector('#welcome h2')?.textContent.startsWith('a-model')")
        page.send("words")
        assert mock.Mock.seen[-1]["model"] == mock.Mock.models[1]
        assert page.js("document.querySelector('.answer h2').textContent") == mock.Mock.models[1]
        page.browser.resize(360, 640, touch=True)
        assert not page.sideways(), page.sideways()
    finally:
        page.browser.resize(1200, 800)
        mock.Mock.models = [mock.INFO["name"]]
    page.open()


def network_loss(page):
    page.fresh()
    mock.Mock.down = True
    page.send("nobody answers")
    assert "does not answer" in page.notice(), page.notice()
    mock.Mock.down = False
    page.act(1, "Try again")
    page.browser.wait("document.querySelector('.turn:last-child .body').textContent.startsWith('You said')")
    # A page that opens before the server is there shows the figures once it is.
    page.idle()
    mock.Mock.loading = 1
    page.open()
    page.fresh()
    assert "bits for each" in page.js("document.getElementById('welcome').textContent")


WITH_MOCK = [
    hostile_text, markdown, grows_as_it_would_be_read, streams_and_stops, reasoning, screen_reader, errors, api_key, settings_reach_the_server,
    without_template, several_models, network_loss,
]
