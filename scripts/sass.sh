#!/usr/bin/env bash
# Reads the machine code of the shipped kernels and says, for each, what it loads, stores and multiplies with.
#
#     bash scripts/sass.sh [ARCH...]        (80 90 by default; needs no card)
#
# ptxas assembles the kept PTX (kernels/ptx/*_bf16.ptx), nvdisasm reads the result; both come from PATH, from beside $NVCC, or, if
# neither is there, from PyPI into target/sass. Counts are of instructions in the code, not of executions; `loop` is the tensor
# instructions' share of the main loop, of the issue slots that is (a wgmma is one instruction for many cycles: none is given). Fails if a kernel uses local memory, if a matrix kernel lacks
# what it is made for (16-byte asynchronous copies, ldmatrix, tensor-core products), or if that share is below half in gemm's
# large tiles.
set -euo pipefail
cd "$(dirname "$0")/.."
tool() {
  local beside=${NVCC:+$(dirname "$NVCC")/$1} fetched
  fetched=$(find target/sass -path "*bin/$1" -type f 2>/dev/null | head -1)
  for candidate in "$beside" "$(command -v "$1" || true)" "$fetched"; do
    if [ -n "$candidate" ] && [ -f "$candidate" ]; then echo "$candidate"; return; fi
  done
}
if [ -z "$(tool ptxas)" ] || [ -z "$(tool nvdisasm)" ]; then
  python3 -m pip install --quiet --target target/sass 'nvidia-cuda-nvcc==13.5.*' 'nvidia-cuda-nvdisasm==13.5.*' >&2
  find target/sass -path '*bin/*' -type f -exec chmod +x {} +
fi
ptxas=$(tool ptxas) nvdisasm=$(tool nvdisasm)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
archs=("$@"); [ $# -gt 0 ] || archs=(80 90)
printf '%-32s %-6s %6s %5s %5s %6s %5s %5s %5s %5s %5s %6s %6s\n' \
  kernel arch code LDG16 LDG LDGSTS STG16 STG LDSM HMMA HGMMA local loop
status=0
for ptx in kernels/ptx/*.ptx; do
  case $ptx in *_f32.ptx) continue ;; esac
  target=$(sed -n 's/^\.target sm_\([0-9a-z]*\).*/\1/p' "$ptx" | head -1)
  for arch in "${archs[@]}"; do
    # Code for one generation only (sm_90a) is read as that.
    case $target in *a) [ "$arch" = "${target%a}" ] || continue; arch=$target ;; esac
    "$ptxas" -O3 -arch="sm_$arch" "$ptx" -o "$work/cubin"
    "$nvdisasm" "$work/cubin" | awk -v arch="sm_$arch" -v matrix="$(basename "$ptx")" '
      function report() {
        if (kernel == "") return
        # The main loop: of the loops with the most tensor instructions the shortest, from a branch back to where it leads.
        most = 0
        for (b = 1; b <= branches; b++) {
          if (!((from = label[target[b]]) && from < source[b])) continue
          h = 0
          for (i = from; i <= source[b]; i++) h += tensor[i]
          size = source[b] - from + 1
          if (h > most || (h == most && h && size < loop)) { most = h; loop = size }
        }
        share = most && !n["HGMMA"] ? sprintf("%.0f%%", 100 * most / loop) : "-"
        printf "%-32s %-6s %6d %5d %5d %6d %5d %5d %5d %5d %5d %6d %6s\n", kernel, arch, n["code"], n["LDG16"], n["LDG"],
          n["LDGSTS"], n["STG16"], n["STG"], n["LDSM"], n["HMMA"], n["HGMMA"], n["local"], share
        if (kernel ~ /^gemm_n.*_128x128/ && 2 * most < loop) { print "FAIL " kernel ": main loop below half tensor instructions"; bad = 1 }
        if (n["local"]) { print "FAIL " kernel ": local memory"; bad = 1 }
        tiled = matrix ~ /^(gemm|attention)/ && kernel !~ /delta/
        if (tiled && !(n["HMMA"] + n["HGMMA"])) { print "FAIL " kernel ": no tensor-core products"; bad = 1 }
        if (tiled && matrix !~ /sm90/ && !(n["LDGSTS"] && n["LDSM"])) { print "FAIL " kernel ": no copies or no ldmatrix"; bad = 1 }
        delete n; delete label; delete tensor; branches = 0
      }
      /^\.L/ { at = $1; sub(/:.*/, "", at); label[at] = n["code"] + 1; next }
      /^\.text\./ { report(); kernel = $1; sub(/^\.text\./, "", kernel); sub(/:.*/, "", kernel); next }
      /^[ \t]*\/\*[0-9a-f]+\*\// {
        op = $2; if (op ~ /^@/) op = $3
        # Other sections hold data.
        if (op !~ /^[A-Z]/) next
        n["code"]++
        tensor[n["code"]] = op ~ /^HG?MMA/
        if (op ~ /^BRA/ && match($0, /\.L_[A-Za-z0-9_]+/)) {
          target[++branches] = substr($0, RSTART, RLENGTH); source[branches] = n["code"]
        }
        if (op ~ /^LDG\.E.*\.128/) n["LDG16"]++
        else if (op ~ /^LDG\./) n["LDG"]++
        else if (op ~ /^LDGSTS.*\.128/) n["LDGSTS"]++
        else if (op ~ /^STG\.E.*\.128/) n["STG16"]++
        else if (op ~ /^STG\./) n["STG"]++
        else if (op ~ /^LDSM/) n["LDSM"]++
        else if (op ~ /^HMMA/) n["HMMA"]++
        else if (op ~ /^HGMMA/) n["HGMMA"]++
        else if (op ~ /^(LDL|STL)/) n["local"]++
      }
      END { report(); exit bad }' || status=1
  done
done
exit $status
