#!/bin/sh
# Print the path of a Python >= 3.11, or say what was found and how to get one.
# PYTHON=... names the only candidate; otherwise the usual names are tried, newest proven first.

# The base interpreter is printed, so that an activated .venv is never built from itself.
ask='
import sys
if sys.version_info < (3, 11):
    print("%d.%d.%d" % sys.version_info[:3])
else:
    print("use " + (getattr(sys, "_base_executable", "") or sys.executable))
'

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}

found=""
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    answer=$("$candidate" -c "$ask" 2>/dev/null) || continue # a pyenv shim may exist and fail
    case $answer in
    "use "*)
        printf '%s\n' "${answer#use }"
        exit 0
        ;;
    esac
    found="$found${found:+, }$candidate is $answer"
done

if [ -n "${PYTHON:-}" ]; then
    fail "PYTHON=$PYTHON cannot be used: ${found:-it does not run}; Mule needs Python 3.11 or newer" \
        "name another, as in: make setup PYTHON=python3.12, or leave PYTHON unset"
fi
fail "no Python 3.11 or newer on PATH (${found:-none runs})" \
    "install one (macOS: brew install python@3.13; Debian, Ubuntu: sudo apt install python3 \
python3-venv; pyenv: pyenv install 3.13), or name it: make setup PYTHON=/path/to/python3.13"
