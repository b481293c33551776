//! Every operation on a GPU against its CPU twin, on shapes that are multiples of nothing. Without a GPU: on the test
//! double of `tests/cuda_emulator`, which watches bounds, barriers and the order of blocks.
#![allow(missing_docs)]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../common/mod.rs"]
mod common;
mod launch_queue;

use common::cuda_emulator::cuda;
use relora_kit::ops::{
    AdamW, AttentionShape, Cpu, Device, Dropout, Element, Factor, IGNORE, Mat, MatMut, PACKED_STATS, Pruning,
    Quantisation, RopeShape, Rounding, Scales,
};

/// Values in (-1, 1), the same for the same `seed`.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    (0..len).map(step).collect()
}

/// Runs `$body` on both devices; it returns named results. Their largest differences are within `$tolerance` of the largest
/// values; with 0, they are equal bit for bit.
macro_rules! same_on_both {
    ($what:expr, $tolerance:expr, |$device:ident| $body:expr) => {{
        let expected: Vec<(&str, Vec<f32>)> = {
            let $device = &Cpu;
            $body
        };
        let found: Vec<(&str, Vec<f32>)> = {
            let $device = cuda();
            $body
        };
        cuda().status().unwrap_or_else(|e| panic!("{}: {e}", $what));
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            compare(&format!("{} {name}", $what), expected, found, $tolerance);
        }
    }};
}

#[track_caller]
fn compare(what: &str, expected: &[f32], found: &[f32], tolerance: f32) {
    assert_eq!(expected.len(), found.len(), "{what}: lengths");
    let top = expected.iter().filter(|x| x.is_finite()).fold(0f32, |top, x| top.max(x.abs()));
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        let close = (e - f).abs() <= tolerance * top;
        assert!(e.to_bits() == f.to_bits() || close, "{what} [{i}]: {f:e} instead of {e:e}");
    }
}

const ELEMENTS: [Element; 2] = [Element::F32, Element::Bf16];

/// `values`, to the nearest numbers that these elements can be: what both twins begin with.
fn fitting(element: Element, values: Vec<f32>) -> Vec<f32> {
    let round = |x: f32| if element == Element::Bf16 { half::bf16::from_f32(x).to_f32() } else { x };
    values.into_iter().map(round).collect()
}

/// A buffer of these elements; on the CPU, all are f32.
fn upload_as<D: Device>(device: &D, element: Element, values: Vec<f32>) -> D::Buffer {
    let mut buffer = device.zeros_of(element, values.len());
    device.write(&mut buffer, &fitting(element, values));
    buffer
}

/// The tolerance for results of these elements: bf16 rounds by half a unit in its last place, up to 2^-8 of the value, and
/// some results are stored twice, or made of what was stored before.
fn rounded(element: Element, tolerance: f32) -> f32 {
    match element {
        Element::F32 => tolerance,
        Element::Bf16 => tolerance.max(2.0 * 2f32.powi(-8)),
    }
}

/// More than a block, more than the grid goes through at once, and odd.
const LENGTHS: [usize; 5] = [0, 1, 77, 1003, 4096 * 256 + 13];

#[test]
fn loops_over_whole_buffers() {
    for n in LENGTHS {
        same_on_both!(format!("{n} elements"), 1e-7, |device| {
            let (mut x, mut y, mut filled) =
                (device.upload(&noise(1, n)), device.upload(&noise(2, n)), device.zeros(n));
            device.axpy(0.3, &x, &mut y);
            device.scale(&mut x, -1.7);
            device.fill(&mut filled, 0.25);
            let mut copy = device.upload(&vec![9.0; n]);
            device.copy(&y, &mut copy);
            let mut ones = device.zeros_of(Element::Bf16, n);
            device.fill(&mut ones, 1.0);
            let sums = [device.sum(&x), device.dot(&x, &y), device.sum_of_squares(&y)];
            vec![
                ("axpy", device.read(&y)),
                ("scale", device.read(&x)),
                ("fill", device.read(&filled)),
                ("copy", device.read(&copy)),
                ("ones", device.read(&ones)),
                ("sums", sums.iter().skip(1).map(|s| *s as f32).collect()),
                // Near 0: its error is that of its terms.
                ("sum", vec![sums[0] as f32, 1000.0]),
            ]
        });
    }
}

