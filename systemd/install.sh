#!/usr/bin/env bash
# Installs, changes and removes edge-agent on a device, from the files beside this script. Needs no network.
#
# Each version is a virtual environment of its own in /opt/edge-agent/VERSION, made and tried before the link
# /opt/edge-agent/current is moved to it with one rename. Whatever fails before that leaves the running version
# as it is; a service that does not come up afterwards gets the old version back.

set -euo pipefail
umask 022

usage() {
    cat <<'TEXT'
usage: ./install.sh [install] [--no-start] [--root DIR]
       ./install.sh use VERSION [--no-start]
       ./install.sh list
       ./install.sh uninstall [--purge]

  install       put in the version of this bundle, newer or older than the present one, and start it (as root)
  use VERSION   go to a version that is still installed; the present one and the one before it are kept
  list          the versions that are installed
  uninstall     take away program, unit and links; models, prompts and settings stay
  --purge       … and these, and the user edge-agent, too
  --no-start    enable the service, and leave it as it is now: stopped, or running the old version
  --root DIR    for trials: install below DIR, as any user, without service and user

An installed version has this script, too: /opt/edge-agent/current/install.sh uninstall

Examples:
  sudo ./install.sh
  sudo /opt/edge-agent/current/install.sh use 0.1.0
TEXT
}

say() { printf 'install.sh: %s\n' "$*"; }
die() {
    printf 'install.sh: %s\n' "$@" >&2
    exit 1
}

main() {
    local command=install purge=no start=yes root='' wanted=''
    case ${1:-} in
        install | list | uninstall) command=$1 && shift ;;
        use)
            command=use wanted=${2:-}
            [[ $wanted =~ ^[0-9][A-Za-z0-9.+-]*$ ]] || die "use needs a version; ./install.sh list shows them"
            shift 2
            ;;
    esac
    while [[ $# -gt 0 ]]; do
        case $1 in
            --purge) purge=yes ;;
            --no-start) start=no ;;
            --root)
                root=${2:-}
                [[ $root == /* && -d $root ]] || die "--root needs a folder that is there, with its whole path"
                root=${root%/}
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                usage >&2
                exit 2
                ;;
        esac
        shift
    done
    here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
    base=$root/opt/edge-agent
    if [[ $command == list ]]; then
        list
        return
    fi
    [[ -n $root || $EUID -eq 0 ]] || die "only root can do this: sudo $0 $command"
    if [[ -z $root ]]; then
        command -v systemctl >/dev/null || die "this host has no systemd"
    fi
    mkdir -p -- "$base"
    exec 9>"$base/.lock"
    flock -w 60 9 || die "another install.sh is at work"
    [[ $base/.lock -ef /dev/fd/9 ]] || die "another install.sh has just uninstalled: start this one again"
    case $command in
        install) install_bundle ;;
        use) use_version "$wanted" ;;
        uninstall) uninstall ;;
    esac
}

# --- install ----------------------------------------------------------------------------------------------

install_bundle() {
    local version='' arch='' python target
    check_bundle
    python=$(find_python)
    target=$(folder_for "$version")
    if [[ -s $target/.complete ]]; then # and it works: folder_for has tried it
        say "version ${target##*/} is here already"
    else
        make_version "$python" "$target"
    fi
    if [[ -z $root ]]; then make_user; fi
    write_settings
    switch_to "$target"
    remove_old_versions
    say "edge-agent ${target##*/} is installed; settings: $root/etc/edge-agent/config.toml"
    say "next: edge-agent doctor"
}

