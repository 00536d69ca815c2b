# shellcheck shell=bash
# What the machine test needs before it can start: a Debian that boots by itself, as a disk's image with a kernel beside it.
# build.sh sources this file, which uses its constants, say and die, and download of programs.sh.

readonly MACHINE_PACKAGES=systemd,systemd-sysv,udev,kmod,iproute2,python3,openssl
readonly MACHINE_DISK_MB=6000
# What finds a root file system on a virtio disk. Some are in the kernel of one release and a module of another.
readonly MACHINE_MODULES='virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio virtio_blk
    crc16 crc32c_generic libcrc32c crc32c-intel crc32c_cryptoapi mbcache jbd2 ext4'
readonly BINFMT=/proc/sys/fs/binfmt_misc # where Linux is told which program runs those of another architecture

# need_machine_programs: qemu, which emulates both architectures, and what makes a Debian.
need_machine_programs() {
    need_programs debootstrap debootstrap -- debootstrap
    need_programs qemu qemu-system-x86_64 qemu-system-aarch64 -- \
        qemu-system-{x86,arm,common,data} seabios ipxe-qemu
    need_programs mosquitto mosquitto mosquitto_pub mosquitto_sub mosquitto_rr -- mosquitto mosquitto-clients
}

# make_machine FOLDER ARCH DEBIAN: FOLDER/{disk.raw,kernel,initrd}. Where this host cannot run programs of the architecture,
# the disk has what debootstrap unpacks, and the machine configures its packages itself when it boots for the first time.
make_machine() {
    local folder=$1 arch suite foreign=() archive mirror mounted new
    arch=$(debian_arch "$2")
    suite=$(debian_suite "$3")
    if [[ -f $folder/.complete && $(<"$folder/.complete") == "$(machine_key)" ]]; then return; fi
    mirror=$(debian_mirror)
    new=$folder.new
    for mounted in "$new"/root/{proc,sys}; do # of a debootstrap that was stopped
        if mountpoint -q "$mounted"; then umount "$mounted"; fi
    done
    rm -rf -- "$folder" "$new"
    mkdir -p "$new/deb"
    say "making a machine: Debian $3 on $2"
    fetch_kernel "$new" "$arch" "$suite" "$mirror"
    lend_emulator "$2" "$new/busybox" || foreign=(--foreign)
    DEBOOTSTRAP_DIR=$(find "$TOOLS/debootstrap/" /usr/share/debootstrap -name functions -printf '%h\n' 2>/dev/null |
        head -n 1) debootstrap "${foreign[@]}" --variant=minbase --arch="$arch" --include="$MACHINE_PACKAGES" \
        "$suite" "$new/root" "$mirror" >"$new/debootstrap.log" 2>&1 || die "debootstrap failed: see $new/debootstrap.log"
    rm -f -- "$new/root/var/cache/apt/archives"/linux-*.deb
    mkdir -p "$new/root/usr/lib/modules"
    cp -a -- "$(find "$new/kernel-root" -type d -path '*lib/modules/*' -prune -print -quit)" "$new/root/usr/lib/modules/"
    [[ ${#foreign[@]} -gt 0 ]] || chroot "$new/root" /sbin/depmod "$(basename -- "$new/root/usr/lib/modules"/*)"
    give_emulator_back
    cp -a tests/machine/root/. "$new/root/"
    set_up_machine "$new/root"
    make_initrd "$new" "$arch"
    archive=$new/disk.raw
    truncate -s "${MACHINE_DISK_MB}M" "$archive"
    mkfs.ext4 -q -F -L machine -d "$new/root" "$archive"
    rm -rf -- "$new/root" "$new/deb" "$new/apt"
    [[ ${#foreign[@]} -gt 0 ]] || touch "$new/.configured"
    machine_key >"$new/.complete"
    mv -- "$new" "$folder"
}

# lend_emulator ARCH ROOT: until give_emulator_back, this host runs programs of the architecture, below any root: by what it
# has for that already, or by qemu-user. ROOT has a busybox of that architecture, to try it with.
lend_emulator() {
    local arch=$1 root=$2 program from='' line
    program=/$(find "$root" -path '*bin/busybox' -printf '%P' -quit)
    if chroot "$root" "$program" true 2>/dev/null; then return; fi
    need_programs qemu-user "qemu-$arch-static" -- qemu-user-static
    [[ ! -d $TOOLS/qemu-user/root ]] || from=$TOOLS/qemu-user/root
    line=$(cat "$from/usr/lib/binfmt.d/qemu-$arch.conf" 2>/dev/null) || return
    if [[ ! -e $BINFMT/register ]]; then
        mount -t binfmt_misc none "$BINFMT" 2>/dev/null || return
        lent_mount=yes
    fi
    trap give_emulator_back EXIT # the kernel would go on with it
    # :name:type:offset:magic:mask:interpreter:flags, as Debian has it, under another name; F opens the interpreter at once.
    printf ':%s:%s:%s:F\n' "machine-test-$$" "$(cut -d : -f 3-6 <<<"$line")" "$(realpath "$from/usr/bin/qemu-$arch-static")" \
        2>/dev/null >"$BINFMT/register" || return
    chroot "$root" "$program" true 2>/dev/null
}

give_emulator_back() {
    # Its own only: another machine may be made at the same time.
    if [[ -e $BINFMT/machine-test-$$ ]]; then echo -1 >"$BINFMT/machine-test-$$"; fi
    if [[ -n ${lent_mount:-} ]]; then umount "$BINFMT"; fi
    lent_mount=''
}

debian_arch() { case $1 in x86_64) echo amd64 ;; aarch64) echo arm64 ;; *) die "machine-test: no such --arch: $1" ;; esac }
debian_suite() { case $1 in 12) echo bookworm ;; 13) echo trixie ;; *) die "machine-test: no such --debian: $1" ;; esac }

