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
readonly TRAINING=("${TRANSFORMERS[@]}" onnx onnx-ir onnxruntime-genai==0.18.0 gguf)

. .ci/environment.sh       # set_up, need_torch, make_venv, …
. .ci/programs.sh          # need_programs, need_test_programs, need_postgres
. .ci/locks.sh             # lock
. .ci/package.sh           # package
. .ci/real_model.sh        # real_model, need_real_model
. tests/boot/prepare.sh    # prepare_boot_test
. tests/machine/prepare.sh # machine_test
. tests/machine/container.sh # container_test

usage() {
    cat <<'TEXT'
usage: ./build.sh COMMAND [ARGUMENT…]

  demo [OPTION…]       set up what is needed, then a model from registry to answer on this machine; --real first:
                       with a real language model (fetches 90 MB and torch, minutes)
  chat [OPTION…]       set up what is needed, then a conversation with a real language model (fetches 90 MB and torch,
                       minutes)
  test [PYTEST ARG…]   set up what is needed, then the tests (or those that the pytest arguments select)
  long-test [ARG…]     the longer ways through what the tests show in short (minutes)
  broker-test [ARG…]   the whole contract on mosquitto, RabbitMQ and NATS, and a table (minutes)
  http-test [ARG…]     the packages openai, llm and langchain-openai against the OpenAI interface (fetches them)
  look-test [ARG…]     what people look at: the dashboard on a real Prometheus, the device in Home Assistant, the page in
                       Chromium; --pictures docs/pictures makes the pictures of it again (minutes; fetches them)
  chaos [PYTEST ARG…]  1,000 prompts while everything around them breaks, and the table; CHAOS_SEED repeats a run
  powerloss [ARG…]     the power-loss tests with all faults at all points, the daemon too (minutes)
  attack [OPTION…]     input that means harm: what is known, then generated, in at most 10 minutes; --help
  check                ruff, formatting and mypy --strict
  package [OPTION…]    wheel, sdist, and offline bundles as tar.gz and .deb, into dist/; --arch A and --python V choose
                       some, --sign-key PEM signs their sums (a private key on a NIST curve, as for packages);
                       DEBFULLNAME and DEBEMAIL, if set, are the .deb's maintainer
  boot-test            a signed bundle installed, upgraded, broken and attacked on a Debian that boots, and then its .deb
                       (root; minutes)
  machine-test [OPTION…]  the same on a machine that is emulated: --arch A, --debian V; its power cut off: --cuts N,
                       --seed S, quicker with --container; on a worn disk: --worn (root; an hour); --help
  fleet-test [ARG…]    twelve devices on one broker and one registry, which break, and the table (minutes); --help
  sample-model         make the sample model and the tests' second model again (fetches torch)
  random-model OUT [ARG…]  a model of random weights and a real size, to measure with; --help lists its shapes
  real-model [OUT] [OPTION…]  a real language model, its builds beside llama.cpp's, and the table of quality and speed
                       (fetches 130 MB and torch; minutes); --help
  real-test [PYTEST ARG…]  the tests that need the real model (minutes)
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
        chat) chat "$@" ;;
        test) run_tests "$@" ;;
        long-test) long_test "$@" ;;
        powerloss) POWERLOSS_FAULTS=all run_tests -m 'long or not long' tests/*/test_powerloss.py "$@" ;;
        broker-test) need_brokers && run_tests -q -s -m 'brokers or not brokers' tests/acceptance/test_brokers.py "$@" ;;
        http-test) http_test "$@" ;;
        look-test) look_test "$@" ;;
        chaos) chaos "$@" ;;
        attack) attack "$@" ;;
        check) check ;;
        package) package "$@" ;;
        boot-test) boot_test ;;
        machine-test) machine_test "$@" ;;
        fleet-test) fleet_test "$@" ;;
        sample-model) sample_model ;;
        random-model) random_model "$@" ;;
        real-model) real_model "$@" ;;
        real-test) real_test "$@" ;;
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
    if [[ ${1:-} == --real ]]; then
        need_real_model >&2
        set -- --model "$TOOLS/real-model/onnx" --question "What is the capital of France?" "${@:2}"
    fi
    set_up runtime
    need_programs mosquitto mosquitto -- mosquitto mosquitto-clients
    exec "$VENV/bin/python" -m edge_agent demo "$@"
}

chat() {
    need_real_model >&2
    set_up runtime
    exec "$VENV/bin/python" -m edge_agent chat --direct "$TOOLS/real-model/onnx" "$@"
}

run_tests() {
    local started=$SECONDS tested status=0
    set_up dev
    need_torch "$VENV"
    need_test_programs
    # Most tests wait for processes; a file's tests stay together, for they share a broker or a daemon.
    [[ $# -gt 0 ]] || set -- -n "$(($(nproc) < 2 ? 2 : 4))" --dist loadfile --no-loadscope-reorder
    tested=$SECONDS
    "$VENV/bin/python" -m pytest "$@" || status=$?
    say "set-up $((tested - started)) s, tests $((SECONDS - tested)) s"
    return "$status"
}

long_test() {
    need_long_test_programs
    run_tests -m long "$@"
}

http_test() {
    locked_venv http-clients "$TOOLS/http-clients"
    run_tests -q -m http_clients "$@"
}

look_test() {
    set_up dev
    need_lookers
    need_axe
    locked_venv home-assistant "$TOOLS/home-assistant" "$(find_newer_python)"
    run_tests -m look "$@"
}

chaos() {
    CHAOS_PLAN=long run_tests -q --capture=no tests/acceptance/test_chaos.py "$@"
}

attack() {
    set_up dev
    need_torch "$VENV"
    need_test_programs
    exec "$VENV/bin/python" -m tests.attack "$@"
}

check() {
    set_up dev
    "$VENV/bin/python" -m ruff check edge_agent tests tools .ci
    "$VENV/bin/python" -m ruff format --check edge_agent tests tools .ci
    "$VENV/bin/python" -m mypy --strict
}

# boot-test: tests/boot prepares three bundles, a model in one file and a Debian root, and then drives them.
boot_test() {
    local arch work=$TOOLS/boot started=$SECONDS
    [[ $EUID -eq 0 ]] || die "boot-test boots a container: start it as root"
    arch=$(uname -m)
    need_real_model >&2
    set_up dev
    need_programs debootstrap debootstrap -- debootstrap
    need_programs nspawn systemd-nspawn -- systemd-container libsystemd-shared
    need_programs lintian lintian -- lintian
    prepare_boot_test "$work" "$arch"
    say "prepared in $((SECONDS - started)) s"
    "$VENV/bin/python" -m tests.boot --root "$TOOLS/debian-12" --work "$work" --model "$work/model.tar" \
        --guest "$work/guest.tar" --real-model "$TOOLS/real-model/onnx" --release-key "$work/release.pub" \
        --bundle "$work/dist/edge-agent-0.1.0-linux-$arch.tar.gz" \
        --newer "$work/dist/edge-agent-0.1.1-linux-$arch.tar.gz" \
        --broken "$work/dist/edge-agent-0.1.2-linux-$arch.tar.gz"
    rm -rf -- "$work"
}

fleet_test() {
    set_up dev
    need_programs mosquitto mosquitto -- mosquitto mosquitto-clients
    need_postgres
    "$VENV/bin/python" -m tests.fleet "$@"
}

sample_model() {
    training_venv
    # As a file: the package around it imports what the training environment does not have.
    "$TRAIN_VENV/bin/python" tools/make_sample_model.py --out edge_agent/demo/sample_model \
        --hf-out tests/models/sample_hf
    "$TRAIN_VENV/bin/python" tools/make_sample_model.py --out tests/models/swapped --swap Spain,Nepal
}

real_test() {
    need_real_model >&2
    run_tests --real-model "$TOOLS/real-model" tests/real "$@"
}

random_model() {
    training_venv
    exec "$TRAIN_VENV/bin/python" -m tests.benchmarks.make_random_model "$@"
}

# The libraries that make models; the agent itself needs none of them.
training_venv() {
    locked_venv train "$TRAIN_VENV"
    need_torch "$TRAIN_VENV"
}

main "$@"
