//! The `relora-kit` program: everything is in the library.

fn main() -> std::process::ExitCode {
    relora_kit::cli::main()
}
