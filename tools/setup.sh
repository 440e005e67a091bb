#!/bin/sh
# Make .venv with everything Mule needs; leave it as it is when it is up to date.
#
# .venv/setup.state holds "installing", or the folder and checksum of what was installed: an
# interrupted, moved or copied environment is made again, a changed pin is installed into it.
set -eu
cd "$(dirname "$0")/.."

here=$(pwd -P)
python=.venv/bin/python
state=.venv/setup.state
log=.venv/setup.log
key="$here $(cat pyproject.toml constraints.txt tools/*.sh | cksum)"
torch=$(sed -n 's/^torch==//p' constraints.txt)
need_kib=$((3 * 1024 * 1024))
unset PIP_USER PIP_TARGET PIP_PREFIX # they would install elsewhere than in .venv

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}

now() { date +%s; }

gib() { awk "BEGIN { printf \"%.1f\", $1 / 1048576 }"; }

gb() { awk "BEGIN { printf \"%.1f GB\", $1 * 1024 / 1e9 }"; }

# ---------------------------------------------------------------- what is there

saved_state() { cat "$state" 2>/dev/null || true; }

# Whether .venv runs here, has pip, and is of the Python that PYTHON= names.
usable() {
    [ -x "$python" ] || return 1
    "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
    [ -n "${PYTHON:-}" ] || return 0
    version='import sys; print(sys.version_info[:2])'
    [ "$("$base" -c "$version")" = "$("$python" -c "$version")" ]
}

keep_environment() {
    case $(saved_state) in
    "" | "$here "*) usable ;;
    *) return 1 ;;
    esac
}

check_disk() {
    free_kib=$(df -Pk . | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
    if [ "${free_kib:-$need_kib}" -lt "$need_kib" ]; then
        fail "Mule's environment needs 3.0 GiB in $here, which has $(gib "$free_kib") GiB free" \
            "free some space, or move this folder to a larger disk"
    fi
}

check_venv() {
    "$base" -c 'import ensurepip, venv' 2>/dev/null && return
    short=$("$base" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    fail "$base has no venv module, which Debian and Ubuntu package apart" \
        "sudo apt install python3-venv, or $short-venv for a Python beside the system's own"
}

# ---------------------------------------------------------------- phases

tick() { # the running seconds and pip's last line; stops when this script is gone
    while kill -0 $$ 2>/dev/null; do
        printf '\r%s %4d s  %-40.40s' "$label" $(($(now) - began)) "$(tail -n 1 "$log")"
        sleep 1
    done
}

phase() { # phase TITLE COMMAND...: one line on the screen, the command's output in the log
    number=$((number + 1))
    label=$(printf '  %d/4  %-24s' "$number" "$1")
    began=$(now)
    shift
    printf '%s' "$label"
    ticker=""
    if [ -t 1 ]; then
        tick &
        ticker=$!
    fi
    status=0
    "$@" >>"$log" 2>&1 || status=$?
    stop_ticker
    [ "$status" -eq 0 ] || explain_failure
    printf ' %4d s\n' $(($(now) - began))
}

stop_ticker() {
    [ -n "${ticker:-}" ] || return 0
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    ticker=""
    printf '\r%-80s\r%s' "" "$label"
}

explain_failure() {
    printf ' failed\n\n'
    tail -n 20 "$log" >&2
    echo >&2
    if grep -qi 'no space left' "$log"; then
        fail "the disk filled up during the installation" \
            "free some space, or set TMPDIR to a folder on a larger disk; then: make setup"
    elif grep -qiE 'name resolution|NewConnectionError|ConnectTimeout|ProxyError' "$log"; then
        fail "the package index could not be reached" \
            "check the network (or HTTPS_PROXY); then: make setup"
    elif grep -qi 'no matching distribution' "$log"; then
        fail "a package has no build for this machine: $(uname -sm), $("$python" -V)" \
            "PyTorch $torch wants 64-bit Linux (glibc 2.28 or newer) or a Mac with Apple silicon; \
for another Python: make setup PYTHON=python3.12"
    fi
    fail "the installation stopped (above: the end of $log)" "read that file; then: make setup"
}

install() { "$python" -m pip install --no-input --progress-bar off -c constraints.txt "$@"; }

make_environment() { [ -x "$python" ] || "$base" -m venv .venv; }

# Built with the pinned hatchling beside it: pip's isolated builds ignore -c.
install_torch() { install torch hatchling editables; }

install_mule() { install --no-build-isolation -e '.[dev]'; }

start_mule() { .venv/bin/mule --help; }

# ---------------------------------------------------------------- what is said

warn_about_cuda() {
    [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null || return 0
    "$base" -m pip config list 2>/dev/null | grep -qE 'index-url|find-links' && return
    echo "note: no NVIDIA driver here, and PyTorch for Linux brings several GB of CUDA libraries;"
    echo "      set PIP_EXTRA_INDEX_URL to PyTorch's CPU packages to save them (see README.md)"
}

say_size() {
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    total=$(du -sk .venv | cut -f 1)
    part=$(du -sk "$site"/torch "$site"/nvidia* "$site"/triton 2>/dev/null |
        awk '{ kib += $1 } END { print kib + 0 }') || true
    echo "installed in $1 s, $(gb "$total"), of which torch $(gb "$part")"
}

# ---------------------------------------------------------------- the script

base=""
if [ -n "${PYTHON:-}" ]; then base=$(sh tools/find_python.sh); fi
if [ "$(saved_state)" = "$key" ] && [ -x .venv/bin/mule ] && usable; then
    echo "up to date: .venv ($("$python" -V))"
    exit 0
fi

started=$(now)
number=0
trap 'stop_ticker; echo; exit 130' INT
trap 'stop_ticker; echo; exit 143' TERM
if keep_environment; then
    echo "Bringing .venv up to date ($("$python" -V))"
else
    base=${base:-$(sh tools/find_python.sh)}
    check_disk
    check_venv
    if [ -e .venv ]; then echo "The .venv here is incomplete, moved or of another Python: making it again"; fi
    echo "Setting up Mule in .venv ($("$base" -V), $base; log in $log)"
    warn_about_cuda
    rm -rf .venv
    mkdir .venv
fi
: >"$log"
echo installing >"$state"
phase "environment" make_environment
phase "PyTorch $torch" install_torch
phase "Mule and its libraries" install_mule
phase "first start" start_mule
echo "$key" >"$state"
say_size $(($(now) - started))
