# shellcheck shell=bash
# Programs that are not Python, from the system's own package archive into .tools: nothing is installed, and no
# privilege is needed. build.sh sources this file, which uses its TOOLS, LOCKS, VENV, say and die.

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

need_test_programs() {
    need_programs mosquitto mosquitto mosquitto_pub mosquitto_sub mosquitto_rr -- mosquitto mosquitto-clients
    need_programs systemd systemd-analyze systemctl -- systemd
    need_programs strace strace -- strace
    need_programs tmux tmux -- tmux
}

need_long_test_programs() {
    need_programs nginx nginx -- nginx nginx-common
    need_programs acl setfacl -- acl
    need_programs lintian lintian -- lintian # some hundred packages come with it, for one test
    need_postgres
}

need_postgres() {
    need_programs postgres initdb postgres -- "$(apt-cache depends postgresql 2>/dev/null | sed -n 's/.*Depends: \(postgresql-[0-9]*\)$/\1/p')"
}

# The brokers of `broker-test`. RabbitMQ is started by Erlang's own loader; what it is named by here is on no PATH.
need_brokers() {
    need_programs nats nats-server -- nats-server
    need_programs rabbitmq epmd beam.smp -- rabbitmq-server erlang-base \
        erlang-{asn1,crypto,eldap,inets,mnesia,os-mon,parsetools,public-key,runtime-tools,ssl,syntax-tools,tools,xmerl}
}

# Those who look at a device in `look-test`.
need_lookers() {
    need_programs prometheus prometheus promtool -- prometheus
    # A host without a screen has no fonts either.
    need_programs chromium chromium chromedriver -- chromium chromium-common chromium-driver fonts-inter
}

# need_axe: .tools/axe has axe-core, which looks for what keeps people from using a page; out of a package that carries it,
# pinned by its digest.
need_axe() {
    local folder=$TOOLS/axe wanted
    wanted=$(sha256sum <"$LOCKS/axe.txt")
    if [[ -f $folder/axe.min.js && $(cat "$folder/.stamp" 2>/dev/null) == "$wanted" ]]; then return; fi
    say "fetching axe-core"
    rm -rf -- "$folder"
    "$VENV/bin/python" -m pip download --quiet --no-deps --require-hashes --dest "$folder" -r "$LOCKS/axe.txt"
    "$VENV/bin/python" -m zipfile -e "$folder"/*.whl "$folder"
    find "$folder" -name axe.min.js -exec mv {} "$folder/axe.min.js" \;
    printf '%s\n' "$wanted" >"$folder/.stamp"
}

have_all() {
    local program
    for program in "$@"; do command -v "$program" >/dev/null || return 1; done
}

# fetch_packages GROUP PACKAGE…: unpacks them, and the libraries they need and the system lacks, into .tools/GROUP. For
# lintian, whose Perl modules ldd does not see, everything that an installation would bring.
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
        if [[ $group == lintian && $round -eq 1 ]]; then
            wanted=$(everything_for "$@")
            continue
        fi
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

# everything_for PACKAGE…: these, and all that they need and that is not installed or older.
everything_for() {
    apt-get "${apt_options[@]}" -qq --simulate --no-install-recommends install "$@" | awk '/^Inst / { print $2 }'
}

lacks_libraries() {
    local root=$1 path program
    path=$(library_path "$root")
    while read -r program; do
        [[ $(LD_LIBRARY_PATH=$path ldd "$program" 2>/dev/null || true) != *'not found'* ]] || return 0
    done < <(find "$root" -type f \( -path '*bin/*' -o -path '*/lib/chromium/chromium' \) -perm -u+x)
    return 1
}

library_path() {
    find "$1" -path '*/lib/*' ! -path '*/auto/*' \( -name '*.so' -o -name '*.so.*' \) -printf '%h\n' | sort -u | paste -sd :
}

perl_path() {
    find "$1" -type d \( -path '*/share/perl5' -o -path '*/perl5/5.*' -o -path '*/perl/5.*' \) -prune | sort | paste -sd :
}

# write_wrapper GROUP PROGRAM: .tools/bin/PROGRAM runs the unpacked one with the unpacked libraries.
write_wrapper() {
    local root=$TOOLS/$1/root program libraries modules
    program=$(find "$root" -type f -path "*/lib/$2/$2" -print -quit) # what a script on PATH starts by its place
    [[ -n $program ]] || program=$(find "$root" -path "*bin/$2" -print -quit)
    [[ -n $program ]] || return 0
    libraries=$(library_path "$root")
    modules=$(perl_path "$root")
    [[ -z $modules ]] || modules="export PERL5LIB=\"${modules//"$TOOLS"/\$tools}\""
    cat >"$TOOLS/bin/$2" <<TEXT
#!/bin/sh
tools=\$(cd -- "\${0%/*}/.." && pwd)
export LD_LIBRARY_PATH="${libraries//"$TOOLS"/\$tools}"
export SYSTEMD_UNIT_PATH="\$tools/$1/root/lib/systemd/system:\$tools/$1/root/usr/lib/systemd/system"
$modules
exec "${program/#"$TOOLS"/\$tools}" "\$@"
TEXT
    chmod +x "$TOOLS/bin/$2"
}