#[test]
fn copies_become_bf16_and_f32_again() {
    let device = cuda();
    for n in LENGTHS {
        let mut x: Vec<f32> = noise(3, n).iter().map(|x| x * 1e3).collect();
        let special = [f32::INFINITY, f32::NEG_INFINITY, -0.0, 1.003_906_2, 1.011_718_8, f32::MAX, 1e-40, f32::NAN];
        x.iter_mut().zip(special).for_each(|(x, s)| *x = s);
        let expected: Vec<f32> = x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        let (mut narrow, mut other, mut wide) =
            (device.zeros_of(Element::Bf16, n), device.zeros_of(Element::Bf16, n), device.zeros(n));
        device.copy(&device.upload(&x), &mut narrow);
        device.copy(&narrow, &mut other);
        device.copy(&other, &mut wide);
        let mut written = device.zeros_of(Element::Bf16, n);
        device.write(&mut written, &x);
        for found in [&narrow, &wide, &written].map(|buffer| device.read(buffer)) {
            compare(&format!("{n} elements"), &expected, &found, 0.0);
        }
    }
    device.status().unwrap();
}

#[test]
fn a_buffer_gets_shorter_and_as_long_again() {
    same_on_both!("lengths", 1e-7, |device| {
        let (mut x, mut y) = (device.upload(&noise(1, 300)), device.upload(&noise(2, 200)));
        let room = device.capacity(&x);
        device.resize_in_place(&mut x, Element::F32, 100);
        device.resize_in_place(&mut y, Element::F32, 100);
        assert!(device.len(&x) == 100 && device.capacity(&x) == room && room >= 1200);
        let short = device.read(&x);
        device.axpy(0.5, &x, &mut y);
        device.copy(&y, &mut x);
        device.resize_in_place(&mut y, Element::F32, 200);
        // What lies beyond the shorter length is not defined.
        let y = device.read(&y)[..100].to_vec();
        vec![("short", short), ("x", device.read(&x)), ("y", y)]
    });
}

#[test]
fn rounding_to_bf16_has_the_cpus_bits() {
    for n in LENGTHS {
        let mut x: Vec<f32> = noise(3, n).iter().map(|x| x * 1e3).collect();
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1.003_906_2, 1.011_718_8];
        x.iter_mut().zip(special).for_each(|(x, s)| *x = s);
        for rounding in [Rounding::Nearest, Rounding::Stochastic(0x1234_5678_9abc_def1)] {
            same_on_both!(format!("{rounding:?} {n}"), 0.0, |device| {
                let mut x = device.upload(&x);
                device.round_to_bf16(rounding, &mut x);
                vec![("x", device.read(&x))]
            });
        }
    }
}

#[test]
fn dropout_drops_what_the_cpu_drops() {
    for n in LENGTHS {
        let dropout = Dropout { p: 0.3, key: 0xfeed_beef_1234_5678, first_run: (n % 3) as u64 };
        for element in ELEMENTS {
            let tolerance = if element == Element::F32 { 0.0 } else { rounded(element, 0.0) };
            same_on_both!(format!("{n} {element:?}"), tolerance, |device| {
                let upload = |seed, n| upload_as(device, element, noise(seed, n));
                let (x, mut y) = (upload(1, n), upload(2, n + 5));
                let (dy, mut dx) = (upload(3, n + 5), upload(4, n));
                device.dropout_forward(dropout, &x, &mut y);
                device.dropout_backward(dropout, &dy, &mut dx);
                // What is longer may be either.
                let mut short = upload(5, n / 2);
                device.dropout_forward(dropout, &x, &mut short);
                device.dropout_backward(dropout, &short, &mut dx);
                vec![("short", device.read(&short)), ("y", device.read(&y)), ("dx", device.read(&dx))]
            });
        }
    }
}

