//! What holds for every merge, whatever the shapes, types, ranks and names.

use proptest::prelude::*;
use relora_kit::{
    adapter::AdapterConfig,
    checkpoint::{Checkpoint, Dtype, TensorSpec, Writer, dtype},
    merge::{self, MAX_SHARD_SIZE, Options, Rounding},
    progress::Progress,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A matrix of the base, and the ranks of the adapters that target it (0: this one does not).
#[derive(Clone, Debug)]
struct Matrix {
    name: String,
    dtype: Dtype,
    rows: usize,
    columns: usize,
    ranks: Vec<usize>,
}

/// A base and some adapters; all values follow from the seed.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    matrices: Vec<Matrix>,
    /// Tensors that no adapter knows, with their bytes.
    others: Vec<(String, Dtype, Vec<usize>)>,
    adapter_dtypes: Vec<Dtype>,
    lora_alpha: f64,
    rslora: bool,
    weights: Vec<f64>,
}

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

fn any_float() -> impl Strategy<Value = Dtype> {
    prop::sample::select(FLOATS.to_vec())
}

prop_compose! {
    fn any_case(adapters: usize)(
        seed in any::<u64>(),
        names in prop::collection::btree_set("[a-z][a-z_]{0,6}(\\.[0-9]{1,2})?\\.[a-z][a-z_]{0,8}_proj", 1..5),
        shapes in prop::collection::vec((1usize..70, 1usize..70, any_float(), prop::collection::vec(0usize..7, adapters)), 5),
        others in prop::collection::btree_map("[a-z][a-z_]{0,6}\\.(norm|bias|table)", (
            prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::I64, Dtype::U8, Dtype::BOOL]),
            prop::collection::vec(0usize..6, 0..4),
        ), 0..4),
        adapter_dtypes in prop::collection::vec(any_float(), adapters),
        lora_alpha in prop::sample::select(vec![0.5, 1.0, 3.0, 16.0]),
        rslora in any::<bool>(),
        weights in prop::collection::vec(prop::sample::select(vec![1.0, 0.5, -0.75, 2.0]), adapters),
    ) -> Case {
        let matrices: Vec<Matrix> = names.into_iter().zip(shapes)
            .map(|(name, (rows, columns, dtype, ranks))| Matrix { name, dtype, rows, columns, ranks })
            .collect();
        let others = others.into_iter().map(|(name, (dtype, shape))| (name, dtype, shape)).collect();
        Case { seed, matrices, others, adapter_dtypes, lora_alpha, rslora, weights }
    }
}

/// Uniform in -1..1, as `dtype` stores it.
fn values(seed: u64, dtype: Dtype, count: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..count).map(|_| next()).collect();
    let bytes = dtype::encode_f32(dtype, &values).unwrap();
    let mut back = vec![0.0; count];
    dtype::decode_f32(dtype, &bytes, &mut back).unwrap();
    back
}

