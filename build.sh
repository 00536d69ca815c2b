#!/usr/bin/env bash
# Builds, checks, tests and shows edge-agent on a Debian or Ubuntu machine with Python 3.11 or newer.
#
# Everything goes into .venv and .tools beside this file; nothing is installed on the system, no service is
# started and no privilege is needed. Packages are installed from .ci/locks with their hashes checked.

set -euo pipefail
umask 022
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

readonly ROOT=$PWD
readonly VENV=$ROOT/.venv
readonly TOOLS=$ROOT/.tools
readonly TRAIN_VENV=$TOOLS/train-venv
readonly LOCKS=$ROOT/.ci/locks
readonly BUILD=('hatchling>=1.27' 'editables>=0.5') # pyproject.toml's; locked, so that no build fetches them
readonly TORCH='torch==2.13.0'
readonly TRANSFORMERS=(transformers==5.23.0 safetensors) # the extra of that name without torch
readonly TRAINING=("${TRANSFORMERS[@]}" onnx onnx-ir onnxruntime-genai==0.18.0)

usage() {
    cat <<'TEXT'
usage: ./build.sh COMMAND [ARGUMENT…]

  demo [OPTION…]       set up what is needed, then a model from registry to answer on this machine
  test [PYTEST ARG…]   set up what is needed, then all tests (or those that the pytest arguments select)
  chaos [PYTEST ARG…]  1,000 prompts while everything around them breaks, and the table; CHAOS_SEED repeats a run
  powerloss [ARG…]     the power-loss tests with all faults at all points, the daemon too (minutes)
  check                ruff, formatting and mypy --strict
  package [OPTION…]    wheel, sdist and the offline bundles into dist/; --arch A and --python V choose some
  boot-test            a bundle installed, upgraded and broken in every way on a Debian that boots (root; minutes)
  sample-model         make the sample model and the tests' second model again (fetches torch)
  random-model OUT [ARG…]  a model of random weights and a real size, to measure with; --help lists its shapes
  lock                 make .ci/locks again from pyproject.toml
  help                 this text
TEXT
}

