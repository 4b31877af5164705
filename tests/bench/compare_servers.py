"""Servers side by side, alternating in one run: time to the first token, time between tokens, and tokens per second.

    python3 tests/bench/compare_servers.py stb=http://127.0.0.1:8080 llama=http://127.0.0.1:8081 [--clients 1,4,16]

Each server is one that answers OpenAI's /v1/completions, and has been started beforehand with as many slots as there are
clients. A client sends a prompt, reads the answer as a stream of exactly --tokens tokens, and sends the next one. Prompts
have an own beginning each, so no server finds a part of one in its cache. Needs nothing but Python. Run it on an idle
machine. Prints one line of JSON per measurement and a table of medians.
"""

import argparse
import http.client
import json
import random
import statistics
import threading
import time
import urllib.parse

WORDS = (
    "the river ran past an old mill where two brothers kept bees and sold honey in jars to people who came by boat from "
    "towns along the coast each spring when ice had gone and roads were dry enough for carts again"
).split()


def prompt(source: random.Random) -> str:
    """Between 20 and 120 words."""
    words = [source.choice(WORDS) for _ in range(source.randint(20, 120))]
    return f"Note {source.randrange(10**9)}: " + " ".join(words) + "."


def answer(url: urllib.parse.SplitResult, text: str, tokens: int) -> list[float]:
    """The times at which the request was sent and its tokens arrived."""
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
    body = {
        "prompt": text,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    times = [time.perf_counter()]
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"{url.geturl()} answered {reply.status}: {reply.read(500)!r}")
    for line in reply:
        # A piece may have no text: that of a token that ends in the middle of a character.
        if line.startswith(b"data: {") and b'"finish_reason":null' in line.replace(b" ", b""):
            times.append(time.perf_counter())
    connection.close()
    return times


def measure(url: urllib.parse.SplitResult, clients: int, seconds: float, tokens: int) -> dict:
    """Statistics of the answers that began and ended within `seconds`."""
    begin, end = time.perf_counter(), time.perf_counter() + seconds
    all_times: list[list[float]] = []

    def run(number: int) -> None:
        source = random.Random(time.time_ns() + number)
        while time.perf_counter() < end:
            all_times.append(answer(url, prompt(source), tokens))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = sorted(times[1] - times[0] for times in all_times)
    between = sorted(b - a for times in all_times for a, b in zip(times[1:], times[2:]))
    counted = sum(begin <= at <= end for times in all_times for at in times[1:])

    def milliseconds(values: list[float], share: float) -> float:
        return round(1000 * values[min(len(values) - 1, int(share * len(values)))], 1)

    return {
        "answers": len(all_times),
        "tokens_per_second": round(counted / seconds, 1),
        "first_p50_ms": milliseconds(first, 0.5),
        "first_p99_ms": milliseconds(first, 0.99),
        "between_p50_ms": milliseconds(between, 0.5),
        "between_p99_ms": milliseconds(between, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--clients", default="1,4,16", help="numbers of clients (default: 1,4,16)")
    parser.add_argument("--seconds", type=float, default=20, help="of a measurement (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    args = parser.parse_args()
    servers = {}
    for server in args.servers:
        name, _, url = server.partition("=")
        servers[name] = urllib.parse.urlsplit(url)
    results: dict[tuple[int, str], list[dict]] = {}
    for _ in range(args.rounds):
        for clients in map(int, args.clients.split(",")):
            for name, url in servers.items():
                result = measure(url, clients, args.seconds, args.tokens)
                print(json.dumps({"server": name, "clients": clients, **result}), flush=True)
                results.setdefault((clients, name), []).append(result)
    columns = [column for column in next(iter(results.values()))[0] if column != "answers"]
    print("\n| clients | server | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for (clients, name), rounds in sorted(results.items()):
        medians = [str(round(statistics.median(r[c] for r in rounds), 1)) for c in columns]
        print(f"| {clients} | {name} | " + " | ".join(medians) + " |")


if __name__ == "__main__":
    main()
