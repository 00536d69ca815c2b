#!/bin/bash -p
# Installs, switches and removes versions of edge-agent on a device, from the files beside this script. Needs no
# network.
#
# Each version is a virtual environment in /opt/edge-agent/VERSION. It is created and tested before one rename
# switches the link /opt/edge-agent/current to it. If something fails before that, the running version stays as it
# is; if the service does not start afterwards, the old version is restored, by the next boot if the power goes meanwhile.
#
# Root may be in anybody's folder: nothing is run, imported or read from there but what the command line names. With -p,
# bash takes no code from the environment either.

set -euo pipefail
umask 022
unset BASH_ENV CDPATH OPENSSL_CONF "${!PYTHON@}"
script=${BASH_SOURCE[0]}
[[ $script == /* ]] || script=$PWD/$script
started_in=$PWD
cd /

usage() {
    cat <<'TEXT'
usage: ./install.sh [install] [--from DIR] [--verify-key FILE] [--no-start] [--root DIR]
       ./install.sh use VERSION [--no-start]
       ./install.sh list
       ./install.sh settle
       ./install.sh uninstall [--purge]

  install       install the version in this bundle, newer or older than the current one, and start it (as root)
  use VERSION   switch to another installed version; the current one and the previous one are kept
  list          list the installed versions
  settle        end a switch that was cut: wait for the version that nobody has seen start, or restore the one before it.
                The unit edge-agent-settle does this at boot
  uninstall     remove program, units and links; models, prompts and settings stay
  --purge       remove these and the user edge-agent, too
  --from DIR    install the bundle in DIR instead of the one beside this script
  --verify-key FILE
                first check that the bundle was signed with this public key (PEM), and install a copy of it that only
                root can change. The script in a forged bundle would not check: start the installed one, with --from
  --no-start    leave the service as it is: stopped, or running the old version
  --root DIR    for tests: install below DIR, as any user; no service is started, no user created

The first installation enables the service. One that was disabled since stays disabled, and stopped if it is.

An installed version contains this script: /opt/edge-agent/current/install.sh uninstall

Examples:
  sudo ./install.sh
  sudo /opt/edge-agent/current/install.sh --from ./edge-agent-0.2.0-linux-aarch64 --verify-key /etc/edge-agent/release.pub
  sudo /opt/edge-agent/current/install.sh use 0.1.0
TEXT
}

say() { printf 'install.sh: %s\n' "$*" || true; } # the terminal may have gone
die() {
    printf 'install.sh: %s\n' "$@" >&2 || true
    exit 1
}

main() {
    local command=install purge=no start=yes root='' wanted='' from='' key=''
    case ${1:-} in
        install | list | settle | uninstall) command=$1 && shift ;;
        use)
            command=use wanted=${2:-}
            [[ $wanted =~ ^[0-9][A-Za-z0-9.+-]*$ ]] || die "use needs a version; see ./install.sh list"
            shift 2
            ;;
    esac
    while [[ $# -gt 0 ]]; do
        case $1 in
            --purge) purge=yes ;;
            --no-start) start=no ;;
            --from)
                from=$(absolute "${2:-}")
                [[ $command == install && -n ${2:-} && -d $from ]] || die "--from needs the folder of an unpacked bundle"
                shift
                ;;
            --verify-key)
                key=$(absolute "${2:-}")
                [[ $command == install && -f $key ]] || die "--verify-key needs a file with a public key (PEM)"
                shift
                ;;
            --root)
                root=${2:-}
                [[ $root == /* && -d $root ]] || die "--root needs the absolute path of an existing folder"
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
    here=${from:-$(dirname -- "$(readlink -f -- "$script")")}
    set_places
    if [[ $command == list ]]; then
        list
        return
    fi
    [[ -n $root || $EUID -eq 0 ]] || die "only root can do this: sudo $0 $command"
    if [[ -z $root && $command != uninstall ]]; then
        command -v systemctl >/dev/null || die "this host has no systemd"
    fi
    lock
    case $command in
        install) install_bundle ;;
        use) use_version "$wanted" ;;
        settle) settle ;;
        uninstall) uninstall ;;
    esac
}

# What is where below the root.
set_places() {
    base=$root/opt/edge-agent
    units=(edge-agent.service edge-agent-http.socket edge-agent-http.service)
    settler=edge-agent-settle.service
}

# One script at a time changes what is installed.
lock() {
    mkdir -p -- "$base"
    exec 9>"$base/.lock"
    if ! flock -n 9; then # at boot, one may wait for a version that loads its models
        say "waiting for another install.sh"
        flock -w 900 9 || die "another install.sh is running"
    fi
    [[ $base/.lock -ef /dev/fd/9 ]] || die "another install.sh has just uninstalled edge-agent: run this one again"
}

# absolute PATH: prints the path as it was meant where the script was started.
absolute() {
    if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$started_in/$1"; fi
}

# Whether there is a systemd to talk to. There is none where the image of a device is made, and none with --root.
systemd_runs() {
    [[ -z $root && -d /run/systemd/system ]]
}

# unit_files ARGUMENT…: systemctl on what it needs no running systemd for; with --root, if there is a systemctl here.
unit_files() {
    [[ -z $root ]] || command -v systemctl >/dev/null || return 0
    systemctl ${root:+"--root=$root"} "$@"
}

# --- install ----------------------------------------------------------------------------------------------

install_bundle() {
    local version='' arch='' python target
    making='' copy='' # global: what is removed however the script ends
    trap clean_up EXIT
    if [[ -n $key ]]; then copy_signed; fi
    check_bundle
    python=$(find_python)
    target=$(folder_for "$version" "$(python_version "$python")")
    if [[ -s $target/.complete ]]; then # and it works: folder_for has tested it
        say "version ${target##*/} is already installed"
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

clean_up() {
    if [[ -n $making ]]; then rm -rf -- "$making"; fi
    if [[ -n $copy ]]; then rm -rf -- "$copy"; fi
    rm -f -- "$base/.log"
}

# Checks who signed the bundle's sums, and copies what they name to where only root can change it. From then on, `here` is
# the copy: what is checked later is what is installed. Nothing of the bundle runs before that.
copy_signed() {
    local name needed_kb free_kb
    command -v openssl >/dev/null || die "--verify-key needs openssl: install it"
    for name in SHA256SUMS SHA256SUMS.sig; do
        [[ -f $here/$name ]] || die "the bundle is not signed: $here has no $name"
    done
    rm -rf -- "$base"/.bundle.* # left by a power cut
    copy=$(mktemp -d -- "$base/.bundle.XXXXXX")
    head -c 1000000 -- "$here/SHA256SUMS" >"$copy/SHA256SUMS"
    head -c 10000 -- "$here/SHA256SUMS.sig" >"$copy/SHA256SUMS.sig"
    openssl dgst -sha256 -verify "$key" -signature "$copy/SHA256SUMS.sig" "$copy/SHA256SUMS" >/dev/null 2>&1 ||
        die "the bundle was not signed with $key" "$(still_running)"
    needed_kb=$(du -sk -- "$here" | cut -f 1)
    free_kb=$(space_kb)
    [[ $free_kb -ge $needed_kb ]] || die "$base has no space for a copy of the bundle: $((needed_kb / 1000)) MB are needed"
    (cd -- "$here" && cut -c 67- "$copy/SHA256SUMS" | tr '\n' '\0' | xargs -0 cp -RP --parents -t "$copy" --) ||
        die "the bundle lacks a file that its sums name" "$(still_running)"
    [[ -z $(find "$copy" ! -type f ! -type d -print -quit) ]] || die "the bundle has a link or a device in it"
    say "the bundle was signed with $key"
    here=$copy
}

space_kb() {
    df -Pk -- "$base" | awk 'NR == 2 { print $4 }'
}

# Checks that the bundle is complete and made for this host. Sets version and arch.
check_bundle() {
    local key value glibc
    [[ -f $here/SHA256SUMS && -f $here/bundle ]] || die "there is no bundle beside $here/install.sh" \
        "unpack edge-agent-VERSION-linux-ARCH.tar.gz, and run the install.sh in it"
    say "checking the bundle"
    (cd -- "$here" && sha256sum --quiet --strict --check SHA256SUMS) ||
        die "the bundle is damaged, see above; copy it again"
    while IFS='=' read -r key value; do
        case $key in
            version) version=$value ;;
            arch) arch=$value ;;
        esac
    done <"$here/bundle"
    [[ $version =~ ^[0-9][A-Za-z0-9.+]*$ ]] || die "the bundle has no version number"
    [[ $(uname -s)-$(uname -m) == "Linux-$arch" ]] ||
        die "this bundle is for Linux on $arch, but this host is $(uname -s) on $(uname -m)"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d ' ' -f 2 || true)
    [[ -n $glibc ]] || die "this host has no GNU C library; musl (Alpine) is not supported"
    [[ $(printf '%s\n' 2.28 "$glibc" | sort -V | head -n 1) == 2.28 ]] ||
        die "this host has GNU C library $glibc; 2.28 or newer is needed"
}

