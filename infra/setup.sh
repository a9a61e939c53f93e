#!/usr/bin/env bash
# Creates the one environment of this repository in .venv, from constraints.txt; does nothing when it is there.
# Checks Python and Java first and names the command that installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

stamp=.venv/.ready
wanted=$(cat pyproject.toml constraints.txt | cksum)

java_bin=${JAVA_HOME:+$JAVA_HOME/bin/}java
command -v "$java_bin" >/dev/null 2>&1 ||
  fail "Java 17 or newer is missing (Spark needs it). Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17"
java_major=$("$java_bin" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1)
[ "${java_major:-0}" -ge 17 ] ||
  fail "Java ${java_major:-of unknown version} is too old, Spark 4.1 needs 17 or newer. Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless, then set JAVA_HOME"

[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

fits() { # whether a program is a Python of a supported version
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}
python=${PYTHON:-}
if [ -n "$python" ]; then
  fits "$python" || fail "PYTHON=$python is not Python 3.11 or 3.12 ($("$python" --version 2>&1 | head -1))"
else
  for candidate in python3.11 python3.12 python3; do
    if fits "$candidate"; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] ||
  fail "Python 3.11 or 3.12 is missing. Debian/Ubuntu: sudo apt-get install python3.11 python3.11-venv; macOS: brew install python@3.11; or set PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make a virtual environment. Debian/Ubuntu: sudo apt-get install python3.11-venv"

log=.venv/setup.log
install() { # pip, with a line now and then instead of its hundreds
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --progress-bar off "$@" >>"$log" 2>&1 &
  local pip=$! started=$SECONDS
  while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    (((SECONDS - started) % 20 == 0)) || continue
    if grep -q '^Installing collected' "$log"; then
      echo "setup: $((SECONDS - started)) s, writing $(grep '^Installing collected' "$log" | tail -1 | tr -cd ',' | wc -c) packages"
    else
      echo "setup: $((SECONDS - started)) s, $(grep -c '^Collecting' "$log" || true) of about $(grep -c '==' constraints.txt) packages found"
    fi
  done
  wait "$pip" || { tail -15 "$log" >&2; fail "pip could not install; all it said is in $log"; }
}

echo "setup: installing into .venv with $("$python" --version) (a few minutes, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
: >"$log"
install --upgrade pip
: >"$log"
install --constraint constraints.txt --editable '.[dev]'
# Spark starts in half the time from an archive of its loaded classes.
.venv/bin/python -m jobs.spark
printf '%s\n' "$wanted" >"$stamp"
echo "setup: done"
