//! The `collm-engine` binary: parses the command line and prints one line on failure.

fn main() -> std::process::ExitCode {
    collm_engine::cli::main()
}
