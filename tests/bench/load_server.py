"""Load on a server: many clients, some of which break off, for minutes. Every complete answer must be the one that its
prompt gets alone.

    python3 tests/bench/load_server.py http://127.0.0.1:8080 [--clients 64] [--minutes 30] [--pid PID]

Prints the resident memory of process PID each minute, and at the end the number of answers by status: 200, 429 (the queue
is full), "cut" for those that this script broke off, and what should not be there: "different" and the names of errors.
Exits with 1 if there is any of the latter.
"""

import argparse
import collections
import json
import pathlib
import random
import socket
import sys
import threading
import time
import urllib.parse

PROMPTS = [
    "One day",
    "Once upon a time, there was a little dog who",
    "The sky",
    "Tim had a red ball. He",
    "A cat sat down and",
    "Mom said",
    "In the morning, the farmer went to the market with a basket of eggs. On the way, she met a fox who asked her what",
    "List three colors:",
]


class Client:
    def __init__(self, url: urllib.parse.SplitResult):
        self.address = (url.hostname, url.port or 80)
        self.alone: dict[str, str] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def ask(self, prompt: str, tokens: int, cut: int | None = None) -> tuple[int, bytes] | None:
        """The status and the body; none if the connection was closed after `cut` bytes of a stream."""
        stream = cut is not None
        body = json.dumps(
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
        ).encode()
        with socket.create_connection(self.address) as connection:
            connection.settimeout(900)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            reply = b""
            while piece := connection.recv(65536):
                reply += piece
                if cut is not None and len(reply) > cut:
                    return None
        head, _, body = reply.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def once(self, source: random.Random) -> str:
        """One request; what became of it."""
        prompt = source.choice(PROMPTS)
        try:
            if source.random() < 0.2:
                reply = self.ask(prompt, 200, cut=source.randint(1, 3000))
                return "cut" if reply is None or reply[0] == 200 else str(reply[0])
            reply = self.ask(prompt, 60)
            assert reply is not None
            status, body = reply
            if status == 200 and json.loads(body)["choices"][0]["text"] != self.alone[prompt]:
                return "different"
            return str(status)
        except (OSError, ValueError, LookupError) as error:
            return type(error).__name__

    def run(self, number: int, end: float) -> None:
        source = random.Random(number)
        while time.time() < end:
            result = self.once(source)
            with self.lock:
                self.counts[result] += 1
            if result == "429":
                time.sleep(source.random())


def resident_megabytes(pid: int) -> float:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise SystemExit(f"process {pid} has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--pid", type=int, help="of the server, on this machine")
    args = parser.parse_args()
    client = Client(urllib.parse.urlsplit(args.url))
    for prompt in PROMPTS:
        reply = client.ask(prompt, 60)
        assert reply is not None and reply[0] == 200, reply
        client.alone[prompt] = json.loads(reply[1])["choices"][0]["text"]
    end = time.time() + 60 * args.minutes
    threads = [threading.Thread(target=client.run, args=(i, end)) for i in range(args.clients)]
    for thread in threads:
        thread.start()
    minute = 0
    while any(thread.is_alive() for thread in threads):
        if args.pid is not None:
            print(f"minute {minute}: {resident_megabytes(args.pid):.1f} MB", flush=True)
        minute += 1
        next_minute = time.time() + 60
        while time.time() < next_minute and any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
    print(dict(client.counts))
    sys.exit(0 if set(client.counts) <= {"200", "429", "cut"} else 1)


if __name__ == "__main__":
    main()