# The bundle is whole, and meant for this host. Sets version and arch.
check_bundle() {
    local key value glibc
    [[ -f $here/SHA256SUMS && -f $here/bundle ]] || die "there is no bundle beside $here/install.sh" \
        "unpack edge-agent-VERSION-linux-ARCH.tar.gz, and start the install.sh in it"
    say "checking the bundle"
    (cd -- "$here" && sha256sum --quiet --strict --check SHA256SUMS) ||
        die "the bundle is damaged: see above; copy it again"
    while IFS='=' read -r key value; do
        case $key in
            version) version=$value ;;
            arch) arch=$value ;;
        esac
    done <"$here/bundle"
    [[ $version =~ ^[0-9][A-Za-z0-9.+]*$ ]] || die "the bundle names no version"
    [[ $(uname -s)-$(uname -m) == "Linux-$arch" ]] ||
        die "this bundle is for Linux on $arch, this host is $(uname -s) on $(uname -m)"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d ' ' -f 2 || true)
    [[ -n $glibc ]] || die "this host has no GNU C library; musl (Alpine) is not supported"
    [[ $(printf '%s\n' 2.28 "$glibc" | sort -V | head -n 1) == 2.28 ]] ||
        die "the GNU C library here is $glibc; 2.28 or newer is needed"
}

# A Python that the bundle has wheels for.
find_python() {
    local path name has lacking=''
    has=$(cd -- "$here" && printf '%s\n' requirements-*.txt | sed 's/requirements-\(.*\)\.txt/\1/' | sort -V | xargs)
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        path=$(command -v "$name" || true)
        if [[ -n $path && " $has " == *" $(python_version "$path") "* ]]; then
            if "$path" -c 'import venv, ssl, sqlite3, ctypes' 2>/dev/null; then
                printf '%s\n' "$path"
                return
            fi
            lacking=$path
        fi
    done
    [[ -z $lacking ]] ||
        die "$lacking lacks a module of the standard library: install python3 in full (venv, ssl, sqlite3)"
    path=$(command -v python3 || true)
    die "no Python that this bundle has libraries for: it has them for $has," \
        "here is ${path:-no python3}${path:+ $(python_version "$path")}; install one of them, or make a bundle with" \
        "./build.sh package --python VERSION"
}

python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# folder_for VERSION: where it goes; where it is, when this build of it is here and works. Another build of the same
# version gets a folder of its own, and so does one that does not work any more, after another Python came with the
# system for one: what runs from the first folder must not change under it.
folder_for() {
    local digest folder
    digest=$(sha256sum <"$here/SHA256SUMS" | cut -c 1-12)
    for folder in "$base/$1" "$base/$1-$digest"; do
        if [[ $(complete "$folder") == "$digest" ]] && works "$folder" >/dev/null 2>&1; then
            printf '%s\n' "$folder"
            return
        fi
    done
    for folder in "$base/$1" "$base/$1-$digest"; do
        if [[ $folder -ef $base/current ]]; then continue; fi
        if [[ $(complete "$folder") == "" || $(complete "$folder") == "$digest" ]]; then
            rm -f -- "$folder/.complete"
            printf '%s\n' "$folder"
            return
        fi
    done
    die "there is no room for version $1 beside other builds of it: use another version, or uninstall first"
}

# complete FOLDER: the digest of the bundle that it was made from; nothing for one that is not whole.
complete() {
    if [[ -s $1/.complete ]]; then cat -- "$1/.complete"; fi
}

# works FOLDER: its program and its libraries start on this host. Says why not.
works() {
    "$1/bin/edge-agent" --version 2>&1 || return
    ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true PYTHONDONTWRITEBYTECODE=1 HOME=/nonexistent \
        "$1/bin/python" -I -c 'import onnxruntime_genai, mlflow.pyfunc' 2>&1
}

