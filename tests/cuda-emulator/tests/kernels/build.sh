#!/bin/sh
# Compiles the kernels to PTX beside them. nvcc comes from PyPI (nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt,
# nvidia-cuda-runtime, nvidia-cuda-cccl 13.x): NVCC=/path/to/site-packages/nvidia/cu13/bin/nvcc ./build.sh
# The debug sections, which hold the absolute paths of this machine, are dropped; .loc lines stay.
set -e
cd "$(dirname "$0")"
compile() { # name, architecture
  "${NVCC:-nvcc}" -ptx -O3 -std=c++17 -lineinfo -arch="$2" "$1.cu" -o "$1.raw"
  sed -e '/^\t\.section/,$d' -e "s|^\(\t*\.file\t*[0-9]* \)\"[^\"]*/|\1\"|" "$1.raw" > "$1.ptx"
  rm "$1.raw"
}
for k in basics gemm attention bugs; do
  compile $k compute_80
done
# Hopper's own instructions; ptxas must take what the tests run.
compile hopper compute_90a
sed -i 's/, function_name .*//' hopper.ptx # names in the sections dropped above
NVCC_PATH=$(command -v "${NVCC:-nvcc}")
"${NVCC_PATH%nvcc}ptxas" -arch=sm_90a hopper.ptx -o /dev/null
