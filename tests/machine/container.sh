# shellcheck shell=bash
# What `machine-test --container` needs: a Debian on an ext4 in a file, and what makes a block device of a disk that forgets.
# build.sh sources this file, which uses its constants, say and die, and functions of prepare.sh here and in tests/boot.

# container_test [OPTION…]: makes what is missing, and hands over to tests/machine in namespaces of its own: no mount outlives
# it, and there is no network but loopback.
container_test() {
    local machines=$TOOLS/machine options=() each
    for each in "$@"; do
        [[ $each == --container ]] || options+=("$each")
    done
    [[ $EUID -eq 0 ]] || die "machine-test --container mounts and boots: start it as root"
    [[ -w /dev/fuse && -w /dev/loop-control ]] || die "machine-test --container needs /dev/fuse and loop devices"
    set_up dev
    need_programs debootstrap debootstrap -- debootstrap
    need_programs nspawn systemd-nspawn -- systemd-container libsystemd-shared
    need_programs nbdfuse nbdfuse -- libnbd-bin libnbd0 libfuse3-3
    need_programs mosquitto mosquitto mosquitto_pub mosquitto_sub mosquitto_rr -- mosquitto mosquitto-clients
    mkdir -p "$machines"
    make_container "$machines/container-12"
    make_machine_bundles "$machines/bundles-container-12" "$(uname -m)" 12
    exec unshare --mount "$VENV/bin/python" -m tests.support.namespaces offline "$VENV/bin/python" -m tests.machine \
        --container --image "$machines/container-12" --bundles "$machines/bundles-container-12" \
        --work "$machines/work-container" "${options[@]}"
}

# make_container FOLDER: FOLDER/disk.raw, the Debian of the boot test with a journal that stays.
make_container() {
    local folder=$1 new=$1.new root=$1.new/root unit key
    key=$(cat tests/machine/container.sh "$TOOLS/debian-12/.complete" 2>/dev/null | sha256sum | cut -d ' ' -f 1)
    if [[ -f $folder/.complete && $(<"$folder/.complete") == "$key" ]]; then return; fi
    make_debian_root "$TOOLS/debian-12"
    say "making a file system for containers"
    rm -rf -- "$folder" "$new"
    mkdir -p "$new"
    cp -a --reflink=auto "$TOOLS/debian-12" "$root"
    for unit in mosquitto.service systemd-networkd.service systemd-networkd.socket e2scrub_reap.service \
        {apt-daily,apt-daily-upgrade,dpkg-db-backup,e2scrub_all,fstrim}.timer; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    printf 'machine\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost machine\n' >"$root/etc/hosts"
    mkdir -p "$root/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=persistent\nSystemMaxUse=50M\n' \
        >"$root/etc/systemd/journald.conf.d/machine.conf"
    truncate -s 4000M "$new/disk.raw"
    mkfs.ext4 -q -F -L machine -d "$root" "$new/disk.raw"
    rm -rf -- "$root"
    cat tests/machine/container.sh "$TOOLS/debian-12/.complete" | sha256sum | cut -d ' ' -f 1 >"$new/.complete"
    mv -- "$new" "$folder"
}