say() { printf 'build.sh: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

main() {
    local command=${1:-help}
    shift || true
    tidy_environment
    case $command in
        demo) demo "$@" ;;
        test) run_tests "$@" ;;
        powerloss) POWERLOSS_FAULTS=all run_tests tests/*/test_powerloss.py "$@" ;;
        chaos) chaos "$@" ;;
        check) check ;;
        package) package "$@" ;;
        boot-test) boot_test ;;
        sample-model) sample_model ;;
        random-model) random_model "$@" ;;
        lock) lock ;;
        help | -h | --help) usage ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
}

# --- Commands -------------------------------------------------------------------------------------------

demo() {
    set_up runtime
    need_programs mosquitto mosquitto -- mosquitto mosquitto-clients
    exec "$VENV/bin/python" -m edge_agent demo "$@"
}

run_tests() {
    local started=$SECONDS tested status=0
    set_up dev
    need_torch "$VENV"
    need_programs mosquitto mosquitto mosquitto_pub mosquitto_sub mosquitto_rr -- mosquitto mosquitto-clients
    need_programs systemd systemd-analyze -- systemd
    need_programs strace strace -- strace
    # Most tests wait for processes; a file's tests stay together, for they share a broker or a daemon.
    [[ $# -gt 0 ]] || set -- -n "$(($(nproc) < 4 ? $(nproc) + 1 : 4))" --dist loadfile --no-loadscope-reorder
    tested=$SECONDS
    "$VENV/bin/python" -m pytest "$@" || status=$?
    say "set-up $((tested - started)) s, tests $((SECONDS - tested)) s"
    return "$status"
}

chaos() {
    CHAOS_PLAN=long run_tests -q --capture=no tests/acceptance/test_chaos.py "$@"
}

check() {
    set_up dev
    "$VENV/bin/python" -m ruff check edge_agent tests tools .ci
    "$VENV/bin/python" -m ruff format --check edge_agent tests tools .ci
    "$VENV/bin/python" -m mypy --strict
}

# package [--arch A]… [--python V]…: everything into dist/. The bundles fetch wheels; the first time takes minutes.
package() {
    local archs=() pythons=() arch started=$SECONDS
    while [[ $# -gt 0 ]]; do
        case $1 in
            --arch) archs+=("${2:?--arch needs x86_64 or aarch64}") ;;
            --python) pythons+=(--python "${2:?--python needs a version, 3.11 for one}") ;;
            *) die "package: unknown option $1" ;;
        esac
        shift 2
    done
    [[ ${#archs[@]} -gt 0 ]] || archs=(x86_64 aarch64)
    [[ ${#pythons[@]} -gt 0 ]] || pythons=(--python 3.11 --python 3.13) # Debian 12 and 13
    set_up dev
    # The time of the last commit: the same sources give the same bytes.
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1767225600)}
    export SOURCE_DATE_EPOCH
    rm -rf -- "$ROOT/dist"
    "$VENV/bin/python" -m build --no-isolation --outdir "$ROOT/dist" "$ROOT"
    for arch in "${archs[@]}"; do
        "$VENV/bin/python" .ci/bundle.py --arch "$arch" "${pythons[@]}" --wheel "$ROOT"/dist/*.whl \
            --cache "$TOOLS/wheelhouse" --out "$ROOT/dist"
    done
    (cd dist && sha256sum -- * >SHA256SUMS)
    say "packaged in $((SECONDS - started)) s"
}

# boot-test: three bundles, a model in one file and a Debian root, then tests/boot drives them.
boot_test() {
    local arch work=$TOOLS/boot started=$SECONDS
    [[ $EUID -eq 0 ]] || die "boot-test boots a container: start it as root"
    arch=$(uname -m)
    set_up dev
    need_programs debootstrap debootstrap -- debootstrap
    need_programs nspawn systemd-nspawn -- systemd-container libsystemd-shared
    make_debian_root "$TOOLS/debian-12"
    rm -rf -- "$work"
    mkdir -p "$work/dist"
    export_sample_model "$work"
    # The version that is there, a higher one, and one whose daemon ends at once.
    make_test_bundle "$work" "$arch" 0.1.0 ''
    make_test_bundle "$work" "$arch" 0.1.1 ''
    make_test_bundle "$work" "$arch" 0.1.2 'raise SystemExit("this version does not start")'
    say "prepared in $((SECONDS - started)) s"
    "$VENV/bin/python" -m tests.boot --root "$TOOLS/debian-12" --work "$work" --model "$work/model.tar" \
        --bundle "$work/dist/edge-agent-0.1.0-linux-$arch.tar.gz" \
        --newer "$work/dist/edge-agent-0.1.1-linux-$arch.tar.gz" \
        --broken "$work/dist/edge-agent-0.1.2-linux-$arch.tar.gz"
    rm -rf -- "$work"
}

# make_debian_root FOLDER: Debian 12 with systemd, Python (without ensurepip, as on a device) and mosquitto.
make_debian_root() {
    local root=$1 mirror
    if [[ -f $root/.complete ]]; then return; fi
    mirror=$(debian_mirror)
    rm -rf -- "$root" "$root.new"
    say "making a Debian root in .tools"
    DEBOOTSTRAP_DIR=$(find "$TOOLS/debootstrap" /usr/share/debootstrap -name functions -printf '%h\n' 2>/dev/null |
        head -n 1) debootstrap --variant=minbase \
        --include=systemd,systemd-sysv,python3,mosquitto,mosquitto-clients \
        bookworm "$root.new" "$mirror" >"$TOOLS/debootstrap.log" 2>&1 ||
        die "debootstrap failed: see .tools/debootstrap.log"
    touch "$root.new/.complete"
    mv -- "$root.new" "$root"
}

# Where this host's packages come from.
debian_mirror() {
    # shellcheck disable=SC2016  # apt's own variable
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Codename: bookworm' |
        head -n 1 | grep . || die "this host's package sources have no Debian 12"
}

# export_sample_model FOLDER: FOLDER/model.tar, what a USB stick would carry.
export_sample_model() {
    local work=$1 agent=("$VENV/bin/python" -m edge_agent --config "$1/publish.toml")
    cat >"$work/publish.toml" <<TEXT
state_dir = "$work/state"
registry.uri = "sqlite:///$work/registry.db"
models.assistant.uri = "models:/sample@prod"
TEXT
    "${agent[@]}" publish edge_agent/demo/sample_model --name sample --alias prod
    "${agent[@]}" models pull
    "${agent[@]}" models export assistant 1 "$work/model.tar"
}

# make_test_bundle FOLDER ARCH VERSION CODE: a bundle of these sources as VERSION, whose daemon begins with CODE.
make_test_bundle() {
    local work=$1 arch=$2 version=$3 code=$4 source=$1/source-$3
    mkdir -p "$source"
    cp -a edge_agent systemd pyproject.toml README.md LICENSE "$source/"
    sed -i "s/^__version__ = .*/__version__ = \"$version\"/" "$source/edge_agent/__init__.py"
    if [[ -n $code ]]; then sed -i "s/^import contextlib$/$code/" "$source/edge_agent/daemon.py"; fi
    "$VENV/bin/python" -m build --no-isolation --wheel --outdir "$source/dist" "$source" >/dev/null
    SOURCE_DATE_EPOCH=1767225600 "$VENV/bin/python" .ci/bundle.py --arch "$arch" --python 3.11 \
        --wheel "$source"/dist/*.whl --cache "$TOOLS/wheelhouse" --out "$work/dist"
}

sample_model() {
    training_venv
    # As a file: the package around it imports what the training environment does not have.
    "$TRAIN_VENV/bin/python" tools/make_sample_model.py --out edge_agent/demo/sample_model \
        --hf-out tests/models/sample_hf
    "$TRAIN_VENV/bin/python" tools/make_sample_model.py --out tests/models/swapped --swap Spain,Nepal
}

random_model() {
    training_venv
    exec "$TRAIN_VENV/bin/python" -m tests.benchmarks.make_random_model "$@"
}

# The libraries that make models; the agent itself needs none of them.
training_venv() {
    [[ $(stamp_of "$TRAIN_VENV") != "train $(key train)" ]] || return 0
    make_venv "$TRAIN_VENV"
    say "installing the training libraries"
    "$TRAIN_VENV/bin/python" -m pip install --quiet --require-hashes --no-deps -r "$LOCKS/train.txt"
    need_torch "$TRAIN_VENV"
    printf 'train %s\n' "$(key train)" >"$TRAIN_VENV/.stamp"
}

lock() {
    uv=$(mktemp -d)
    trap 'rm -rf -- "$uv"' EXIT
    "$(find_python)" -m venv "$uv"
    "$uv/bin/python" -m pip install --quiet uv
    # dev is a superset of runtime with the same versions: .venv serves both, whichever came first.
    compile dev --extra local-registry --extra signing --extra dev pyproject.toml - \
        < <(printf '%s\n' "${BUILD[@]}" "${TRANSFORMERS[@]}")
    compile runtime --extra local-registry --constraint "$LOCKS/dev.txt" pyproject.toml - \
        < <(printf '%s\n' "${BUILD[@]}")
    # What the bundles for devices hold: no build backend, but what verifies signatures.
    compile device --extra local-registry --extra signing --constraint "$LOCKS/dev.txt" pyproject.toml - \
        <<<'pip>=25'
    compile train --constraint "$LOCKS/dev.txt" - < <(printf '%s\n' "${TRAINING[@]}")
    if grep -nEi '://|^(-i|--index|--extra-index|--find-links|torch==|nvidia-|triton==)' "$LOCKS"/*.txt; then
        die "a lock names an address or torch: see above"
    fi
}

# compile NAME INPUT…: writes the lock NAME. Versions already in it stay when they still fit.
compile() {
    local name=$1
    shift
    "$uv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-emit-find-links --no-header --no-annotate --output-file "$LOCKS/$name.txt" "$@"
    say "locked $name: $(grep -c '==' "$LOCKS/$name.txt") packages"
}

# --- The virtual environment ----------------------------------------------------------------------------

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

# need_torch VENV: torch is in it afterwards. It stays outside the locks: its builds differ from host to host, and
# so do their hashes. Only tests and training have it; what a device runs has not.
need_torch() {
    local venv=$1 started=$SECONDS
    if [[ $("$venv/bin/python" -m pip show torch 2>/dev/null) == *"Version: ${TORCH#*==}"* ]]; then return; fi
    say "installing $TORCH"
    "$venv/bin/python" -m pip install --quiet "$TORCH"
    say "installed in $((SECONDS - started)) s"
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
    local venv=$1 python
    rm -f -- "$venv/.stamp"
    if usable_python "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    python=$(find_python)
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

usable_python() {
    "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# --- Programs that are not Python -----------------------------------------------------------------------

# need_programs GROUP PROGRAM… -- DEBIAN-PACKAGE…: the programs are on PATH afterwards. Missing ones come from
# the system's own package archive into .tools: installing mosquitto the usual way would start a broker.
need_programs() {
    local group=$1 programs=() program started=$SECONDS
    shift
    while [[ $1 != -- ]]; do
        programs+=("$1")
        shift
    done
    shift
    if have_all "${programs[@]}"; then return; fi
    say "fetching ${programs[*]} into .tools"
    fetch_packages "$group" "$@" || die "not found: ${programs[*]}; install the packages $* and start again"
    for program in "${programs[@]}"; do write_wrapper "$group" "$program"; done
    have_all "${programs[@]}" || die "the packages $* do not hold ${programs[*]}; install them and start again"
    say "fetched in $((SECONDS - started)) s"
}

have_all() {
    local program
    for program in "$@"; do command -v "$program" >/dev/null || return 1; done
}

# fetch_packages GROUP PACKAGE…: unpacks them, and the libraries they need and the system lacks, into
# .tools/GROUP.
fetch_packages() {
    local group=$1 folder=$TOOLS/$1 round wanted
    shift
    wanted=$(printf '%s\n' "$@")
    have_all apt-get apt-cache dpkg || {
        say "this is not a Debian or Ubuntu system: no apt-get, no dpkg"
        return 1
    }
    rm -rf -- "$folder"
    mkdir -p "$folder/root" "$folder/deb" "$TOOLS/bin"
    apt_options=()
    for round in 1 2 3 4; do
        # shellcheck disable=SC2086  # a list of package names
        download "$folder/deb" $wanted || return 1
        find "$folder/deb" -name '*.deb' -exec dpkg -x {} "$folder/root" \;
        if ! lacks_libraries "$folder/root"; then break; fi
        # shellcheck disable=SC2086
        wanted=$(missing_dependencies $wanted)
        [[ -n $wanted && $round -lt 4 ]] || return 1
    done
    rm -rf -- "$folder/deb" "$folder/apt"
}

# The first try uses the system's package lists. They may be missing or old: then private ones are fetched.
download() {
    local folder=$1
    shift
    if (cd "$folder" && apt-get "${apt_options[@]}" -qq download "$@") >"$folder/log" 2>&1; then return; fi
    if [[ ${#apt_options[@]} -eq 0 ]]; then
        say "no current package lists here: fetching them into .tools"
        mkdir -p "$folder/../apt/lists/partial" "$folder/../apt/cache/archives/partial"
        apt_options=(-o "Dir::State::Lists=$folder/../apt/lists" -o "Dir::Cache=$folder/../apt/cache"
            -o "APT::Sandbox::User=root")
        if apt-get "${apt_options[@]}" -qq update >"$folder/log" 2>&1 &&
            (cd "$folder" && apt-get "${apt_options[@]}" -qq download "$@") >>"$folder/log" 2>&1; then
            return
        fi
    fi
    say "apt-get could not download $*:"
    tail -n 5 "$folder/log" >&2
    return 1
}

# missing_dependencies PACKAGE…: libraries that these depend on and that are not installed.
missing_dependencies() {
    local name
    # An alternative ("|Depends:") is followed by the one it may be replaced with: the first one is taken.
    apt-cache "${apt_options[@]}" depends --important "$@" |
        awk '/Depends:/ { if (!skip && $2 ~ /^lib/) print $2; skip = /\|/ }' | sort -u |
        while read -r name; do
            dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null | grep -q '^ii' || printf '%s\n' "$name"
        done
}

lacks_libraries() {
    local root=$1 path program
    path=$(library_path "$root")
    while read -r program; do
        [[ $(LD_LIBRARY_PATH=$path ldd "$program" 2>/dev/null || true) != *'not found'* ]] || return 0
    done < <(find "$root" -type f -path '*bin/*' -perm -u+x)
    return 1
}

library_path() {
    find "$1" -path '*/lib/*' \( -name '*.so' -o -name '*.so.*' \) -printf '%h\n' | sort -u | paste -sd :
}

# write_wrapper GROUP PROGRAM: .tools/bin/PROGRAM runs the unpacked one with the unpacked libraries.
write_wrapper() {
    local root=$TOOLS/$1/root program libraries
    program=$(find "$root" -path "*bin/$2" -print -quit)
    [[ -n $program ]] || return 0
    libraries=$(library_path "$root")
    cat >"$TOOLS/bin/$2" <<TEXT
#!/bin/sh
tools=\$(cd -- "\${0%/*}/.." && pwd)
export LD_LIBRARY_PATH="${libraries//"$TOOLS"/\$tools}"
export SYSTEMD_UNIT_PATH="\$tools/$1/root/lib/systemd/system:\$tools/$1/root/usr/lib/systemd/system"
exec "${program/#"$TOOLS"/\$tools}" "\$@"
TEXT
    chmod +x "$TOOLS/bin/$2"
}

# --- This process's surroundings ------------------------------------------------------------------------

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

main "$@"