#[test]
fn products_of_every_orientation() {
    for (m, k, n) in [(1, 1, 1), (3, 5, 2), (1, 300, 7), (65, 33, 19), (130, 129, 70)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            for beta in [0.0, 1.0, -0.5] {
                use Element::{Bf16, F32};
                for (element, result) in [(F32, F32), (Bf16, F32), (Bf16, Bf16)] {
                    let what = format!("{m} x {k} x {n} {ta} {tb} {beta} {element:?} {result:?}");
                    same_on_both!(what, rounded(result, 2e-6), |device| {
                        let stored = |t: bool, r, c| if t { (c, r) } else { (r, c) };
                        let ((ar, ac), (br, bc)) = (stored(ta, m, k), stored(tb, k, n));
                        // Rows before and after, which are not to be touched.
                        let upload = |seed, n| upload_as(device, element, noise(seed, n));
                        let (a, b) = (upload(1, m * k + 2 * ac), upload(2, k * n + bc));
                        let mut start = noise(3, (m + 3) * n);
                        if beta == 0.0 {
                            start[n..(m + 1) * n].fill(f32::NAN);
                        }
                        let mut c = upload_as(device, result, start.clone());
                        let mut d = upload_as(device, result, start);
                        let p = device.upload(&[0.4]);
                        let operands = || {
                            let (a, b) = (Mat::new(&a, ar, ac).from_row(2), Mat::new(&b, br, bc).from_row(1));
                            (if ta { a.t() } else { a }, if tb { b.t() } else { b })
                        };
                        let (left, right) = operands();
                        device.matmul(0.7, left, right, beta, MatMut::new(&mut c, m, n).from_row(1));
                        // A factor that only the device knows.
                        let (left, right) = operands();
                        device.matmul(Factor::Tanh(&p), left, right, beta, MatMut::new(&mut d, m, n).from_row(1));
                        vec![("c", device.read(&c)), ("d", device.read(&d))]
                    });
                }
            }
        }
    }
}

#[test]
fn a_trained_factor_gets_its_gradient() {
    for n in LENGTHS {
        for element in ELEMENTS {
            same_on_both!(format!("{n} {element:?}"), 1e-6, |device| {
                let upload = |seed| upload_as(device, element, noise(seed, n));
                let (p, mut dp) = (device.upload(&[0.4]), device.upload(&[3.0]));
                device.tanh_backward(&p, &upload(1), &upload(2), &mut dp);
                // Near 0: its error is that of its terms.
                vec![("dp", vec![device.read(&dp)[0], 1000.0])]
            });
        }
    }
}

#[test]
fn products_in_tf32_differ_and_only_while_allowed() {
    let device = common::cuda_emulator::open();
    let (a, b) = (noise(1, 12), noise(2, 12));
    let product = || {
        let (a, b, mut c) = (device.upload(&a), device.upload(&b), device.zeros(9));
        device.matmul(1.0, Mat::new(&a, 3, 4), Mat::new(&b, 4, 3), 0.0, MatMut::new(&mut c, 3, 3));
        device.read(&c)
    };
    let exact = product();
    device.allow_tf32(true);
    let rounded = product();
    assert_ne!(exact, rounded);
    compare("tf32", &exact, &rounded, 2e-3);
    device.allow_tf32(false);
    assert_eq!(exact, product());
}

