//! Merges an adapter into a checkpoint: cargo run --release --example merge BASE ADAPTER OUTPUT

use relora_kit::{MergeOptions, Progress, Result, merge};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, output] = args.as_slice() else {
        eprintln!("usage: merge BASE ADAPTER OUTPUT");
        std::process::exit(2);
    };
    let options = MergeOptions::new(base, output).adapter(adapter, 1.0);
    let report = merge(&options, &Progress::stderr(true, 0))?;
    for tensor in &report.tensors {
        if let Some(kept) = &tensor.retention {
            println!("{:5.1}% of the delta survives in {}", 100.0 * kept.retention, tensor.name);
        }
    }
    Ok(())
}
