//! Tokens per second of one update (forward, backward, AdamW) of a preset on random tokens.
//!
//! `cargo run --release --example model_speed -- llama_9m [BATCH] [LENGTH] [LORA_RANK] [THREADS]`

use relora_kit::{
    model::{LlamaConfig, LoraSpec, Model},
    ops::{AdamW, Cpu, Device, StepStats},
    threads,
};
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let preset = args.first().map_or("llama_9m", String::as_str);
    let (batch, len, r) = (number(1, 8), number(2, 256), number(3, 0));
    threads::set(args.get(4).map(|a| a.parse().expect("a number"))).unwrap();

    let config = LlamaConfig::preset(preset).expect("a preset");
    let vocab = config.vocab_size as u64;
    let mut model = Model::init(Cpu, config, 1).unwrap();
    if r > 0 {
        model.add_lora(LoraSpec::new(r, 32.0));
    }
    let trained = |model: &Model<Cpu>| -> Vec<usize> {
        model.params().iter().map(|p| if p.trainable { p.elements() } else { 0 }).collect()
    };
    let mut moments: Vec<[Vec<f32>; 2]> = trained(&model).iter().map(|&n| [vec![0.0; n], vec![0.0; n]]).collect();

    let mut state = 1u64;
    let mut best = f64::INFINITY;
    for step in 1..=8 {
        let draw = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % vocab) as u32
        };
        let tokens: Vec<u32> = (0..batch * len).map(draw).collect();
        let (start, cpu) = (Instant::now(), cpu_seconds());
        model.zero_grad();
        let loss = model.forward_backward(&tokens, batch, len, 1.0).unwrap();
        let model_time = start.elapsed().as_secs_f64();
        let mut stats = StepStats::default();
        let gradients: Vec<&Vec<f32>> = model.params().iter().filter_map(|p| p.grad.as_ref()).collect();
        Cpu.accumulate_and_clip(&gradients, 1.0, &mut stats);
        let settings = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
        for (param, [m, v]) in model.params_mut().iter_mut().zip(&mut moments) {
            if let Some(grad) = &param.grad {
                Cpu.adamw(&settings, &stats, &mut param.value, grad, m, v);
            }
        }
        let time = start.elapsed().as_secs_f64();
        best = best.min(time);
        println!(
            "step {step}: loss {loss:.4}, {time:.3} s ({model_time:.3} s forward and backward; {:.2} s of CPU), \
             {:.0} tokens/s",
            cpu_seconds() - cpu,
            (batch * len) as f64 / time
        );
    }
    println!("{preset} {batch}x{len} r={r}: best {:.0} tokens/s", (batch * len) as f64 / best);
}

/// CPU time of all threads (Linux; in ticks of 10 ms), which other programs on the machine disturb less.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}