#[test]
fn embedding_gathers_and_adds_in_the_order_of_the_rows() {
    for (vocab, width, rows) in [(11, 7, 1), (11, 300, 67), (1000, 33, 301)] {
        let tokens: Vec<u32> = (0..rows).map(|i| (i * i * 7919 % vocab) as u32).collect();
        for element in ELEMENTS {
            let tolerance = if element == Element::F32 { 0.0 } else { rounded(element, 0.0) };
            same_on_both!(format!("{vocab} {width} {rows} {element:?}"), tolerance, |device| {
                let (ids, table) = (device.upload_tokens(&tokens), device.upload(&noise(1, vocab * width)));
                let (mut y, dy) =
                    (device.zeros_of(element, rows * width), upload_as(device, element, noise(2, rows * width)));
                let mut dtable = device.upload(&noise(3, vocab * width));
                device.embedding_forward(&ids, &table, &mut y);
                device.embedding_backward(&ids, &dy, &mut dtable);
                vec![("y", device.read(&y)), ("dtable", device.read(&dtable))]
            });
        }
    }
}

#[test]
fn rms_norm_forward_and_backward() {
    for (rows, width) in [(1, 1), (67, 37), (3, 256), (130, 300), (5, 1037)] {
        for element in ELEMENTS {
            same_on_both!(format!("{rows} x {width} {element:?}"), rounded(element, 2e-6), |device| {
                let upload = |seed| upload_as(device, element, noise(seed, rows * width));
                let (x, weight) = (upload(1), device.upload(&noise(2, width)));
                let (mut y, mut rstd) = (upload(3), device.upload(&noise(4, rows)));
                device.rms_norm_forward(&x, &weight, 1e-3, &mut y, &mut rstd);
                let (dy, mut dx) = (upload(5), upload(6));
                let mut dweight = device.upload(&noise(7, width));
                device.rms_norm_backward(&x, &weight, &rstd, &dy, &mut dx, Some(&mut dweight));
                let mut frozen = upload(6);
                device.rms_norm_backward(&x, &weight, &rstd, &dy, &mut frozen, None);
                let first = vec![
                    ("y", device.read(&y)),
                    ("rstd", device.read(&rstd)),
                    ("dx", device.read(&dx)),
                    ("dx, frozen", device.read(&frozen)),
                    ("dweight", device.read(&dweight)),
                ];
                let mut sum = upload(8);
                device.add_rms_norm_forward(&x, &dy, &mut sum, &weight, 1e-3, &mut y, &mut rstd);
                let added = [("sum", &sum), ("y of the sum", &y), ("rstd of the sum", &rstd)];
                first.into_iter().chain(added.map(|(name, x)| (name, device.read(x)))).collect()
            });
        }
    }
}

#[test]
fn rope_turns_and_turns_back() {
    for (batch, len, heads, head_dim) in [(1, 1, 1, 2), (3, 7, 5, 6), (2, 33, 3, 34)] {
        let shape = RopeShape { batch, len, heads, head_dim };
        let n = batch * len * heads * head_dim;
        let angles = noise(1, (len + 2) * head_dim / 2); // a table longer than the windows
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        for element in ELEMENTS {
            same_on_both!(format!("{shape:?} {element:?}"), rounded(element, 1e-7), |device| {
                let (cos, sin) = (device.upload(&cos), device.upload(&sin));
                let (mut x, mut dx) =
                    (upload_as(device, element, noise(2, n)), upload_as(device, element, noise(3, n)));
                device.rope_forward(shape, &cos, &sin, &mut x);
                device.rope_backward(shape, &cos, &sin, &mut dx);
                vec![("x", device.read(&x)), ("dx", device.read(&dx))]
            });
        }
    }
}

/// `(batch, len, heads, kv_heads, head_dim)`; in f32 in tiles, in bf16 by products of whole scores.
fn attention(shapes: &[(usize, usize, usize, usize, usize)]) {
    for &(batch, len, heads, kv_heads, head_dim) in shapes {
        let shape = AttentionShape { batch, len, heads, kv_heads, head_dim };
        for element in ELEMENTS {
            // Probabilities and their gradients are rounded to bf16 before they meet values and keys.
            let tolerance = if element == Element::F32 { 3e-6 } else { 2.0 * rounded(element, 0.0) };
            same_on_both!(format!("{shape:?} {element:?}"), tolerance, |device| attention_on(device, shape, element));
        }
    }
}

