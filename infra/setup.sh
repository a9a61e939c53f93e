#!/usr/bin/env bash
# Creates the one environment of this repository in .venv, from constraints.txt; does nothing when it is there.
# Checks Python and Java first and names the command that installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

stamp=.venv/.ready
wanted=$(cat pyproject.toml constraints.txt | cksum)

java_hint='Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless (openjdk-21-jre-headless where there is no 17); macOS: brew install openjdk@17; then set JAVA_HOME if another Java stands before it on PATH'
python_hint='Debian/Ubuntu: sudo apt-get install python3.11 python3.11-venv (python3.12 python3.12-venv where there is no 3.11); macOS: brew install python@3.11; where there is neither: uv python install 3.11, and PYTHON=$(uv python find 3.11). PYTHON=/path/to/python3.11 chooses one'

java_version() { # of a program, empty if it is no working Java
  "$1" -version 2>&1 | sed -n 's/.*version "\([^"]*\)".*/\1/p' | head -1 || true
}
java=java found="java is not on PATH"
if [ -n "${JAVA_HOME:-}" ]; then
  java=$JAVA_HOME/bin/java
  if ! command -v "$java" >/dev/null 2>&1; then
    on_path=$(java_version java)
    fail "JAVA_HOME=$JAVA_HOME has no bin/java; unset JAVA_HOME or set it to the folder of a Java; java on PATH is ${on_path:-not there}. $java_hint"
  fi
fi
if command -v "$java" >/dev/null 2>&1; then
  version=$(java_version "$java")
  found="$java is ${version:-no working Java}"
fi
major=${version:-0} major=${major%%[!0-9]*}
[ "${major:-0}" -ge 17 ] || fail "Java 17 or newer is needed (Spark 4.1 runs on it); found: $found. $java_hint"

[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

fits() { # whether a program is a Python of a supported version
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}
python_version() { # what a program says it is, for a message
  if ! command -v "$1" >/dev/null 2>&1; then
    printf 'not there'
  else
    local said
    said=$("$1" --version 2>&1 | head -1) || true
    printf '%s' "${said#Python }"
  fi
}
python=${PYTHON:-}
if [ -n "$python" ]; then
  found="PYTHON=$python is $(python_version "$python")"
  fits "$python" || python=
else
  found="python3 is $(python_version python3)"
  for candidate in python3.11 python3.12 python3; do
    if fits "$candidate"; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || fail "Python 3.11 or 3.12 is needed; found: $found. $python_hint"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make a virtual environment. Debian/Ubuntu: sudo apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"

log=.venv/setup.log
install() { # pip, with a line now and then instead of its hundreds
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --progress-bar off "$@" >>"$log" 2>&1 &
  local pip=$! started=$SECONDS packages
  packages=$(grep -c '==' constraints.txt)
  while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    (((SECONDS - started) % 20 == 0)) || continue
    if grep -q '^Installing collected' "$log"; then
      echo "setup: $SECONDS s, $(find .venv -maxdepth 4 -name '*.dist-info' | wc -l) of about $packages packages written"
    else
      echo "setup: $SECONDS s, $(grep -c '^Collecting' "$log" || true) of about $packages packages fetched"
    fi
  done
  wait "$pip" || { tail -15 "$log" >&2; fail "pip could not install; all it said is in $log"; }
}

if [ -f "$stamp" ]; then
  echo "setup: pyproject.toml or constraints.txt has changed; .venv is brought up to date (a minute or so)"
else
  echo "setup: installing into .venv with $("$python" --version) (a few minutes, once)"
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
: >"$log"
install --upgrade pip
: >"$log"
install --constraint constraints.txt --editable '.[dev]'
# Spark starts in half the time from an archive of its loaded classes.
.venv/bin/python -m jobs.spark
printf '%s\n' "$wanted" >"$stamp"
echo "setup: done"
