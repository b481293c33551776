//! Measures the rank of what training changed: cargo run --release --example spectrum BASE TUNED

use relora_kit::{Progress, Result, SpectrumOptions, spectrum};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [base, tuned] = args.as_slice() else {
        eprintln!("usage: spectrum BASE TUNED");
        std::process::exit(2);
    };
    let options = SpectrumOptions::default().checkpoints(base, tuned);
    for matrix in spectrum(&options, &Progress::stderr(true, 0))?.matrices {
        let (measures, [m, n]) = (&matrix.measures, matrix.shape);
        println!("rank {} of {} above the noise: {}", measures.rank_above_noise, m.min(n), matrix.name);
    }
    Ok(())
}