fn attention_on<D: Device>(device: &D, shape: AttentionShape, element: Element) -> Vec<(&'static str, Vec<f32>)> {
    let AttentionShape { batch, len, heads, kv_heads, head_dim } = shape;
    let (n, m) = (batch * len * heads * head_dim, batch * len * kv_heads * head_dim);
    let upload = |seed, n| upload_as(device, element, noise(seed, n));
    let wide = |seed, n| upload_as(device, element, noise(seed, n).iter().map(|x| 3.0 * x).collect());
    let (mut q, mut k, mut v) = (wide(1, n), wide(2, m), upload(3, m));
    let (mut o, mut lse) = (upload(4, n), device.upload(&noise(5, batch * heads * len)));
    device.attention_forward(shape, &q, &k, &v, &mut o, &mut lse);
    let d_o = upload(6, n);
    device.attention_backward(shape, [&mut q, &mut k, &mut v], &o, &lse, &d_o);
    let all = [("o", &o), ("lse", &lse), ("dq", &q), ("dk", &k), ("dv", &v)];
    all.map(|(name, x)| (name, device.read(x))).into()
}

/// The other way of each: scores as a whole in f32, with factors rounded to TF32, and tiles of bf16.
#[test]
fn attention_the_other_way() {
    let tf32 = common::cuda_emulator::open();
    tf32.allow_tf32(true);
    for (batch, len, heads, kv_heads, head_dim) in [(2, 5, 3, 3, 6), (1, 67, 4, 2, 33), (2, 33, 6, 2, 128)] {
        let shape = AttentionShape { batch, len, heads, kv_heads, head_dim };
        let (expected, found) = (attention_on(&Cpu, shape, Element::F32), attention_on(&tf32, shape, Element::F32));
        tf32.status().unwrap();
        assert_ne!(expected, found);
        for ((name, expected), (_, found)) in expected.iter().zip(&found) {
            // 2^-11 per factor; scores of up to 30 are exponents.
            compare(&format!("{shape:?} {name}"), expected, found, 1e-2);
        }
    }
    // Longer than scores may be.
    for (heads, kv_heads, head_dim) in [(1, 1, 2), (2, 1, 70)] {
        let shape = AttentionShape { batch: 1, len: 4097, heads, kv_heads, head_dim };
        let tolerance = 2.0 * rounded(Element::Bf16, 0.0);
        same_on_both!(format!("{shape:?}"), tolerance, |device| attention_on(device, shape, Element::Bf16));
    }
}

#[test]
fn attention_of_narrow_heads() {
    attention(&[(1, 1, 1, 1, 2), (2, 5, 3, 3, 6), (1, 67, 4, 2, 33), (2, 32, 2, 1, 64), (1, 33, 3, 1, 1)]);
}

#[test]
fn attention_of_middling_heads() {
    attention(&[(1, 35, 2, 1, 65), (2, 17, 2, 2, 100), (1, 49, 1, 1, 128)]);
}

#[test]
fn attention_of_wide_heads() {
    attention(&[(1, 19, 2, 1, 130), (1, 9, 2, 2, 255), (1, 33, 1, 1, 256)]);
}

#[test]
fn swiglu_forward_and_backward() {
    for n in LENGTHS {
        let wide = |seed| noise(seed, n).iter().map(|x| 8.0 * x).collect::<Vec<f32>>();
        for element in ELEMENTS {
            same_on_both!(format!("{n} {element:?}"), rounded(element, 1e-6), |device| {
                let upload = |values| upload_as(device, element, values);
                let (mut gate, mut up, mut y) = (upload(wide(1)), upload(wide(2)), device.zeros_of(element, n + 3));
                device.swiglu_forward(&gate, &up, &mut y);
                device.swiglu_backward(&upload(noise(3, n + 2)), &mut gate, &mut up);
                vec![("y", device.read(&y)), ("dgate", device.read(&gate)), ("dup", device.read(&up))]
            });
        }
    }
}