# make_version PYTHON FOLDER: a virtual environment with everything in it, tried; whole or not there.
make_version() {
    local python=$1 target=$2 version log free_kb
    version=$(python_version "$python")
    free_kb=$(df -Pk -- "$base" | awk 'NR == 2 { print $4 }')
    [[ $free_kb -ge 700000 ]] || die "$base has $((free_kb / 1000)) MB of free space; 700 MB are needed"
    rm -rf -- "$target"
    making=$target # global: what is not whole is removed, however this ends
    trap 'rm -rf -- "$making"; rm -f -- "$base/.log"' EXIT
    log=$base/.log
    say "making $target with Python $version"
    # Debian keeps ensurepip in a package of its own: pip runs from its wheel, and is not installed.
    "$python" -m venv --without-pip "$target" >"$log" 2>&1 || failed "the virtual environment cannot be made"
    env -u PYTHONPATH -u PYTHONHOME PIP_CONFIG_FILE=/dev/null \
        "$target/bin/python" -I "$(printf '%s\n' "$here"/wheels/pip-*.whl)/pip" install --quiet \
        --no-index --no-cache-dir --no-deps --no-compile --disable-pip-version-check --no-input \
        --root-user-action=ignore --require-hashes --find-links "$here/wheels" \
        --requirement "$here/requirements-$version.txt" >"$log" 2>&1 || failed "the packages cannot be installed"
    say "compiling"
    # Some packages hold templates that are no Python: their complaints do not count.
    "$target/bin/python" -I -m compileall -q -j 0 "$target/lib" >"$log" 2>&1 || true
    mkdir -p -- "$target/share/edge-agent"
    install -m 0644 -- "$here/edge-agent.service" "$here/edge-agent.sysusers.conf" "$target/share/edge-agent/"
    install -m 0755 -- "$here/install.sh" "$target/install.sh"
    say "trying it"
    works "$target" >"$log" || failed "the program, or a library of its, does not start on this host"
    # All of it is on the medium before it is called complete, and that before the link leads there.
    flush
    sha256sum <"$here/SHA256SUMS" | cut -c 1-12 >"$target/.complete"
    flush
    trap - EXIT
    rm -f -- "$log"
}

# A trial is not worth the wait.
flush() {
    [[ -n $root ]] || sync -f -- "$base" 2>/dev/null || sync
}