# Finds a Python for which the bundle has wheels.
find_python() {
    local path name has lacking=''
    has=$(cd -- "$here" && printf '%s\n' requirements-*.txt | sed 's/requirements-\(.*\)\.txt/\1/' | sort -V | xargs)
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        path=$(command -v "$name" || true)
        if [[ -n $path && " $has " == *" $(python_version "$path") "* ]]; then
            # Itself, python3.11 for one, and not what today's link python3 leads to.
            if "$path" -I -c 'import os, sys, venv, ssl, sqlite3, ctypes; print(os.path.realpath(sys.executable))' \
                2>/dev/null; then
                return
            fi
            lacking=$path
        fi
    done
    [[ -z $lacking ]] ||
        die "$lacking lacks a module of the standard library: install all of python3 (venv, ssl, sqlite3)"
    path=$(command -v python3 || true)
    die "this bundle supports Python $has," \
        "but this host has ${path:-no python3}${path:+ $(python_version "$path")}; install one of these versions," \
        "or make a bundle with ./build.sh package --python VERSION"
}

python_version() {
    "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# folder_for VERSION PYTHON: prints the folder of this build if it is installed and works, else the folder to install it to.
# Another build of the same version gets a new folder, and so does a build that no longer works, or was made with another
# Python than the system now has and may soon lose: the files of a running version must not change.
folder_for() {
    local digest folder
    digest=$(sha256sum <"$here/SHA256SUMS" | cut -c 1-12)
    for folder in "$base/$1" "$base/$1-$digest"; do
        if [[ $(complete "$folder") == "$digest" && -d $folder/lib/python$2 ]] && works "$folder" >/dev/null 2>&1; then
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
    die "other builds of version $1 occupy its folders: use another version, or uninstall first"
}

# complete FOLDER: prints the digest of the bundle it was made from; nothing if it is not complete.
complete() {
    if [[ -s $1/.complete ]]; then cat -- "$1/.complete"; fi
}

# works FOLDER: succeeds if its program and libraries load on this host, else prints why not.
works() {
    "$1/bin/edge-agent" --version 2>&1 || return
    ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true PYTHONDONTWRITEBYTECODE=1 HOME=/nonexistent \
        "$1/bin/python" -I -c 'import onnxruntime_genai, mlflow.pyfunc' 2>&1
}

# make_version PYTHON FOLDER: creates and tests a virtual environment with everything in it. It removes the folder if a
# step fails.
make_version() {
    local python=$1 target=$2 version log free_kb file
    version=$(python_version "$python")
    free_kb=$(space_kb)
    [[ $free_kb -ge 700000 ]] || die "$base has $((free_kb / 1000)) MB of free space; 700 MB are needed"
    rm -rf -- "$target"
    making=$target
    log=$base/.log
    say "creating $target with Python $version"
    # Debian has ensurepip in a separate package, so pip runs from its wheel and is not installed.
    "$python" -I -m venv --without-pip "$target" >"$log" 2>&1 || failed "the virtual environment cannot be created"
    PIP_CONFIG_FILE=/dev/null \
        "$target/bin/python" -I "$(printf '%s\n' "$here"/wheels/pip-*.whl)/pip" install --quiet \
        --no-index --no-cache-dir --no-deps --no-compile --disable-pip-version-check --no-input \
        --root-user-action=ignore --require-hashes --find-links "$here/wheels" \
        --requirement "$here/requirements-$version.txt" >"$log" 2>&1 || failed "the packages cannot be installed"
    say "compiling"
    # Some packages contain templates that are not valid Python, so errors are ignored. Nobody runs the tests that some
    # bring, and they are a quarter of all bytecode.
    "$target/bin/python" -I -m compileall -q -j 0 -x '/site-packages/.*/tests/' "$target/lib" >"$log" 2>&1 || true
    mkdir -p -- "$target/share/edge-agent"
    for file in "${units[@]}" edge-agent.sysusers.conf; do
        if [[ $file == edge-agent-http.* && ! -f $here/$file ]]; then continue; fi # the bundle of an older version
        install -m 0644 -- "$here/$file" "$target/share/edge-agent/"
    done
    install -m 0755 -- "$here/install.sh" "$target/install.sh"
    say "testing it"
    works "$target" >"$log" || failed "the program or one of its libraries does not load on this host"
    # All files are on the disk before the folder counts as complete, and its mark before the link points to it.
    flush
    sha256sum <"$here/SHA256SUMS" | cut -c 1-12 >"$target/.complete"
    flush
    making=''
}

# Skipped with --root, for tests.
flush() {
    [[ -n $root ]] || sync -f -- "$base" 2>/dev/null || sync
}

# put SOURCE TARGET [MODE]: replaces a file with one rename, so that a power cut leaves either the old or the new file.
put() {
    local new
    new=$(dirname -- "$2")/.${2##*/}.new
    install -m "${3:-0644}" -- "$1" "$new"
    [[ -n $root ]] || sync -- "$new" 2>/dev/null || sync
    mv -T -- "$new" "$2"
}

failed() {
    tail -n 15 -- "$base/.log" >&2 || true
    die "$1, see above" "$(still_running)"
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

# Existing settings belong to the operator. Only root can read the folder for secrets.
write_settings() {
    mkdir -p -- "$root/etc/edge-agent"
    if [[ -e $root/etc/edge-agent/config.toml ]]; then
        say "the existing settings stay as they are"
    else
        put "$here/config.toml" "$root/etc/edge-agent/config.toml"
    fi
    [[ -d $root/etc/credstore ]] || install -d -m 0700 -- "$root/etc/credstore"
}

# --- The switch -------------------------------------------------------------------------------------------

# switch_to FOLDER: makes a complete version the current one. If the service does not start with it, the version that
# last did is restored.
switch_to() {
    local target=$1 old='' proven disabled=no http changed
    # Who has switched must see whether it starts: a line that drops meanwhile ends nothing, and Ctrl-C ends the wait.
    trap '' HUP PIPE
    trap 'say "interrupted"' INT TERM
    http=$(unit_files is-enabled edge-agent-http.socket 2>/dev/null || true)
    if [[ -L $base/current ]]; then old=$(readlink -- "$base/current"); fi
    proven=$(last_proven)
    if [[ ! -s $base/$proven/.complete ]] || has_started "$old"; then proven=$old; fi
    say_what_stops "$target"
    if operator_disabled; then disabled=yes; fi
    begin_trial
    point_to "${target##*/}"
    write_units "$target"
    if [[ $disabled == no ]]; then
        enable_service
    elif service_stopped; then
        say "the service is disabled and stopped, and stays so; to start it: systemctl enable --now edge-agent"
        start=no
    else
        say "the service is disabled, and stays so"
    fi
    if [[ -n $root ]]; then
        rm -f -- "$base/.trial"
        return
    fi
    if [[ ! -L /usr/bin/edge-agent ]]; then # the Debian package's
        mkdir -p /usr/local/bin
        ln -sfn -- "$base/current/bin/edge-agent" /usr/local/bin/edge-agent
    fi
    if [[ $start == no ]]; then return; fi
    if ! systemd_runs; then
        say "no systemd runs here: the service starts at the next boot"
        return
    fi
    say "starting the service"
    end_trial restart
}

# last_proven: prints the version that was last seen to start, if the current one was not yet.
last_proven() {
    if [[ -s $base/.trial ]]; then head -n 1 -- "$base/.trial"; fi
}

# has_started VERSION: whether the service runs with it, and is ready.
has_started() {
    [[ -n $1 && $(running_version) == "$1" ]] && systemctl --quiet is-active edge-agent.service
}

# begin_trial: from here on, a power cut leaves the mark, and a unit and a script that end the trial at boot. They come before
# the switch, and belong to no version: the one on trial may know nothing of them.
begin_trial() {
    local from=$here/install.sh
    if [[ -z $proven ]]; then return; fi
    grep -qs '^settle()' -- "$from" || from=$script # the bundle of an older version
    put "$from" "$base/.settle" 0755
    mkdir -p -- "$root/etc/systemd/system"
    put <(settle_unit) "$root/etc/systemd/system/$settler"
    unit_files --quiet enable "$settler"
    printf '%s\n' "$proven" "$http" >"$base/.trial.new"
    [[ -n $root ]] || sync
    mv -T -- "$base/.trial.new" "$base/.trial"
}

settle_unit() {
    cat <<'TEXT'
[Unit]
Description=Ends a change of edge-agent's version that was cut before the new one had started
# A change leaves this mark only where the power went, or where it was told not to start anything.
ConditionPathExists=/opt/edge-agent/.trial
RequiresMountsFor=/opt/edge-agent
After=edge-agent.service

[Service]
# Not oneshot: the rest of the boot does not wait for models that load.
Type=exec
ExecStart=/opt/edge-agent/.settle settle

[Install]
WantedBy=multi-user.target
TEXT
}

# end_trial start|restart: of the version $target; $proven is restored if it does not start, and $http with it.
end_trial() {
    if systemctl "$1" edge-agent.service; then
        rm -f -- "$base/.trial"
        systemctl --quiet try-restart edge-agent-http.service 2>/dev/null || true # it may be at work, with the old version
        return
    fi
    [[ $(systemctl is-system-running 2>/dev/null || true) != stopping ]] ||
        die "the system goes down: the next boot tells whether version ${target##*/} starts"
    show_trouble
    if [[ -z $proven || $proven == "${target##*/}" || ! -s $base/$proven/.complete ]]; then
        rm -f -- "$base/.trial"
        die "the service does not start, see above; correct this, then: systemctl restart edge-agent"
    fi
    say "restoring version $proven"
    point_to "$proven"
    write_units "$base/$proven"
    # The version that did not start may be one that knows no such unit, and was rid of it.
    [[ $http != enabled ]] || systemctl --quiet enable --now edge-agent-http.socket || true
    rm -f -- "$base/.trial"
    if systemctl restart edge-agent.service; then
        die "version ${target##*/} did not start, see above; version $proven is running again"
    fi
    show_trouble
    die "neither version ${target##*/} nor version $proven, which is current again, starts: see above" \
        "correct this, then: systemctl restart edge-agent"
}

# settle: ends the trial of the current version. One whose service an operator has disabled goes on being on trial.
settle() {
    local target proven http running action=start changed=no
    systemd_runs || die "no systemd runs here"
    proven=$(last_proven)
    if [[ -z $proven ]]; then
        say "no version is on trial"
        return
    fi
    target=$base/$(readlink -- "$base/current")
    if operator_disabled; then
        say "the service is disabled, and stays so: version ${target##*/} is still on trial"
        return
    fi
    http=$(sed -n 2p -- "$base/.trial") # as it was before the switch
    write_units "$target" # the switch, or the way back, may have been cut just before that
    running=$(running_version)
    if [[ $changed == yes || ( -n $running && $running != "${target##*/}" ) ]]; then action=restart; fi
    say "waiting for version ${target##*/}, which nobody has seen start yet"
    end_trial "$action"
    say "version ${target##*/} has started"
}

# Whether the service is disabled, and not because its first installation, or an uninstallation, was cut half way: from
# before its unit comes until it is enabled, and from before it is disabled to go, there is the mark .enable.
operator_disabled() {
    if [[ ! -e $root/etc/systemd/system/edge-agent.service ]]; then
        : >"$base/.enable"
        flush
    fi
    [[ ! -e $base/.enable && $(unit_files is-enabled edge-agent.service 2>/dev/null || true) == disabled ]]
}

enable_service() {
    unit_files --quiet enable edge-agent.service
    if [[ -e $base/.enable ]]; then
        [[ -n $root ]] || sync # the link first: it may be on another file system than the mark
        rm -f -- "$base/.enable"
    fi
}

service_stopped() {
    ! systemd_runs || [[ $(systemctl is-active edge-agent.service || true) == @(inactive|failed) ]]
}

# say_what_stops FOLDER: names the models that this version will not run, because this kernel cannot confine their code.
say_what_stops() {
    local line
    while IFS= read -r line; do
        say "attention: $line"
    done < <(cd / && STATE_DIRECTORY=$root/var/lib/edge-agent "$1/bin/python" -I -m edge_agent.doctor.walls \
        "$root/etc/edge-agent/config.toml" 2>/dev/null || true)
}

# One rename, so that the link is valid at every moment.
point_to() {
    ln -sfn -- "$1" "$base/.current"
    mv -T -- "$base/.current" "$base/current"
    if [[ -n ${old:-} && $old != "$1" ]]; then printf '%s\n' "$old" >"$base/.previous"; fi
}

# write_units FOLDER: those of a version; one that it does not know yet is removed. Sets changed if one has changed.
write_units() {
    local name unit
    mkdir -p -- "$root/etc/systemd/system"
    for name in "${units[@]}"; do
        unit=$root/etc/systemd/system/$name
        if [[ -f $1/share/edge-agent/$name ]]; then
            if cmp -s -- "$1/share/edge-agent/$name" "$unit"; then continue; fi
            put "$1/share/edge-agent/$name" "$unit"
            changed=yes
        elif [[ -e $unit ]]; then
            remove_unit "$name"
        fi
    done
    if systemd_runs; then systemctl daemon-reload; fi
}

remove_unit() {
    if systemd_runs; then
        systemctl --quiet disable --now "$1" 2>/dev/null || true
    else
        unit_files --quiet disable "$1" 2>/dev/null || true
    fi
    rm -f -- "$root/etc/systemd/system/$1"
}

show_trouble() {
    systemctl --no-pager --lines=0 status edge-agent.service >&2 || true
    journalctl --no-pager --unit=edge-agent.service --lines=10 --output=cat >&2 || true
}

use_version() {
    local target=$base/$1
    [[ -s $target/.complete ]] || die "version $1 is not installed; installed versions: $(list | xargs)"
    switch_to "$target"
    say "edge-agent $1 is the current version"
}

list() {
    local folder
    for folder in "$base"/*/; do
        if [[ -s $folder/.complete && ! -L ${folder%/} ]]; then basename -- "$folder"; fi
    done
}

# Keeps the current, the previous and the running version, and the one that last started; with --no-start they may be four.
remove_old_versions() {
    local folder name current previous='' running proven
    current=$(readlink -- "$base/current")
    if [[ -f $base/.previous ]]; then previous=$(<"$base/.previous"); fi
    running=$(running_version)
    proven=$(last_proven)
    for folder in "$base"/*/; do
        name=$(basename -- "$folder")
        if [[ -L ${folder%/} ]]; then continue; fi
        case $name in "$current" | "$previous" | "$running" | "$proven") continue ;; esac
        [[ -f $folder/pyvenv.cfg ]] || continue
        say "removing $name"
        rm -f -- "$folder/.complete" # first: a half-removed folder must not count as a version
        rm -rf -- "$folder"
    done
}

# Prints the name of the folder whose Python is the service's main process.
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
    local name
    if [[ -z $root ]]; then
        rm -f -- /etc/sysusers.d/edge-agent.conf /usr/local/bin/edge-agent
    fi
    : >"$base/.enable" || true # a full disk can be emptied
    flush
    rm -f -- "$base/.trial" # nothing comes back
    for name in "$settler" "${units[@]}"; do remove_unit "$name"; done
    if systemd_runs; then
        systemctl daemon-reload
        systemctl reset-failed "$settler" "${units[@]}" 2>/dev/null || true
    fi
    rm -f -- "$base"/*/.complete # first: leftovers of a power cut must not count as versions
    rm -rf -- "$base"
    # What comes after this, dpkg's note of it for one, must not outlive it in a power cut.
    [[ -n $root ]] || sync
    if [[ $purge == yes ]]; then
        purge_data
    else
        say "removed; $root/var/lib/edge-agent and $root/etc/edge-agent stay (--purge removes them, too)"
    fi
}

# What outlives the program: models, prompts, settings and the user.
purge_data() {
    local name
    # If the state is a mounted file system, empty it and leave it mounted.
    if mountpoint -q "$root/var/lib/edge-agent"; then
        find "$root/var/lib/edge-agent" -xdev -mindepth 1 -delete
    else
        rm -rf -- "$root/var/lib/edge-agent"
    fi
    rm -rf -- "$root/etc/edge-agent"
    for name in "${units[@]}"; do rm -rf -- "$root/etc/systemd/system/$name.d"; done
    if [[ -z $root ]]; then
        userdel edge-agent 2>/dev/null || true
        groupdel edge-agent 2>/dev/null || true
    fi
    say "removed everything except the secrets in $root/etc/credstore"
}

main "$@"
exit