#[test]
fn cross_entropy_of_some_rows() {
    for vocab in [2, 37, 256, 1037] {
        let last = vocab as u32 - 1;
        let targets = [1, 0, IGNORE, last, last / 2, IGNORE, 1];
        let (first, rows) = (2, 4);
        for (scale, element) in [None, Some(0.25)].into_iter().flat_map(|s| ELEMENTS.map(|e| (s, e))) {
            same_on_both!(format!("{vocab} {scale:?} {element:?}"), rounded(element, 2e-6), |device| {
                let logits: Vec<f32> = noise(1, (rows + 1) * vocab).iter().map(|x| 20.0 * x).collect();
                let (ids, mut logits) = (device.upload_tokens(&targets), upload_as(device, element, logits));
                let mut losses = device.upload(&noise(2, targets.len()));
                device.cross_entropy(vocab, first, rows, &ids, &mut logits, &mut losses, scale);
                let logits = device.read(&logits);
                // The gradient apart from what is not to be touched: their sizes differ.
                let (own, others) = logits.split_at(rows * vocab);
                vec![("losses", device.read(&losses)), ("logits", own.to_vec()), ("others", others.to_vec())]
            });
        }
    }
    let device = cuda();
    let mut values = noise(1, 300);
    values[40] = f32::NAN;
    let (mut logits, mut losses) = (device.upload(&values), device.zeros(1));
    device.cross_entropy(300, 0, 1, &device.upload_tokens(&[3]), &mut logits, &mut losses, None);
    assert!(device.read(&losses)[0].is_nan());
}

#[test]
fn few_bits_are_the_cpus_bits() {
    for (rows, cols) in [(1, 1), (3, 64), (151, 127), (70, 300)] {
        for how in [Quantisation::Nf4 { double: false }, Quantisation::Nf4 { double: true }, Quantisation::Int8] {
            for element in ELEMENTS {
                let mut values = noise(1, rows * cols);
                values.iter_mut().take(64).for_each(|x| *x = 0.0);
                // In bf16 the values are rounded once more.
                let tolerance = if element == Element::F32 { 0.0 } else { rounded(element, 0.0) };
                same_on_both!(format!("{rows} x {cols} {how:?} {element:?}"), tolerance, |device| {
                    let quantised = device.quantise(how, rows, cols, &device.upload(&values));
                    let parts = device.read_quantised(&quantised);
                    let again = device.upload_quantised(&parts);
                    let mut y = upload_as(device, element, noise(2, rows * cols));
                    device.dequantise(&quantised, &mut y);
                    let mut z = upload_as(device, element, noise(3, rows * cols));
                    device.dequantise(&again, &mut z);
                    assert_eq!(device.read(&y), device.read(&z));
                    let codes = parts.codes.iter().map(|c| f32::from(*c)).collect();
                    let scales = match parts.scales {
                        Scales::F32(scales) => scales,
                        Scales::Double { codes, nested, offset } => {
                            codes.iter().map(|c| f32::from(*c)).chain(nested).chain([offset]).collect()
                        }
                    };
                    vec![("codes", codes), ("scales", scales), ("values", device.read(&y))]
                });
            }
        }
    }
}

