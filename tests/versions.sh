#!/usr/bin/env bash
# The oldest and the newest stack that pyproject.toml allows, each in a virtual environment of its own:
#   tests/versions.sh                            both; some gigabytes to fetch, since old wheels of torch are CUDA's
#   tests/versions.sh "python3.11 2.8.0 1.26.4 1.6.0"    one: a Python, torch, numpy, scikit-learn, others
# Of the tests those of what differs between versions: calls, compilers, gradients, threads, forks, files. Not part of
# .ci/run. What was tried, and when, stands in docs/versions.md.
set -euo pipefail
cd "$(dirname "$0")/.."

(($#)) || set -- "python3.11 2.8.0 1.26.4 1.6.0 scipy==1.11.4 safetensors==0.5.0 pyarrow==17.0.0" "python3.13 2.14.1 2.5.5 1.9.1"
tests=$(echo tests/{attach,detector,files} tests/kernels/cpu tests/kernels/test_{dispatch,seam,operator}.py \
  tests/test_{api,inputs,registry,compiled,export,dim,collect,gradients,batchgrad,deep,threads,fork}.py)
failed=0
for stack; do
  read -r python torch numpy sklearn others <<< "$stack"
  echo "== $python, torch $torch, numpy $numpy, scikit-learn $sklearn"
  folder=$(mktemp -d)
  "$python" -m venv "$folder/venv"
  # Of a copy: an extension that was built here for another torch stays as it is.
  git archive HEAD | tar -x -C "$folder"
  "$folder/venv/bin/pip" install -q "torch==$torch" "numpy==$numpy" "scikit-learn==$sklearn" $others \
    -e "$folder[cli,scale,monitor]" pytest pytest-benchmark hypothesis
  # Triton's part goes by Triton's version, which tests/kernels/triton and the kernels' report look after.
  (cd "$folder" && venv/bin/pytest $tests -k "not triton" -W "ignore:Guards may run slower:RuntimeWarning") || failed=1  # Python 3.13.0's
  rm -rf "$folder"
done
exit $failed
