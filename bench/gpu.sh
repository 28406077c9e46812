#!/usr/bin/env bash
# Checks and measures the CUDA backend on a machine with an NVIDIA GPU, in under ten minutes: builds what is needed, checks
# (declarations against NVIDIA's header, every kernel and the whole model against the CPU, compute-sanitizer on small
# shapes), then measures, and writes bench/results/gpu-<device>.json with machine and commit. Node is only used for the last
# step, where it is installed. Stops at the first check that fails: nothing that is wrong is timed.
#   bench/gpu.sh [--check | --measure] [--build FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
what=all
folder=build-gpu
usage() { echo 'usage: bench/gpu.sh [--check | --measure] [--build FOLDER]' >&2 && exit 64; }
while [ $# -gt 0 ]; do
  case $1 in
    --check) what=check ;;
    --measure) what=measure ;;
    --build)
      [ $# -ge 2 ] || usage
      folder=$2
      shift
      ;;
    *) usage ;;
  esac
  shift
done
say() { echo "--- $* ($SECONDS s)"; }

say 'machine'
if ! command -v nvidia-smi > /dev/null; then
  echo 'bench/gpu.sh: there is no nvidia-smi here, so there is no NVIDIA GPU to measure' >&2
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$capability" = 90 ] && capability=90a

say "build for sm_$capability in $folder"
mkdir -p "$folder"
log=$folder/build.log
cmake -S . -B "$folder" -DDN_CUDA=ON -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CUDA_ARCHITECTURES=$capability-real" > "$log" 2>&1 \
  && cmake --build "$folder" --parallel "$(nproc)" --target dn_cuda_check bench_gpu >> "$log" 2>&1 \
  || { tail -40 "$log" && exit 1; }

# cuBLASLt often comes inside a Python package; the loader does not look there.
if [ -z "${DIFFUSION_NATIVE_CUBLASLT:-}" ] && command -v python3 > /dev/null; then
  found=$(python3 -c '
import glob, site, sys
for base in site.getsitepackages() + [site.getusersitepackages()]:
    for path in sorted(glob.glob(base + "/nvidia/**/libcublasLt.so.1[23]", recursive=True)):
        print(path); sys.exit()' || true)
  [ -n "$found" ] && export DIFFUSION_NATIVE_CUBLASLT=$found
fi
echo "cuBLASLt: ${DIFFUSION_NATIVE_CUBLASLT:-looked up by the loader}"

if [ "$what" != measure ]; then
  header=$(find / -name cublasLt.h -not -path '/proc/*' 2> /dev/null | head -1 || true)
  if [ -n "$header" ]; then
    say "declarations against $header"
    nvcc -std=c++17 -I. -Inative "-I$(dirname "$header")" -o /dev/null -cubin -arch="sm_$capability" cuda/test/cublaslt_abi.cu
  else
    say 'declarations: cublasLt.h was not found, skipped'
  fi
  say 'kernels and model, own products'
  DIFFUSION_NATIVE_CUBLASLT=off "$folder/dn_cuda_check"
  say 'kernels and model, cuBLASLt where it is'
  "$folder/dn_cuda_check"
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      say "compute-sanitizer $tool"
      DIFFUSION_NATIVE_CUBLASLT=off compute-sanitizer --tool "$tool" --error-exitcode 1 "$folder/dn_cuda_check" \
        cuda_attention_sizes cuda_attention_ragged cuda_products_bf16 cuda_cross_entropy cuda_fused_head_agrees \
        cuda_embedding cuda_layernorm cuda_loop_ends
    done
  else
    say 'compute-sanitizer is not installed, skipped'
  fi
fi
[ "$what" = check ] && exit 0

device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
lines=$(mktemp)
say 'measure'
"$folder/bench_gpu" '' 0.5 | tee "$lines"
say 'measure, own products'
DIFFUSION_NATIVE_CUBLASLT=off "$folder/bench_gpu" 'product' 0.3 | sed 's/"name": "/&own\//' | tee -a "$lines"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null; then
  say 'PyTorch, the same work'
  python3 bench/peers/gpu.py | sed 's/"name": "/&pytorch\//' | tee -a "$lines" || echo 'PyTorch: the comparison failed' >&2
fi
commit=$(git rev-parse HEAD 2> /dev/null || echo unknown)
[ -z "$(git status --porcelain 2> /dev/null)" ] || commit="$commit, changed"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)
result="bench/results/gpu-$device.json"
{
  printf '{\n\t"machine": "%s, driver %s, %s",\n\t"commit": "%s",\n\t"results": [\n' "$device" "$driver" "$(nvcc --version | grep -o 'V[0-9.]*$')" "$commit"
  sed 's/^/\t\t/; $!s/$/,/' "$lines"
  printf '\t]\n}\n'
} > "$result"
say "wrote $result"

addon=build-cuda/Release/diffusion_native.node
if command -v node > /dev/null && [ -f "$addon" ] && [ -f dist/lib/cli/main.js ]; then
  say 'the addon finds the device'
  DIFFUSION_NATIVE_BINDING=$PWD/$addon node dist/lib/cli/main.js info
fi
say 'done'
