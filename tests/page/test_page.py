#!/usr/bin/env python3
"""Tests the web page of `stb-run serve` in headless Chromium.

    python3 tests/page/test_page.py                                      # against a mock server
    python3 tests/page/test_page.py --server http://127.0.0.1:8080/      # against a running server
    python3 tests/page/test_page.py --run target/release/stb-run --model quill.stb

README.md in this folder says what the modes check.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mock  # noqa: E402
from browser import Browser, find_chromium  # noqa: E402
from every_server import COMMON  # noqa: E402
from person import Page  # noqa: E402
from with_mock import WITH_MOCK  # noqa: E402

LIMIT = 60_000


def check_size():
    size = mock.PAGE.stat().st_size
    assert size <= LIMIT, f"the page has {size} bytes; {LIMIT} are allowed"
    text = mock.PAGE.read_text()
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text
    assert not re.search(r"""(src|href)=["']?https?:""", text.replace("http://www.w3.org/2000/svg", "")), "the page loads something from elsewhere"


def check_console(page):
    expected = ("Failed to load resource",)
    unexpected = [line for line in page.browser.console if not any(e in line for e in expected)]
    assert not unexpected, unexpected
    outside = {r for r in page.browser.requests if not r.startswith((page.url, "data:", f"blob:{page.url}"))}
    assert not outside, f"requests to elsewhere: {outside}"


def start_server(run, model):
    """Starts `stb-run serve` on a free port; gives the process and its address."""
    process = subprocess.Popen([run, "serve", model, "--host", "127.0.0.1", "--port", "0"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            # Unread output would block the server.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[0] + "/"
    raise SystemExit(f"the server ended with code {process.wait()} and named no address")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a running server")
    parser.add_argument("--run", help="the program stb-run, to start a server")
    parser.add_argument("--model", help="the file that it serves")
    parser.add_argument("--only", help="name of one check")
    args = parser.parse_args()
    check_size()
    if not (executable := find_chromium()):
        if os.environ.get("STB_REQUIRE_CHROMIUM"):
            raise SystemExit("no Chromium: install it (Debian: apt-get install chromium), or set CHROMIUM to its path")
        print("skipped: there is no Chromium (Debian: apt-get install chromium)")
        return
    process = server = None
    if args.run:
        process, url = start_server(args.run, args.model)
    elif args.server:
        url = args.server.rstrip("/") + "/"
    else:
        server, url = mock.serve()
    failed = 0
    browser = Browser(executable)
    try:
        page = Page(browser, url)
        page.open()
        checks = COMMON + (WITH_MOCK if server else [])
        for check in checks + [check_console]:
            if args.only and check.__name__ != args.only:
                continue
            try:
                check(page)
                print(f"ok: {check.__name__}", flush=True)
            except (AssertionError, RuntimeError):
                failed += 1
                print(f"FAILED: {check.__name__}\n{traceback.format_exc()}", flush=True)
                page.open()
    finally:
        browser.close()
        if process:
            process.terminate()
            process.wait(30)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
