# shellcheck shell=bash
# What the boot test needs before it can start: a Debian root, two models in files, and signed bundles. build.sh sources
# this file, which uses its constants, say and die.

# prepare_boot_test FOLDER ARCH: FOLDER/{model,guest}.tar, three bundles and their packages in FOLDER/dist, the key that signed them in
# FOLDER/release.pub, and .tools/debian-12.
prepare_boot_test() {
    local work=$1 arch=$2
    make_debian_root "$TOOLS/debian-12"
    rm -rf -- "$work"
    mkdir -p "$work/dist"
    export_models "$work" edge_agent/demo/sample_model=model.tar
    "$VENV/bin/python" -W ignore -m tests.boot.guest "$work/guest.tar"
    make_release_key "$work"
    # The version to install, a higher one, and one whose daemon ends at once.
    make_test_bundle "$work" "$arch" 0.1.0 ''
    make_test_bundle "$work" "$arch" 0.1.1 ''
    make_test_bundle "$work" "$arch" 0.1.2 'raise SystemExit("this version does not start")'
}

# make_release_key FOLDER: FOLDER/release.{pem,pub}, which signs bundles.
make_release_key() {
    openssl ecparam -name prime256v1 -genkey -noout -out "$1/release.pem"
    openssl pkey -in "$1/release.pem" -pubout -out "$1/release.pub"
}

# make_debian_root FOLDER: Debian 12 with systemd, Python (without ensurepip, as on a device), mosquitto, and openssl for
# signed bundles.
make_debian_root() {
    local root=$1 mirror packages=systemd,systemd-sysv,python3,mosquitto,mosquitto-clients,openssl
    if [[ -f $root/.complete && $(<"$root/.complete") == "$packages" ]]; then return; fi
    mirror=$(debian_mirror)
    rm -rf -- "$root" "$root.new"
    say "making a Debian root in .tools"
    DEBOOTSTRAP_DIR=$(find "$TOOLS/debootstrap" /usr/share/debootstrap -name functions -printf '%h\n' 2>/dev/null |
        head -n 1) debootstrap --variant=minbase \
        --include="$packages" bookworm "$root.new" "$mirror" >"$TOOLS/debootstrap.log" 2>&1 ||
        die "debootstrap failed: see .tools/debootstrap.log"
    printf '%s\n' "$packages" >"$root.new/.complete"
    mv -- "$root.new" "$root"
}

# Where this host's packages come from.
debian_mirror() {
    # shellcheck disable=SC2016  # apt's own variable
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Codename: bookworm' |
        head -n 1 | grep . || die "this host's package sources have no Debian 12"
}

# export_models FOLDER SOURCE=FILE…: FOLDER/FILE, what a USB stick would carry; versions 1, 2, … of one registered model.
export_models() {
    local work=$1 agent=("$VENV/bin/python" -m edge_agent --config "$1/publish.toml") version=0 each
    shift
    cat >"$work/publish.toml" <<TEXT
state_dir = "$work/state"
registry.uri = "sqlite:///$work/registry.db"
models.assistant.uri = "models:/sample@prod"
TEXT
    for each in "$@"; do
        version=$((version + 1))
        "${agent[@]}" publish "${each%%=*}" --name sample --alias prod
        "${agent[@]}" models pull
        "${agent[@]}" models export assistant "$version" "$work/${each#*=}"
    done
}

# make_test_bundle FOLDER ARCH VERSION CODE [PYTHON]: a bundle and a package of these sources as VERSION, whose daemon
# begins with CODE.
make_test_bundle() {
    local work=$1 arch=$2 version=$3 code=$4 python=${5:-3.11} source=$1/source-$3
    mkdir -p "$source"
    cp -a edge_agent systemd docs pyproject.toml README.md LICENSE "$source/"
    sed -i "s/^__version__ = .*/__version__ = \"$version\"/" "$source/edge_agent/__init__.py"
    if [[ -n $code ]]; then
        sed -i "s/^from __future__ import annotations$/&\n$code/" "$source/edge_agent/daemon.py"
        grep -qxF -- "$code" "$source/edge_agent/daemon.py" || die "daemon.py has no place for the test's code"
    fi
    "$VENV/bin/python" -m build --no-isolation --wheel --outdir "$source/dist" "$source" >/dev/null
    SOURCE_DATE_EPOCH=1767225600 "$VENV/bin/python" .ci/bundle.py --arch "$arch" --python "$python" \
        --sign-key "$work/release.pem" --wheel "$source"/dist/*.whl --cache "$TOOLS/wheelhouse" --out "$work/dist"
    SOURCE_DATE_EPOCH=1767225600 "$VENV/bin/python" .ci/deb.py --out "$work/dist" \
        --bundle "$work/dist/edge-agent-$version-linux-$arch.tar.gz"
}
