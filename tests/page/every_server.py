"""Checks that any server with any model passes: none depends on what the model says."""

import json
import re
import tempfile
import time
from pathlib import Path

from person import BODIES, BUSY, FOCUS, TITLES, TURNS, wait_stored


def figures_of_the_file(page):
    text = page.js("document.getElementById('welcome').innerText")
    assert re.search(r"takes \d+\.\d\d bits for each of its [\d.]+ (thousand|million|billion) parameters", text), text
    for word in ("Quality", "Size", "Memory", "Context"):
        assert word in text, f"{word} is missing: {text}"
    assert "bits" in page.js("document.getElementById('fileButton').innerText")


def answers(page):
    page.fresh()
    page.send("Tell me a story about a dog.")
    assert page.js(TURNS) == 2 and page.last(), "no answer"
    figures = page.js("document.querySelector('.figures').textContent")
    assert re.fullmatch(r"[\d,]+ tokens?, [\d.e+]+ tokens/s, seed \d+", figures), figures
    assert "of context" in page.js("document.getElementById('context').textContent")
    page.send("And a cat?")
    assert page.js(TURNS) == 4


def stops(page):
    page.fresh()
    page.send("Tell me a long story.", wait=False)
    page.browser.press("Escape")
    page.idle()
    note = page.notice()
    # A small model may have finished before the key arrives.
    assert note == "Stopped." or page.js("document.querySelector('.figures') !== null"), note


def regenerates(page):
    page.fresh()
    page.send("Once more, please.")
    first = page.js(BODIES)
    page.act(1, "Regenerate")
    page.browser.wait(BUSY + " || document.querySelectorAll('.figures').length")
    page.idle()
    assert "2 of 2" in page.js("document.querySelectorAll('.acts')[1].textContent")
    page.act(1, "Previous version")
    assert page.js(BODIES) == first, "the first answer has changed"
    assert page.js("document.activeElement.ariaLabel") == "Next version", "the focus is lost"


def edits(page):
    page.fresh()
    page.send("A queston with a mistake")
    first = page.js(BODIES)
    page.act(0, "Edit")
    page.js("document.querySelector('.edit textarea').value = 'A question without one'")
    page.browser.press("Enter", "ctrl")
    page.browser.wait("document.querySelector('.turn .body')?.textContent === 'A question without one'")
    page.idle()
    assert page.js(TURNS) == 2
    page.act(0, "Previous version")
    assert page.js(BODIES) == first
    page.act(1, "Edit")
    page.js("document.querySelector('.edit textarea').value = '**My** answer'")
    page.act(1, "Keep")
    assert page.js("document.querySelectorAll('.turn .body')[1].innerHTML") == "<p><strong>My</strong> answer</p>"
    assert "edited by you" in page.js("document.querySelectorAll('.acts')[1].textContent")


def keeps_conversations(page):
    page.fresh()
    page.send("The first of two")
    first = page.js(BODIES)
    page.fresh()
    page.send("The second of two")
    second = page.js(BODIES)
    assert page.js(TITLES)[:2] == ["The second of two", "The first of two"]
    page.browser.press("ArrowDown", "alt")
    assert page.js(BODIES) == first
    page.browser.press("ArrowUp", "alt")
    assert page.js(BODIES) == second
    titles = page.js(TITLES)
    wait_stored(page)
    page.open()
    assert page.js(TITLES) == titles and page.js(BODIES) == second, "a reload has lost something"


def renames_and_deletes(page):
    page.fresh()
    page.send("To be renamed")
    count = len(page.js(TITLES))
    page.browser.click("#list .current .small", 0)
    page.browser.type("Another name")
    page.browser.press("Enter")
    page.browser.wait(f"({TITLES}).includes('Another name')")
    page.browser.click("#list .current .small", 1)
    assert page.js("document.activeElement.id") == "askNo", "a stray key must not delete"
    page.browser.click("#askYes")
    page.browser.wait(f"({TITLES}).length === {count - 1}")
    wait_stored(page)
    page.open()
    assert "Another name" not in page.js(TITLES)


def import_file(page, data):
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        file.write(data if isinstance(data, str) else json.dumps(data))
    page.browser.choose_file("#importFile", file.name)
    return file.name


def exports_and_imports(page):
    page.fresh()
    page.send("To be exported")
    bodies, count = page.js(BODIES), len(page.js(TITLES))
    page.browser.click("#exportAll")
    folder, end = Path(page.browser.downloads), time.monotonic() + 20
    while not (files := list(folder.glob("stb-conversations-*.json"))):
        assert time.monotonic() < end, "no file was downloaded"
        time.sleep(0.05)
    data = json.loads(files[0].read_text())
    assert len(data["conversations"]) == count
    files[0].unlink()
    import_file(page, data)
    page.browser.wait(f"({TITLES}).length === {2 * count}")
    page.browser.click("#list li:not(.current) .open", 0)
    page.browser.wait(f"JSON.stringify({BODIES}) === {json.dumps(json.dumps(bodies, ensure_ascii=False, separators=(',', ':')))}")
    one = data["conversations"][0]
    node = {"up": -1, "role": "user", "text": "x", "thought": "", "picked": -1}
    wrong = [
        ("no JSON", "not JSON"), ([], "not an export"), ({**data, "version": 2}, "version 1"),
        *(
            ({**data, "conversations": [{**one, **change}]}, message)
            for change, message in [
                ({"title": 5}, "title is not a text"), ({"nodes": "x"}, "nodes is not a list"), ({"sampling": {"top_p": 3}}, "top_p is out of range"),
                ({"nodes": [{**node, "up": 0}]}, "follows no earlier message"), ({"nodes": [{**node, "up": 1e99}]}, "follows no earlier message"),
                ({"nodes": [{**node, "role": "system"}]}, "should have the role user"), ({"nodes": [None]}, "message 1 is not an object"),
                ({"nodes": [{**node, "text": {}}]}, "message 1 is not a text"),
            ]
        ),
    ]
    for bad, message in wrong:
        import_file(page, bad)
        page.browser.wait("document.getElementById('ask').open")
        said = page.js("document.getElementById('askText').textContent")
        assert message in said, f"{said!r} should contain {message!r}"
        page.browser.press("Escape")
        page.browser.wait("document.getElementById('importFile').value === ''")
    assert len(page.js(TITLES)) == 2 * count, "a broken file has left something"