#[test]
fn pruning_keeps_what_the_cpu_keeps() {
    let ties = |n: usize| (0..n).map(|i| ((i * 7919 % 13) as f32 - 6.0) / 3.0).collect::<Vec<f32>>();
    for n in LENGTHS {
        for values in [noise(1, n).iter().map(|x| x * x * x).collect(), ties(n), vec![0.5; n]] {
            let magnitude = |ratio| [true, false].map(|joint| Pruning::Magnitude { ratio, joint });
            let magnitudes = [0.1, 0.5, 0.9, 0.999].map(magnitude);
            let others = [Pruning::Zero, Pruning::Random { ratio: 0.7, key: 0xfeed_beef_1234_5678 }];
            for how in magnitudes.as_flattened().iter().chain(&others) {
                same_on_both!(format!("{n} {how:?}"), 0.0, |device| {
                    let (mut m, mut v) = (device.upload(&values), device.upload(&noise(2, n)));
                    device.prune(*how, &mut m, &mut v);
                    vec![("m", device.read(&m)), ("v", device.read(&v))]
                });
            }
        }
    }
}

#[test]
fn processes_share_the_numbers_of_an_update() {
    same_on_both!("", 0.0, |device| {
        let mut shares = device.zeros(3 * PACKED_STATS);
        let mut tallies = [1e-3, 1.0 / 3.0, 7.0].map(|scale| {
            let mut stats = device.step_stats();
            device.accumulate_losses(scale, &device.upload(&noise(1, 7)), &mut stats);
            stats
        });
        tallies.iter().enumerate().for_each(|(i, stats)| device.pack_step_stats(stats, i as f32, i, &mut shares));
        device.reduce_step_stats(&shares, &mut tallies[0]);
        let [sum, first, ..] = tallies.each_ref().map(|stats| device.read_step_stats(stats).unwrap());
        let expected: f64 = first.loss / (1.0 / 3.0) * (1e-3 + 1.0 / 3.0 + 7.0);
        assert!((sum.loss / expected - 1.0).abs() < 1e-15 && sum.signals == 3.0, "{sum:?} {expected}");
        vec![("shares", device.read(&shares))]
    });
}

#[test]
fn a_tally_adds_losses_and_squares_and_clips() {
    for (max_norm, loss) in [(0.5, 1.0), (1e9, 1.0), (0.0, 1.0), (0.5, f32::NAN), (0.5, f32::INFINITY)] {
        same_on_both!(format!("{max_norm} {loss}"), 1e-7, |device| {
            let mut stats = device.step_stats();
            device.accumulate_losses(0.25, &device.upload(&noise(1, 1003)), &mut stats);
            device.accumulate_losses(0.5, &device.upload(&[loss, 3.0]), &mut stats);
            let gradients = [77, 0, 4096 * 256 + 13].map(|n| device.upload(&noise(2, n)));
            device.accumulate_and_clip(&gradients.each_ref(), max_norm, &mut stats);
            let stats = device.read_step_stats(&stats).unwrap();
            assert_eq!(stats.factor.is_nan(), !loss.is_finite());
            // Apart, since their sizes differ; a factor that is not a number has some bits or other.
            let factor = if stats.factor.is_nan() { 0.0 } else { stats.factor };
            vec![
                ("loss", vec![stats.loss as f32]),
                ("squares", vec![stats.squares as f32]),
                ("factor", vec![factor as f32]),
            ]
        });
    }
}

#[test]
fn adamw_updates() {
    for n in LENGTHS {
        same_on_both!(format!("{n} elements"), 1e-6, |device| {
            let mut step = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 0 };
            let (mut p, mut m, mut v) = (device.upload(&noise(1, n)), device.zeros(n), device.zeros(n));
            for t in 1..=4 {
                step.step = t;
                let gradient = device.upload(&noise(10 + t, n));
                let mut stats = device.step_stats();
                // The fourth one does not count.
                device.accumulate_losses(1.0, &device.upload(&[if t == 4 { f32::NAN } else { 1.0 }]), &mut stats);
                device.accumulate_and_clip(&[&gradient], 0.5, &mut stats);
                device.adamw(&step, &stats, &mut p, &gradient, &mut m, &mut v);
            }
            vec![("p", device.read(&p)), ("m", device.read(&m)), ("v", device.read(&v))]
        });
    }
}