machine_key() { cat tests/machine/prepare.sh $(find tests/machine/root -type f | sort) | sha256sum | cut -d ' ' -f 1; }

# fetch_kernel FOLDER ARCH SUITE MIRROR: the release's kernel for machines like this one, and a shell that needs no library.
fetch_kernel() {
    local new=$1 arch=$2 suite=$3 mirror=$4 kernel options
    mkdir -p "$new/apt/lists/partial" "$new/apt/cache/archives/partial"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" "$suite" >"$new/apt/sources"
    : >"$new/apt/status"
    options=(-o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o "Dir::Etc::SourceList=$new/apt/sources"
        -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$new/apt/lists" -o "Dir::State::status=$new/apt/status"
        -o "Dir::Cache=$new/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" -qq update >"$new/apt.log" 2>&1 || die "no package lists of $suite: see $new/apt.log"
    kernel=$(apt-cache "${options[@]}" depends "linux-image-cloud-$arch" |
        sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [[ -n $kernel ]] || die "$suite has no linux-image-cloud-$arch"
    (cd "$new/deb" && apt-get "${options[@]}" -qq download "$kernel" busybox-static) >>"$new/apt.log" 2>&1 ||
        die "the kernel of $suite could not be fetched: see $new/apt.log"
    mkdir "$new/kernel-root" "$new/busybox"
    dpkg -x "$new/deb"/linux-image-*.deb "$new/kernel-root"
    dpkg -x "$new/deb"/busybox-static_*.deb "$new/busybox"
    cp -- "$new/kernel-root/boot"/vmlinuz-* "$new/kernel"
}

# set_up_machine ROOT: the units of tests/machine/root, a static address without a way to anywhere but this host.
set_up_machine() {
    local root=$1 wants=$1/etc/systemd/system/multi-user.target.wants unit
    mkdir -p "$wants"
    ln -sf /etc/systemd/system/machine-shell.service "$wants/machine-shell.service"
    ln -sf /lib/systemd/system/systemd-networkd.service "$wants/systemd-networkd.service"
    # What a machine without a keyboard does not need, and what would work beside what is tested.
    for unit in getty.target getty-static.service serial-getty@{hvc0,ttyS0,ttyAMA0}.service e2scrub_reap.service \
        {apt-daily,apt-daily-upgrade,dpkg-db-backup,e2scrub_all,fstrim}.timer; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    printf 'machine\n' >"$root/etc/hostname"
    printf '127.0.0.1 localhost machine\n' >"$root/etc/hosts"
    ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
    printf '/dev/vda / ext4 errors=remount-ro 0 1\n' >"$root/etc/fstab"
    chmod 755 "$root/usr/local/lib/machine-shell"
}

# make_initrd FOLDER ARCH: busybox, the modules that find the disk, and tests/machine/init.
make_initrd() {
    local new=$1 image=$1/initrd-root name file
    mkdir -p "$image"/{bin,modules,root,proc,sys,dev}
    cp -- "$(find "$new/busybox" -path '*bin/busybox' -print -quit)" "$image/bin/busybox"
    for name in $MACHINE_MODULES; do
        file=$(find "$new/kernel-root" -path '*/kernel/*' -name "$name.ko*" -print -quit)
        [[ -n $file ]] || continue
        case $file in
            *.xz) xz -dc -- "$file" >"$image/modules/$name.ko" ;;
            *) cp -- "$file" "$image/modules/$name.ko" ;;
        esac
        printf '%s\n' "$name" >>"$image/modules/order"
    done
    install -m 755 tests/machine/init "$image/init"
    "$VENV/bin/python" -m tests.machine.cpio "$image" | gzip -1 >"$new/initrd"
    rm -rf -- "$image" "$new/kernel-root" "$new/busybox"
}

