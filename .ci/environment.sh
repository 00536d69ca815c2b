# shellcheck shell=bash
# The virtual environments, .venv first of all, and what is installed in them. build.sh sources this file, which
# uses its constants, say and die, and fetch_packages of programs.sh.

# set_up runtime|dev: .venv with that lock and this project in it. Does nothing when it is so already.
set_up() {
    local profile=$1 stamp wanted started=$SECONDS
    wanted=$(key runtime dev)
    stamp=$(stamp_of "$VENV")
    if [[ $stamp == "$profile $wanted" || $stamp == "dev $wanted" ]]; then
        return
    fi
    [[ -f $ROOT/README.md ]] || die "README.md is missing: this is not the whole source tree"
    make_venv "$VENV"
    say "installing $(grep -c '==' "$LOCKS/$profile.txt") locked packages into .venv"
    "$VENV/bin/python" -m pip install --quiet --require-hashes --no-deps --no-compile -r "$LOCKS/$profile.txt" ||
        die "the packages could not be installed: is there a way to a Python package index?"
    "$VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$ROOT"
    # pip would compile on one core; some packages hold templates that are no Python, hence `|| true`.
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" edge_agent >/dev/null 2>&1 || true
    printf '%s %s\n' "$profile" "$wanted" >"$VENV/.stamp"
    say "installed in $((SECONDS - started)) s"
}

# locked_venv LOCK VENV [PYTHON]: a virtual environment of its own with that lock in it, for what must not mix with ours.
locked_venv() {
    local lock=$1 venv=$2
    [[ $(stamp_of "$venv") != "$lock $(key "$lock")" ]] || return 0
    make_venv "$venv" "${3:-}"
    say "installing $(grep -c '==' "$LOCKS/$lock.txt") locked packages into ${venv#"$ROOT"/}"
    "$venv/bin/python" -m pip install --quiet --require-hashes --no-deps -r "$LOCKS/$lock.txt"
    printf '%s %s\n' "$lock" "$(key "$lock")" >"$venv/.stamp"
}

# need_torch VENV: torch is in it afterwards. It stays outside the locks: its builds differ from host to host, and
# so do their hashes. Only tests and training have it; what a device runs has not.
need_torch() {
    local venv=$1 started=$SECONDS
    if [[ $("$venv/bin/python" -m pip show torch 2>/dev/null) == *"Version: ${TORCH#*==}"* ]]; then return; fi
    say "installing $TORCH"
    "$venv/bin/python" -m pip install --quiet "$TORCH"
    say "installed in $((SECONDS - started)) s"
}

# llama.cpp, which models are measured beside; where its wheel cannot be had, they are measured alone.
need_llama_cpp() {
    local folder=$TOOLS/llama-cpp wanted=$LOCKS/llama-cpp.txt
    if cmp -s "$wanted" "$folder/.lock"; then return; fi
    rm -rf -- "$folder"
    if "$TRAIN_VENV/bin/python" -m pip install --quiet --require-hashes --no-deps --only-binary :all: \
        --target "$folder" -r "$wanted"; then
        cp "$wanted" "$folder/.lock"
    else
        rm -rf -- "$folder"
        say "llama.cpp is left out: its wheel (xllamacpp) could not be installed"
    fi
}

# key LOCK…: changes when what is to be installed changes. .venv cannot be moved, so the place is part of it.
key() {
    local name files=("$ROOT/pyproject.toml")
    for name in "$@"; do files+=("$LOCKS/$name.txt"); done
    { cat -- "${files[@]}" && printf '%s\n' "$ROOT"; } | sha256sum | cut -d ' ' -f 1
}

# stamp_of VENV: what was installed there last; nothing when its Python is gone.
stamp_of() {
    if [[ -f $1/.stamp ]] && "$1/bin/python" -c '' 2>/dev/null; then cat "$1/.stamp"; fi
}

make_venv() {
    local venv=$1 python=${2:-}
    rm -f -- "$venv/.stamp"
    if usable_python "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    [[ -n $python ]] || python=$(find_python)
    say "making ${venv#"$ROOT"/} with $("$python" --version)"
    rm -rf -- "$venv"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    else
        make_venv_without_ensurepip "$python" "$venv"
    fi
}

# Debian keeps ensurepip in a package of its own; pip's wheel can be had without installing it.
make_venv_without_ensurepip() {
    local python=$1 venv=$2 wheel
    fetch_packages pip-whl python3-pip-whl
    wheel=$(find "$TOOLS/pip-whl" -name 'pip-*.whl' -print -quit)
    [[ -n $wheel ]] || die "this Python has no ensurepip: install python3-venv"
    "$python" -m venv --without-pip "$venv"
    "$venv/bin/python" "$wheel/pip" install --quiet --no-index "$wheel"
}

find_python() {
    local name path
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        path=$(command -v "$name" || true)
        if [[ -n $path ]] && usable_python "$path"; then
            printf '%s\n' "$path"
            return
        fi
    done
    die "Python 3.11, 3.12, 3.13 or 3.14 with its venv module is needed and was not found on PATH"
}

# Home Assistant runs on no older one.
find_newer_python() {
    local path
    for path in "$(command -v python3.13)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3.13; do
        if "$path" -c 'import venv' 2>/dev/null; then
            printf '%s\n' "$path"
            return
        fi
    done
    die "Python 3.13 is needed for Home Assistant and was not found"
}

usable_python() {
    "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# A service manager or a bare container may give no HOME, no TMPDIR and no standard input.
tidy_environment() {
    { : <&0; } 2>/dev/null || exec </dev/null
    if [[ -z ${HOME:-} || ! -d $HOME || ! -w $HOME ]]; then
        mkdir -p "$TOOLS/home"
        export HOME=$TOOLS/home
    fi
    if [[ -n ${TMPDIR:-} && ! -w $TMPDIR ]]; then unset TMPDIR; fi
    unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV VIRTUAL_ENV
    export PATH=$TOOLS/bin:$PATH:/usr/sbin:/sbin
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
}
