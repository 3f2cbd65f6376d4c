#!/usr/bin/env bash
# The one test command: format, lints, documentation, tests. Passes on a fresh machine with cargo, a C compiler and python3.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n== %s\n' "$*"; }
command -v cargo >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs" >&2; exit 1; }
if ! command -v cc >/dev/null; then
  echo "a C compiler is missing (one dependency holds C): trying apt-get install gcc" >&2
  apt-get update -qq && apt-get install -y -qq gcc libc6-dev
fi
for component in fmt clippy; do
  cargo $component --version >/dev/null 2>&1 || rustup component add "${component/fmt/rustfmt}" ||
    { echo "cargo $component is missing: rustup component add ${component/fmt/rustfmt}" >&2; exit 1; }
done
say "format"; cargo fmt --all --check
say "lints"; cargo clippy --release --all-targets --quiet -- -D warnings
# The emulator and the stand-in by themselves: with --workspace their features would be added to the engine's, and all of arrow
# built again.
cargo clippy --release -p cuda-emulator -p cublaslt-standin --all-targets --quiet -- -D warnings
say "documentation"; RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --quiet
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --quiet -p cuda-emulator -p cublaslt-standin
say "tests"; cargo test --release --quiet; cargo test --release --quiet -p cuda-emulator
