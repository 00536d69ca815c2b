# shellcheck shell=bash
# Makes the wheel, the offline bundles and their Debian packages. build.sh sources this file, which uses its constants,
# say and die, and set_up of environment.sh.

# package [--arch A]… [--python V]… [--sign-key PEM]: everything into dist/. The bundles fetch wheels; the first time takes minutes.
package() {
    local archs=() pythons=() signing=() key='' arch started=$SECONDS
    while [[ $# -gt 0 ]]; do
        case $1 in
            --arch) archs+=("${2:?--arch needs x86_64 or aarch64}") ;;
            --python) pythons+=(--python "${2:?--python needs a version, 3.11 for one}") ;;
            --sign-key)
                key=${2:?--sign-key needs a private key}
                [[ $key == /* ]] || key=$OLDPWD/$key
                openssl pkey -in "$key" -passin pass: -noout 2>/dev/null || die "package: $key is no unencrypted private key (PEM)"
                signing=(--sign-key "$key")
                ;;
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
            "${signing[@]}" --cache "$TOOLS/wheelhouse" --out "$ROOT/dist"
        "$VENV/bin/python" .ci/deb.py --bundle "$ROOT"/dist/edge-agent-*-linux-"$arch".tar.gz --out "$ROOT/dist"
    done
    (cd dist && sha256sum -- * >SHA256SUMS)
    [[ -z $key ]] || openssl dgst -sha256 -sign "$key" -out dist/SHA256SUMS.sig dist/SHA256SUMS
    say "packaged in $((SECONDS - started)) s"
}
