#!/usr/bin/env bash
# A Chromium for tests/test_serve_page.py, from the distribution's packages, where none is installed.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ]; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium
else
  sudo -n apt-get update -qq && sudo -n apt-get install -y -qq --no-install-recommends chromium
fi