fn hash(seed: u64, text: &str, k: usize) -> u64 {
    text.bytes().fold(seed ^ (k as u64 + 1).wrapping_mul(0x9e37_79b9), |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn spec(name: String, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name, dtype, shape: shape.to_vec() }
}

impl Case {
    fn weight(&self, m: &Matrix) -> Vec<f32> {
        values(hash(self.seed, &m.name, 0), m.dtype, m.rows * m.columns)
    }

    /// A `[r, columns]` and B `[rows, r]` of adapter `k`.
    fn factors(&self, m: &Matrix, k: usize) -> (Vec<f32>, Vec<f32>) {
        let (r, dtype) = (m.ranks[k], self.adapter_dtypes[k]);
        (
            values(hash(self.seed, &m.name, 2 * k + 1), dtype, r * m.columns),
            values(hash(self.seed, &m.name, 2 * k + 2), dtype, m.rows * r),
        )
    }

    fn scaling(&self, r: usize) -> f64 {
        self.lora_alpha / if self.rslora { (r as f64).sqrt() } else { r as f64 }
    }

    /// Of adapter `k`: `scaling * B @ A` in f64, and the sum of the absolute products.
    fn delta(&self, m: &Matrix, k: usize) -> (Vec<f64>, Vec<f64>) {
        let ((a, b), r) = (self.factors(m, k), m.ranks[k]);
        let sum = |i: usize, f: fn(f64) -> f64| {
            let (row, column) = (i / m.columns, i % m.columns);
            let products = (0..r).map(|j| f64::from(b[row * r + j]) * f64::from(a[j * m.columns + column]));
            products.map(f).sum::<f64>() * self.scaling(r.max(1))
        };
        let all = 0..m.rows * m.columns;
        (all.clone().map(|i| sum(i, |x| x)).collect(), all.map(|i| sum(i, f64::abs)).collect())
    }

    fn write_base(&self, folder: &Path) -> PathBuf {
        let matrices = self.matrices.iter().map(|m| spec(format!("{}.weight", m.name), m.dtype, &[m.rows, m.columns]));
        let others = self.others.iter().map(|(name, dtype, shape)| spec(name.clone(), *dtype, shape));
        let specs: Vec<_> = matrices.chain(others).collect();
        let base = folder.join("base");
        fs::create_dir(&base).unwrap();
        let writer = Writer::create(&base, &specs, 3000, &BTreeMap::new()).unwrap();
        for m in &self.matrices {
            writer.write_f32(&format!("{}.weight", m.name), m.dtype, &self.weight(m)).unwrap();
        }
        for s in &specs[self.matrices.len()..] {
            // NaN and infinity, too: what is copied is not looked at.
            writer.write(&s.name, 0, &vec![0xff; s.bytes() as usize]).unwrap();
        }
        writer.finish().unwrap();
        base
    }

    /// Writes adapter `k`; `None` if it targets nothing.
    fn write_adapter(&self, folder: &Path, k: usize) -> Option<PathBuf> {
        let targets: Vec<&Matrix> = self.matrices.iter().filter(|m| m.ranks[k] > 0).collect();
        let path = folder.join(format!("adapter-{k}"));
        fs::create_dir(&path).unwrap();
        let mut config = AdapterConfig::new(targets.first()?.ranks[k], self.lora_alpha, &["all"]);
        config.use_rslora = self.rslora;
        let ranks: serde_json::Map<String, _> =
            targets.iter().map(|m| (format!("^{}$", m.name.replace('.', "\\.")), m.ranks[k].into())).collect();
        config.rank_pattern = serde_json::from_value(ranks.into()).unwrap();
        config.write(&path.join("adapter_config.json")).unwrap();
        let key = |m: &Matrix, factor: &str| format!("base_model.model.{}.lora_{factor}.weight", m.name);
        let dtype = self.adapter_dtypes[k];
        let specs: Vec<_> = targets
            .iter()
            .flat_map(|m| {
                let r = m.ranks[k];
                [spec(key(m, "A"), dtype, &[r, m.columns]), spec(key(m, "B"), dtype, &[m.rows, r])]
            })
            .collect();
        let writer = Writer::create_file(&path.join("adapter_model.safetensors"), &specs, &BTreeMap::new()).unwrap();
        for m in targets {
            let (a, b) = self.factors(m, k);
            writer.write_f32(&key(m, "A"), dtype, &a).unwrap();
            writer.write_f32(&key(m, "B"), dtype, &b).unwrap();
        }
        writer.finish().unwrap();
        Some(path)
    }

    /// The adapters that target anything, with their numbers.
    fn write_adapters(&self, folder: &Path) -> Vec<(usize, PathBuf)> {
        (0..self.weights.len()).filter_map(|k| Some((k, self.write_adapter(folder, k)?))).collect()
    }
}

/// In memory where that exists: merges sync what they write.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn options(base: &Path, adapters: Vec<(PathBuf, f64)>, output: PathBuf) -> Options {
    Options {
        base: base.to_owned(),
        adapters,
        output,
        dtype: None,
        map: Vec::new(),
        rounding: Rounding::Nearest,
        max_shard_size: MAX_SHARD_SIZE,
        force: false,
        dry_run: false,
        gpu: None,
    }
}

fn merged(options: &Options) -> Checkpoint {
    merge::run(options, &Progress::hidden()).unwrap_or_else(|e| panic!("{e}"));
    Checkpoint::open(&options.output).unwrap()
}

fn read(model: &Checkpoint, m: &Matrix) -> Vec<f64> {
    let tensor = model.tensor(&format!("{}.weight", m.name)).unwrap();
    assert_eq!((tensor.dtype(), tensor.shape()), (m.dtype, &[m.rows, m.columns][..]));
    let mut values = vec![0.0; tensor.elements()];
    tensor.read_f64(0, &mut values).unwrap();
    values
}

fn contents(model: &Checkpoint) -> BTreeMap<&str, (Dtype, &[usize], &[u8])> {
    model.tensors().map(|t| (t.name(), (t.dtype(), t.shape(), t.bytes()))).collect()
}

