#!/usr/bin/env bash
# The tests of the C++ part with the sanitizers of addresses and of undefined behaviour, on each instruction set that this
# machine has: tests/sanitize.sh [options of pytest]. Needs GCC, and on two processors a quarter of an hour, a third of it
# to compile. Fails where a test does or a sanitizer has anything to say.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
to=$(mktemp -d)
trap 'rm -rf "$to"' EXIT

# Beside the built extension, which stays as it is. Not by setup.py, whose -O3 takes GCC hours with these checks.
cp -r pyproject.toml fastood kernels tests "$to"
rm -f "$to"/kernels/cpu/_native*
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
include=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
printf '%s\n' kernels/cpu/rows_*.cpp kernels/*.cpp kernels/triton/*.cpp kernels/cpu/[!r]*.cpp kernels/cpu/run.cpp |
  xargs -P "$(nproc)" -I{} sh -c "g++ -std=c++17 -O1 -g1 -w -fPIC $sanitizers -I'$include' -c {} -o '$to'/\$(basename {} .cpp).o"
g++ -shared $sanitizers "$to"/*.o -o "$to/kernels/cpu/_native.abi3.so"

# Python is not built with them, so their libraries come first, and the C++ library with them, whose exceptions they
# watch. What Python and torch leave unfreed is not ours, nor what hangs in a forked child.
cd "$to"
export PYTHONPATH=$to PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(printf '%s ' $(for l in asan ubsan stdc++; do gcc -print-file-name=lib$l.so; done))" \
  "$python" -m pytest -p no:cacheprovider tests/kernels/cpu tests/kernels/test_contract.py \
  -k "not triton and not reference and not offsets_beyond and not no_matrix_is_copied and not compiled and not forked" "$@"
