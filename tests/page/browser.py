"""Drives Chromium through its debugging pipe. Needs nothing but Python and a Chromium (or Chrome) executable."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
]
KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowDown": ("ArrowDown", 40, ""), " ": ("Space", 32, " "),
}
# Seconds without any message after which the browser counts as hung.
PATIENCE = 120
MODIFIERS = {"alt": 1, "ctrl": 2, "shift": 8}


def find_chromium():
    """Path of a browser, or None. The variable CHROMIUM overrides the search."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Browser:
    """A headless browser with one page. Collects what the page writes to the console, and the violations of its policy."""

    def __init__(self, executable, width=1200, height=800, touch=False):
        self.profile = tempfile.TemporaryDirectory(prefix="stb-page-", ignore_cleanup_errors=True)
        self.downloads = os.path.join(self.profile.name, "downloads")
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()

        def connect():
            # Chromium reads commands from descriptor 3 and writes replies to descriptor 4.
            # The pipes may have these numbers already, so that both are copied first.
            high_read, high_write = (fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in (theirs_read, theirs_write))
            os.dup2(high_read, 3)
            os.dup2(high_write, 4)

        command = [executable, *FLAGS, f"--user-data-dir={self.profile.name}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self.input, self.output = ours_write, ours_read
        self.buffer, self.number, self.session = b"", 0, None
        self.console, self.requests, self.replies = [], [], {}
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=self.downloads)
        self.resize(width, height, touch)

    def close(self):
        """Ends the browser."""
        try:
            self.session = None
            self.send("Browser.close")
            self.process.wait(10)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.input)
        os.close(self.output)
        self.profile.cleanup()

    def send(self, method, **params):
        """Sends a command and waits for its reply."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def receive(self):
        while b"\0" not in self.buffer:
            if not select.select([self.output], [], [], PATIENCE)[0]:
                raise RuntimeError(f"the browser has been silent for {PATIENCE} s")
            data = os.read(self.output, 1 << 16)
            if not data:
                raise EOFError("the browser has ended")
            self.buffer += data
        raw, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(raw)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, method, params):
        if method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append("exception: " + details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.console.append(f"{params['entry']['source']}: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def resize(self, width, height, touch=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def colors(self, scheme):
        """Pretends that the person prefers `scheme`, "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def pretend(self, platform):
        """Pages that are opened from now on see this platform."""
        self.send("Emulation.setUserAgentOverride", userAgent=self.evaluate("navigator.userAgent"), platform=platform)

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression):
        """Value of a JavaScript expression in the page; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self.evaluate(expression):
                    return
            except RuntimeError as error:  # the page may be between two documents
                if time.monotonic() > end:
                    raise AssertionError(f"{expression}: {error}") from error
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {expression}")
            time.sleep(0.05)

    def type(self, text):
        self.send("Input.insertText", text=text)

    def press(self, key, *modifiers):
        """Presses a key: a name of KEYS, or a letter."""
        code, number, text = KEYS.get(key) or (f"Key{key.upper()}", ord(key.upper()), key)
        flags = sum(MODIFIERS[m] for m in modifiers)
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": flags}
        if text and not flags & 3:
            common["text"] = text
        self.send("Input.dispatchKeyEvent", type="keyDown", **common)
        common.pop("text", None)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector, nth=0):
        """Clicks the middle of an element, as a mouse does."""
        where = json.dumps(selector)
        box = self.evaluate(
            f"(() => {{ const e = document.querySelectorAll({where})[{nth}]; if (!e) return null; e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, r.width]; })()"
        )
        if not box or not box[2]:
            raise AssertionError(f"nothing to click: {selector} [{nth}]")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose_file(self, selector, path):
        """Puts a file into an input of type file."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[path])

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