/// What computing in f32 may add to an error, for values whose absolute sum is `size`.
fn f32_slack(m: &Matrix, adapters: usize, size: f64) -> f64 {
    let ranks: usize = m.ranks.iter().sum();
    (ranks + 3 * adapters + 2) as f64 * dtype::ulp(Dtype::F32, size)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_merge_is_the_sum_rounded_once_and_touches_nothing_else(case in any_case(3)) {
        let dir = folder();
        let base_path = case.write_base(dir.path());
        let adapters = case.write_adapters(dir.path());
        let used: Vec<_> = adapters.iter().map(|(k, path)| (path.clone(), case.weights[*k])).collect();
        let model = merged(&options(&base_path, used, dir.path().join("out")));
        let base = Checkpoint::open(&base_path).unwrap();
        let mut changed = BTreeSet::new();
        for m in case.matrices.iter().filter(|m| m.ranks.iter().any(|r| *r > 0)) {
            changed.insert(format!("{}.weight", m.name));
            let (mut exact, mut size): (Vec<f64>, Vec<f64>) =
                case.weight(m).into_iter().map(|w| (f64::from(w), f64::from(w.abs()))).unzip();
            for (k, _) in adapters.iter().filter(|(k, _)| m.ranks[*k] > 0) {
                let (delta, absolute) = case.delta(m, *k);
                exact.iter_mut().zip(delta).for_each(|(e, d)| *e += case.weights[*k] * d);
                size.iter_mut().zip(absolute).for_each(|(s, a)| *s += case.weights[*k].abs() * a);
            }
            for ((x, exact), size) in read(&model, m).into_iter().zip(exact).zip(size) {
                let limit = 0.5 * dtype::ulp(m.dtype, x.abs().max(exact.abs())) + f32_slack(m, adapters.len(), size);
                prop_assert!((x - exact).abs() <= limit, "'{}': {x}, exactly {exact}, limit {limit:e}", m.name);
            }
        }
        prop_assert_eq!(model.len(), base.len());
        let after = contents(&model);
        for (name, before) in contents(&base).into_iter().filter(|(name, _)| !changed.contains(*name)) {
            prop_assert!(after[name] == before, "'{name}' is not targeted, but changed");
        }
    }

    #[test]
    fn merging_and_taking_back_returns_the_base_within_rounding(case in any_case(1)) {
        let dir = folder();
        let base = case.write_base(dir.path());
        let adapters = case.write_adapters(dir.path());
        let with = |weight: f64| adapters.iter().map(|(_, p)| (p.clone(), weight)).collect::<Vec<_>>();
        let there = options(&base, with(1.0), dir.path().join("there"));
        let model = merged(&there);
        let back = merged(&options(&there.output, with(-1.0), dir.path().join("back")));
        for m in &case.matrices {
            let between = read(&model, m);
            for ((x, w), y) in read(&back, m).into_iter().zip(case.weight(m)).zip(between) {
                let w = f64::from(w);
                let largest = x.abs().max(w.abs()).max(y.abs());
                // Half a unit each way; sums are rounded to f32 before.
                let limit = dtype::ulp(m.dtype, largest) + 2.0 * dtype::ulp(Dtype::F32, largest);
                prop_assert!((x - w).abs() <= limit, "'{}': {w} became {x}, limit {limit:e}", m.name);
                prop_assert!(m.ranks[0] > 0 || x == w);
            }
        }
    }

    #[test]
    fn several_adapters_at_once_are_one_after_the_other_within_rounding(case in any_case(3)) {
        let dir = folder();
        let base = case.write_base(dir.path());
        let adapters = case.write_adapters(dir.path());
        let weighted = |(k, path): &(usize, PathBuf)| (path.clone(), case.weights[*k]);
        let once = merged(&options(&base, adapters.iter().map(weighted).collect(), dir.path().join("once")));
        let mut last = base;
        for adapter in &adapters {
            let next = options(&last, vec![weighted(adapter)], dir.path().join(format!("step-{}", adapter.0)));
            merged(&next);
            last = next.output;
        }
        let steps = Checkpoint::open(&last).unwrap();
        for m in &case.matrices {
            let mut size: Vec<f64> = case.weight(m).into_iter().map(|w| f64::from(w.abs())).collect();
            for (k, _) in adapters.iter().filter(|(k, _)| m.ranks[*k] > 0) {
                let (_, absolute) = case.delta(m, *k);
                size.iter_mut().zip(absolute).for_each(|(s, a)| *s += case.weights[*k].abs() * a);
            }
            for ((x, y), size) in read(&once, m).into_iter().zip(read(&steps, m)).zip(size) {
                let roundings = (adapters.len() + 1) as f64;
                let limit = 0.5 * roundings * dtype::ulp(m.dtype, size) + 2.0 * f32_slack(m, adapters.len(), size);
                prop_assert!((x - y).abs() <= limit, "'{}': {x} at once, {y} in steps, limit {limit:e}", m.name);
            }
        }
    }

    #[test]
    fn shards_change_neither_content_nor_names(
        case in any_case(1),
        shard in 1u64..20_000,
        to in prop::option::of(any_float()),
        rounding in prop::sample::select(vec![Rounding::Nearest, Rounding::Stochastic { seed: 7 }]),
    ) {
        let dir = folder();
        // What is not finite cannot be recast.
        let case = Case { others: Vec::new(), ..case };
        let base = case.write_base(dir.path());
        let adapters: Vec<_> = case.write_adapters(dir.path()).into_iter().map(|(_, path)| (path, 1.0)).collect();
        let whole = Options { dtype: to, rounding, ..options(&base, adapters, dir.path().join("whole")) };
        let sharded = Options { max_shard_size: shard, output: dir.path().join("sharded"), ..whole.clone() };
        let (whole, sharded) = (merged(&whole), merged(&sharded));
        prop_assert_eq!(whole.files().len(), 1);
        prop_assert!(contents(&whole) == contents(&sharded));
        for file in sharded.files() {
            let bytes: usize = file.tensors().map(|t| t.bytes().len()).sum();
            prop_assert!(bytes as u64 <= shard || file.tensors().len() == 1);
        }
    }
}
