#!/usr/bin/env bash
# Makes the virtual environment .venv and installs what train.py needs, or with the word "tests"
# what the tests need, too. Where there is no GPU it takes PyTorch's CPU build, which spares several
# gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")"
[[ -x .venv/bin/python ]] || python3 -m venv .venv
pip=(.venv/bin/python -m pip install -q --disable-pip-version-check)
if command -v nvidia-smi >/dev/null; then
    "${pip[@]}" "torch>=2.11,<2.14"
else
    # a plain index may only hold the CUDA build, so the index of CPU builds is asked first
    "${pip[@]}" --retries 0 torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
        2>/dev/null || "${pip[@]}" torch==2.13.0
fi
"${pip[@]}" -r "$([[ ${1:-} == tests ]] && echo tests/requirements.txt || echo requirements.txt)"