# make_machine_bundles FOLDER ARCH DEBIAN: two signed bundles of these sources, the key that signed them, two versions of a
# model in files, and a key of them all. What is there from the same sources stays.
make_machine_bundles() {
    local folder=$1 arch=$2 python key new=$1.new
    case $3 in 12) python=3.11 ;; 13) python=3.13 ;; esac
    key=$(find edge_agent systemd pyproject.toml docs .ci tests/models tests/machine/prepare.sh -type f \
        ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1)
    if [[ -f $folder/key && $(<"$folder/key") == "$key" ]]; then return; fi
    say "making bundles for $arch and Python $python"
    rm -rf -- "$folder" "$new"
    mkdir -p "$new/work/dist"
    make_release_key "$new/work"
    make_test_bundle "$new/work" "$arch" 0.1.0 '' "$python"
    make_test_bundle "$new/work" "$arch" 0.1.1 '' "$python"
    export_models "$new/work" edge_agent/demo/sample_model=sample.model tests/models/swapped=second.model
    mv -- "$new/work/dist"/*.tar.gz "$new/work/release.pub" "$new/work"/*.model "$new/"
    rm -rf -- "$new/work"
    printf '%s\n' "$key" >"$new/key"
    mv -- "$new" "$folder"
}

# machine_test [OPTION…]: makes what is missing, and hands over to tests/machine.
machine_test() {
    local arch=x86_64 debian=12 options=() machines=$TOOLS/machine python
    if [[ " $* " == *' --container '* && " $* " != *' --help '* ]]; then
        container_test "$@"
        return
    fi
    while [[ $# -gt 0 ]]; do
        case $1 in
            --arch) arch=${2:?--arch needs x86_64 or aarch64} ;;
            --debian) debian=${2:?--debian needs 12 or 13} ;;
            *)
                options+=("$1")
                shift
                continue
                ;;
        esac
        shift 2
    done
    debian_arch "$arch" >/dev/null
    debian_suite "$debian" >/dev/null
    if [[ " ${options[*]} " == *' --help '* ]]; then exec "$VENV/bin/python" -m tests.machine --help; fi
    [[ $EUID -eq 0 ]] || die "machine-test makes a root file system: start it as root"
    set_up dev
    need_machine_programs
    mkdir -p "$machines"
    make_machine "$machines/$arch-$debian" "$arch" "$debian"
    make_machine_bundles "$machines/bundles-$arch-$debian" "$arch" "$debian"
    "$VENV/bin/python" -m tests.machine --arch "$arch" --debian "$debian" --image "$machines/$arch-$debian" \
        --bundles "$machines/bundles-$arch-$debian" --work "$machines/work" "${options[@]}"
}
