#!/bin/sh
# Compiles the kernels to PTX beside them. nvcc comes from PyPI (nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt,
# nvidia-cuda-runtime, nvidia-cuda-cccl 13.x): NVCC=/path/to/site-packages/nvidia/cu13/bin/nvcc ./build.sh
# The debug sections, which hold the absolute paths of this machine, are dropped; .loc lines stay.
set -e
cd "$(dirname "$0")"
for k in basics gemm attention bugs; do
  "${NVCC:-nvcc}" -ptx -O3 -std=c++17 -lineinfo -arch=compute_80 $k.cu -o $k.raw
  sed -e '/^\t\.section/,$d' -e "s|^\(\t*\.file\t*[0-9]* \)\"[^\"]*/|\1\"|" $k.raw > $k.ptx
  rm $k.raw
done
