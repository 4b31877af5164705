"""A server that answers as `stb-run serve` does, without a model: the last message says what the answer is to be."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = Path(__file__).resolve().parents[2] / "runtime/src/serve/page/index.html"
KEY = "mock-key"
INFO = {
    "name": "mock-7b", "true_bits": 2.997, "file_bytes": 2_530_000_000, "parameters": 6_740_000_000, "context": 2048,
    "architecture": "llama", "recipe": "int2", "has_template": True, "memory_bytes": 3_100_000_000,
    "quality": {
        "verdict": "worse", "meaning": "noticeably worse than the original", "kl": 0.1236, "top1": 0.818,
        "perplexity": 13.44, "source_perplexity": 12.79,
    },
    "sampling": {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.0},
}
# Text that must stay text, and links of which only some may become links.
HOSTILE = """# <img src=x onerror="window.broken=1">

<script>window.broken=1</script> <iframe src="https://example.invalid/"></iframe> <svg onload="window.broken=1"></svg>

[bad](javascript:window.broken=1) [bad](JaVaScRiPt:window.broken=1) [bad](data:text/html,<script>1</script>) [bad](vbscript:x)
[bad](//example.invalid/x) [bad](/v1/models) [good](https://example.invalid/ok) [good](mailto:a@example.invalid) <javascript:alert(1)>
![image](https://example.invalid/image.png) ![bad](javascript:window.broken=1) https://example.invalid/a"onclick="window.broken=1

- <style>* { display: none }</style>
- `</code><script>window.broken=1</script>`

> <form action="https://example.invalid/"><input name=a></form>

| <b onclick="window.broken=1">a</b> | [x](javascript:window.broken=1) |
| --- | --- |
| <object data=x></object> | <base href="https://example.invalid/"> |

```html"><script>window.broken=1</script>
</code></pre><script>window.broken=1</script>
```
"""
DEEP = "\n\n".join([
    ">" * 3000 + " deep", "".join("  " * i + "- item\n" for i in range(150)), "*" * 5000 + "a" + "*" * 5000, "[" * 5000, "`" * 999 + " " + "**a " * 3000,
    "`" + " a" * 10000 + "`", "[a](http://" * 1000,
])
TABLE = "|" + "a|" * 3000 + "\n|" + "-|" * 3000 + "\n" + ("|" + "b|" * 300 + "\n") * 100
LONG = "".join(
    f"## Part {i}\n\nSome *plain* text with `code`, **strong words** and a [link](https://example.invalid/{i}).\n\n"
    f"1. first\n2. second\n   - inner\n\n| a | b |\n| --- | --: |\n| {i} | {i * i} |\n\n```rust\nfn part_{i}() -> u32 {{\n    {i}\n}}\n```\n\n"
    for i in range(150)
)
TEXTS = {"hostile": HOSTILE, "deep": DEEP, "table": TABLE, "long": LONG, "words": "one two three four five"}


class Mock(BaseHTTPRequestHandler):
    """One connection. The last message is a command: "429", "503", "401", "cut", "slow", "think", "context", a name
    of TEXTS, or anything else, which is answered by an echo."""

    protocol_version = "HTTP/1.1"
    refused = {}
    seen = []
    info = INFO
    models = [INFO["name"]]
    down = gone = False
    loading = 0

    def log_message(self, *_):
        pass

    def reply(self, status, kind, body, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message, code=None, **headers):
        self.json({"error": {"message": message, "type": "mock", "param": None, "code": code}}, status, **headers)

    def json(self, value, status=200, **headers):
        self.reply(status, "application/json", json.dumps(value).encode(), **headers)

    def do_GET(self):
        if Mock.down:
            return self.hang_up()
        path = self.path.split("?")[0]
        if path == "/":
            page = PAGE.read_bytes()
            hashes = {}
            for tag in ("script", "style"):
                content = re.search(f"<{tag}>(.*?)</{tag}>".encode(), page, re.S)[1]
                hashes[tag] = base64.b64encode(hashlib.sha256(content).digest()).decode()
            policy = (
                f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; connect-src 'self'; "
                "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                # No text at all may become markup or script.
                "require-trusted-types-for 'script'; trusted-types 'none'"
            )
            self.reply(200, "text/html; charset=utf-8", page, Content_Security_Policy=policy)
        elif path == "/stb/info" and Mock.loading:
            Mock.loading -= 1
            self.error(503, "Loading model")
        elif path == "/stb/info":
            query = parse_qs(urlsplit(self.path).query)
            self.json({**self.info, "name": query.get("model", Mock.models)[0]})
        elif path == "/v1/models":
            self.json({"object": "list", "data": [{"id": name, "object": "model"} for name in Mock.models]})
        else:
            self.error(404, "no such path")

    def hang_up(self):
        self.close_connection = True

    def do_POST(self):
        if Mock.down:
            return self.hang_up()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Mock.seen.append(body)
        messages = body.get("messages") or [{"content": body["prompt"]}]
        command = messages[-1]["content"].strip()
        if command == "401" and self.headers["Authorization"] != f"Bearer {KEY}":
            return self.error(401, "wrong key", "invalid_api_key")
        if command in ("429", "503") and Mock.refused.setdefault(command, 0) < 1:
            Mock.refused[command] += 1
            return self.error(int(command), "not now", Retry_After="1")
        if command == "context" and len(messages) > 1:
            return self.error(400, "4000 tokens, and the context has 2048", "context_length_exceeded")
        self.stream(command, messages)

    def stream(self, command, messages):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        text = TEXTS.get(command, f"You said: {command}\n\nMessages: {len(messages)}.")
        try:
            if command == "think":
                for word in "Let me think about **this** carefully.".split(" "):
                    self.delta(reasoning_content=word + " ")
                    time.sleep(0.02)
            words = re.findall(r"\s*\S+\s*", text) if command in ("slow", "cut") or len(text) < 1000 else [text[i:i + 97] for i in range(0, len(text), 97)]
            begun = time.monotonic()
            for i in range(2000) if command == "slow" else words:
                self.delta(content=f"word{i} " if command == "slow" else i)
                time.sleep(0.02 if command == "slow" else 0.001)
            if command == "cut":
                time.sleep(0.2)
                self.close_connection = True
                return
            ms = (time.monotonic() - begun) * 1000
            usage = {"prompt_tokens": 40, "completion_tokens": len(words), "total_tokens": 40 + len(words)}
            timings = {"prompt_tokens": 40, "cached_tokens": 12, "prompt_ms": 90.0, "completion_tokens": len(words), "completion_ms": ms}
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.event({"choices": [], "usage": usage, "timings": timings})
            self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            Mock.gone = True
            self.close_connection = True

    def delta(self, **delta):
        self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def event(self, value):
        self.chunk(b": keep-alive\n\ndata: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


def serve(port=0):
    """Starts the server on a thread; gives it and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Mock)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/"


if __name__ == "__main__":
    print(serve(8099)[1], flush=True)
    threading.Event().wait()