# put SOURCE TARGET: replaced by one rename, so that a power cut leaves the old file or the new one.
put() {
    local new
    new=$(dirname -- "$2")/.${2##*/}.new
    install -m 0644 -- "$1" "$new"
    [[ -n $root ]] || sync -- "$new" 2>/dev/null || sync
    mv -T -- "$new" "$2"
}

failed() {
    tail -n 15 -- "$base/.log" >&2 || true
    die "$1: see above" "$(still_running)"
}

still_running() {
    if [[ -L $base/current ]]; then
        printf 'version %s stays as it is\n' "$(readlink -- "$base/current")"
    else
        printf 'nothing was installed\n'
    fi
}

make_user() {
    mkdir -p /etc/sysusers.d
    put "$target/share/edge-agent/edge-agent.sysusers.conf" /etc/sysusers.d/edge-agent.conf
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers /etc/sysusers.d/edge-agent.conf
    else
        getent passwd edge-agent >/dev/null || useradd --system --user-group --home-dir /var/lib/edge-agent \
            --shell /usr/sbin/nologin edge-agent
    fi
}

# Settings that are there are the operator's. The folder for secrets is root's alone.
write_settings() {
    mkdir -p -- "$root/etc/edge-agent"
    if [[ -e $root/etc/edge-agent/config.toml ]]; then
        say "settings are there already, and stay as they are"
    else
        put "$here/config.toml" "$root/etc/edge-agent/config.toml"
    fi
    [[ -d $root/etc/credstore ]] || install -d -m 0700 -- "$root/etc/credstore"
}

# --- The switch -------------------------------------------------------------------------------------------

# switch_to FOLDER: makes a complete version the current one. A service that does not come up with it gets the
# old one back.
switch_to() {
    local target=$1 old=''
    if [[ -L $base/current ]]; then old=$(readlink -- "$base/current"); fi
    point_to "${target##*/}"
    write_unit "$target"
    if [[ -n $root ]]; then return; fi
    mkdir -p /usr/local/bin
    ln -sfn -- "$base/current/bin/edge-agent" /usr/local/bin/edge-agent
    systemctl --quiet enable edge-agent.service
    if [[ $start == no ]]; then return; fi
    say "starting the service"
    if systemctl restart edge-agent.service; then return; fi
    show_trouble
    if [[ -z $old || $old == "${target##*/}" || ! -s $base/$old/.complete ]]; then
        die "the service does not start: see above; mend it, then: systemctl restart edge-agent"
    fi
    say "going back to $old"
    point_to "$old"
    write_unit "$base/$old"
    if systemctl restart edge-agent.service; then
        die "version ${target##*/} did not start: see above; version $old is back"
    fi
    show_trouble
    die "neither version ${target##*/} nor version $old, which is back, starts: see above" \
        "mend it, then: systemctl restart edge-agent"
}

# One rename: at every moment the link is there and whole.
point_to() {
    ln -sfn -- "$1" "$base/.current"
    mv -T -- "$base/.current" "$base/current"
    if [[ -n ${old:-} && $old != "$1" ]]; then printf '%s\n' "$old" >"$base/.previous"; fi
}

write_unit() {
    local unit=$root/etc/systemd/system/edge-agent.service
    mkdir -p -- "${unit%/*}"
    cmp -s -- "$1/share/edge-agent/edge-agent.service" "$unit" || put "$1/share/edge-agent/edge-agent.service" "$unit"
    [[ -n $root ]] || systemctl daemon-reload
}

show_trouble() {
    systemctl --no-pager --lines=0 status edge-agent.service >&2 || true
    journalctl --no-pager --unit=edge-agent.service --lines=10 --output=cat >&2 || true
}

use_version() {
    local target=$base/$1
    [[ -s $target/.complete ]] || die "version $1 is not installed; there are: $(list | xargs)"
    switch_to "$target"
    say "edge-agent $1 is the current version"
}

list() {
    local folder
    for folder in "$base"/*/; do
        if [[ -s $folder/.complete && ! -L ${folder%/} ]]; then basename -- "$folder"; fi
    done
}

# The current version, the one before it, and the one that runs stay: with --no-start that may be a third.
remove_old_versions() {
    local folder name current previous='' running
    current=$(readlink -- "$base/current")
    if [[ -f $base/.previous ]]; then previous=$(<"$base/.previous"); fi
    running=$(running_version)
    for folder in "$base"/*/; do
        name=$(basename -- "$folder")
        if [[ -L ${folder%/} || $name == "$current" || $name == "$previous" || $name == "$running" ]]; then continue; fi
        [[ -f $folder/pyvenv.cfg ]] || continue
        say "removing $name"
        rm -f -- "$folder/.complete" # first: half of it must not pass for a version
        rm -rf -- "$folder"
    done
}

# The folder whose Python is the service's main process.
running_version() {
    local pid python
    if [[ -n $root ]]; then return; fi
    pid=$(systemctl show --property=MainPID --value edge-agent.service 2>/dev/null || true)
    python=$(tr '\0' '\n' 2>/dev/null <"/proc/${pid:-0}/cmdline" | head -n 1 || true)
    python=${python#"$base/"}
    printf '%s\n' "${python%%/*}"
}

# --- uninstall --------------------------------------------------------------------------------------------

uninstall() {
    if [[ -z $root ]]; then
        systemctl --quiet disable --now edge-agent.service 2>/dev/null || true
        rm -f -- /etc/systemd/system/edge-agent.service /etc/sysusers.d/edge-agent.conf
        rm -f -- /usr/local/bin/edge-agent
        systemctl daemon-reload
        systemctl reset-failed edge-agent.service 2>/dev/null || true
    else
        rm -f -- "$root/etc/systemd/system/edge-agent.service"
    fi
    rm -f -- "$base"/*/.complete # first: what a power cut leaves must not pass for a version
    rm -rf -- "$base"
    if [[ $purge == yes ]]; then
        # State on a file system of its own: it is emptied, and stays mounted.
        if mountpoint -q "$root/var/lib/edge-agent"; then
            find "$root/var/lib/edge-agent" -xdev -mindepth 1 -delete
        else
            rm -rf -- "$root/var/lib/edge-agent"
        fi
        rm -rf -- "$root/etc/edge-agent" "$root/etc/systemd/system/edge-agent.service.d"
        if [[ -z $root ]]; then
            userdel edge-agent 2>/dev/null || true
            groupdel edge-agent 2>/dev/null || true
        fi
        say "everything is removed but the secrets in $root/etc/credstore"
    else
        say "removed; $root/var/lib/edge-agent and $root/etc/edge-agent stay (--purge takes them, too)"
    fi
}

main "$@"
exit
