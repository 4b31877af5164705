#!/bin/sh
# All tests of the reader in JavaScript: vectors, ranges, hostile files, and the page in headless Chromium.
# Needs Node 18 or newer (Debian: apt-get install nodejs) and, for the page, Chromium or Chrome (apt-get install chromium; the
# variable CHROMIUM names another executable). Without a browser the tests of the page say that they were skipped; with
# STB_REQUIRE_CHROMIUM set they fail. Nothing is downloaded.
set -eu
cd "$(dirname "$0")"
if ! command -v node > /dev/null; then
    echo "check.sh: there is no Node: install version 18 or newer (Debian: apt-get install nodejs)" >&2
    exit 1
fi
if ! node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 18 ? 0 : 1)'; then
    echo "check.sh: Node is $(node --version); version 18 or newer is needed" >&2
    exit 1
fi
for file in index.js lib/*.js inspect/*.js test/*.js; do
    node --check "$file"
done
node --test