def keyboard(page):
    page.fresh()
    page.send("By keyboard alone")
    # Each stop of the Tab key is visible and has a name.
    page.js("document.getElementById('new').focus()")
    names = []
    for _ in range(100):
        name, label, visible = page.js(
            "(e => [e.id || e.className || e.tagName, (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || '').trim(), e.getBoundingClientRect().width > 0])"
            "(document.activeElement)"
        )
        if name == "BODY":
            break
        assert label and visible, f"Tab stops at something without a name, or invisible: {name}"
        names.append(name)
        page.browser.press("Tab")
    for name in ("new", "exportAll", "importButton", "theme", "keysButton", "fileButton", "settingsButton", "log", "input", "send"):
        assert name in names, f"Tab does not reach {name}: {names}"
    assert names.index("new") < names.index("settingsButton") < names.index("log") < names.index("input") < names.index("send")
    for key, dialog in (("k", "keys"), ("o", "settings"), ("i", "file")):
        page.browser.press(key, "alt")
        page.browser.wait(f"document.getElementById('{dialog}').open")
        for _ in range(3):  # Tab stays inside, or in the browser itself
            page.browser.press("Tab")
            assert page.js(f"document.activeElement === document.body || document.getElementById('{dialog}').contains(document.activeElement)")
        page.browser.press("Escape")
        page.browser.wait("!document.querySelector('dialog[open]')")
    page.browser.press("m", "alt")
    assert page.js(FOCUS) == "input"
    page.browser.press("u", "alt")
    assert page.js("document.activeElement.closest('.edit') !== null")
    page.browser.press("Escape")
    assert page.js(FOCUS) == "input" and page.js("document.querySelector('.edit') === null")
    page.browser.press("r", "alt")
    page.browser.wait("document.querySelectorAll('.acts')[1]?.textContent.includes('2 of 2')")
    page.idle()


def keyboard_of_a_mac(page):
    """There the Alt key types letters, and the shortcuts have Ctrl and Shift."""
    ours = page.js("navigator.platform")
    page.browser.pretend("MacIntel")
    try:
        page.open()
        page.browser.press("k", "alt")
        assert not page.js("document.getElementById('keys').open")
        page.browser.press("k", "ctrl", "shift")
        assert page.js("document.getElementById('keys').open")
        assert "Ctrl Shift K" in page.js("[...document.querySelectorAll('#keyList dt')].map(e => [...e.children].map(k => k.textContent).join(' ')).join()")
        page.browser.press("Escape")
    finally:
        page.browser.pretend(ours)
    page.open()


def two_tabs(page):
    page.fresh()
    page.send("Shared by two tabs")
    wait_stored(page)
    page.js("""(async () => {
        const c = (await store.all()).find(c => c.id === current.id);
        c.title = 'Changed elsewhere';
        c.updated++;
        await store.run('readwrite', s => s.put(c));
        new BroadcastChannel('stb').postMessage(0);
    })()""")
    page.browser.wait("document.getElementById('title').textContent === 'Changed elsewhere'")
    assert page.js(TURNS) == 2 and "Changed elsewhere" in page.js(TITLES)


def phone(page):
    browser = page.browser
    browser.resize(360, 640, touch=True)
    try:
        page.open()
        page.browser.wait("document.getElementById('menu').offsetWidth > 0")
        assert not page.sideways(), page.sideways()
        page.browser.click("#menu")
        assert page.js(FOCUS) == "new" and not page.sideways()
        assert page.js("document.getElementById('main').inert")
        page.browser.press("Escape")
        assert page.js(FOCUS) == "menu"
        page.fresh()
        page.type("a" * 300 + " On a phone")
        page.browser.press("Enter")
        assert page.js(TURNS) == 0, "Enter should be a new line on a touch screen"
        page.browser.click("#send")
        page.browser.wait(f"{TURNS} === 2")
        page.idle()
        assert not page.sideways(), page.sideways()
        for name in ("settingsButton", "fileButton"):
            page.browser.click(f"#{name}")
            assert not page.sideways(), page.sideways()
            page.browser.press("Escape")
        small = page.js(
            "[...document.querySelectorAll('button, select, #input')].filter(e => e.offsetWidth && e.offsetHeight < 40).map(e => e.id || e.textContent)"
        )
        assert not small, f"too small for a finger: {small}"
    finally:
        browser.resize(1200, 800)
    page.open()


def colors(page):
    back = "getComputedStyle(document.documentElement).backgroundColor"
    page.browser.colors("light")
    light = page.js(back)
    page.browser.colors("dark")
    dark = page.js(back)
    assert light != dark
    page.browser.click("#theme")
    assert page.js(back) == light, "the switch does not win over the system"
    page.open()
    assert page.js(back) == light, "the choice is forgotten"
    page.browser.click("#theme")
    page.browser.click("#theme")
    page.browser.colors("light")


COMMON = [
    figures_of_the_file, answers, stops, regenerates, edits, keeps_conversations, renames_and_deletes, exports_and_imports, keyboard, keyboard_of_a_mac,
    two_tabs, phone, colors,
]
