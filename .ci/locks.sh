# shellcheck shell=bash
# Makes the locks. build.sh sources this file, which uses its constants, say and die, and find_python of
# environment.sh.

lock() {
    uv=$(mktemp -d)
    trap 'rm -rf -- "$uv"' EXIT
    "$(find_python)" -m venv "$uv"
    "$uv/bin/python" -m pip install --quiet uv
    # dev is a superset of runtime with the same versions: .venv serves both, whichever came first.
    compile dev --extra http --extra local-registry --extra s3 --extra signing --extra dev pyproject.toml - \
        < <(printf '%s\n' "${BUILD[@]}" "${TRANSFORMERS[@]}")
    compile runtime --extra http --extra local-registry --constraint "$LOCKS/dev.txt" pyproject.toml - \
        < <(printf '%s\n' "${BUILD[@]}")
    # What the bundles for devices hold: no build backend, but what verifies signatures and what reads from S3.
    compile device --extra http --extra local-registry --extra s3 --extra signing --constraint "$LOCKS/dev.txt" pyproject.toml - \
        <<<'pip>=25'
    compile train --constraint "$LOCKS/dev.txt" - < <(printf '%s\n' "${TRAINING[@]}")
    # Programs that speak OpenAI's HTTP; the tests start them beside the agent.
    compile http-clients - < <(printf '%s\n' openai llm langchain-openai)
    # llama.cpp, called by the layout of its structures: tools/real_model/llama_cpp.py.
    compile llama-cpp - <<<'xllamacpp==2026.10.11549'
    # Its schemas; its newest versions need a newer Python than the agent does.
    compile home-assistant --python-version 3.13 - <<<'homeassistant==2025.4.*'
    if grep -nEi '://|^(-i|--index|--extra-index|--find-links|torch==|nvidia-|triton==)' "$LOCKS"/*.txt; then
        die "a lock names an address or torch: see above"
    fi
}

# compile NAME [--python-version V] INPUT…: writes the lock NAME. Versions already in it stay when they still fit.
compile() {
    local name=$1 python=(--python-version 3.11)
    shift
    if [[ $1 == --python-version ]]; then python=(); fi
    "$uv/bin/uv" pip compile --quiet --universal "${python[@]}" --generate-hashes --no-emit-index-url \
        --no-emit-find-links --no-header --no-annotate --output-file "$LOCKS/$name.txt" "$@"
    say "locked $name: $(grep -c '==' "$LOCKS/$name.txt") packages"
}
