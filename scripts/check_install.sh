#!/usr/bin/env bash
# Prove with uv that dependencies resolve, and that the built wheel installs and runs.
#
#   scripts/check_install.sh                     the newest and the oldest supported dependencies
#   scripts/check_install.sh 3.11:lowest-direct  an empty environment (several gigabytes) with the
#                                                wheel: quantize, verify, and run from the source
#                                                tree with the wheel uninstalled; or 3.12:highest …
set -euo pipefail
cd "$(dirname "$0")/.."
told='^(torch|transformers|huggingface-hub|tokenizers|numpy|click|triton)=='
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

resolve() { uv pip compile pyproject.toml --python-version "$1" --resolution "$2" --no-header -q; }

if [ $# = 0 ]; then
    for python in 3.11 3.12 3.13 3.14; do
        for resolution in highest lowest-direct; do
            found=$(resolve $python $resolution)
            echo "$python, $resolution:" $(grep -oE "$told\S+" <<< "$found")
        done
    done
fi
for run in "$@"; do
    home=$folder/$run model=$folder/model-$run out=$folder/out-$run
    uv build -q --wheel --out-dir "$folder"
    uv venv -q --python "${run%:*}" "$home"
    resolve "${run%:*}" "${run#*:}" > "$folder/pins.txt"
    uv pip install -q --python "$home" -c "$folder/pins.txt" "$folder"/*.whl
    python="env -u PYTHONPATH HF_HUB_OFFLINE=1 $home/bin/python"
    (
        cd "$folder"  # where the source tree is not found
        $python "$OLDPWD/scripts/make_random_model.py" "$model" --shape tiny --layers 2
        $python -m compressor quantize "$model" -o "$out" --scheme w4a16 --device cpu \
            --set calibration.samples=4 --set evaluate.windows=2
        $python -m compressor verify "$out" --against "$model"
    )
    echo "$run:" $(uv pip freeze --python "$home" | grep -oE "$told\S+")
    uv pip uninstall -q --python "$home" compressor
    $python -m compressor eval "$out" --windows 2
done
