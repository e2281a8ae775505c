#!/usr/bin/env bash
# The tests of the C++ part with the sanitizers for addresses and undefined behaviour, on each instruction set that this
# machine has: tests/sanitize.sh [options of pytest]. Needs GCC; some minutes. Fails where a sanitizer has anything to say.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
to=$(mktemp -d)
trap 'rm -rf "$to"' EXIT

# A copy beside the built one, which stays as it is. -O1: the sanitizers' checks, optimized further, take GCC minutes.
mkdir "$to/source"
cp -r setup.py pyproject.toml README.md fastood kernels tests "$to/source"
cd "$to/source"
rm -f kernels/cpu/_native*.so
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1"
export LDFLAGS="-fsanitize=address,undefined"
"$python" setup.py -q build_ext --inplace

# Python itself is not instrumented: the sanitizers come first by preloading, and libstdc++ with them, which they ask for
# exceptions. What Python and torch never free is not ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$PWD PYTHONSAFEPATH=1
"$python" - <<'CHECK'
import fastood, os
assert fastood.__file__.startswith(os.environ["PYTHONPATH"]), fastood.__file__
CHECK
"$python" -m pytest -p no:cacheprovider -q tests/test_cpu.py tests/test_contract.py \
  -k "not triton and not reference and not offsets_beyond and not no_matrix_is_copied and not compiled" "$@"
