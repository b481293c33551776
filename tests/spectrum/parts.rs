//! `relora-kit spectrum --part` and `--join`: a job array gives what one process gives.

use crate::common::synthetic_run::{Spec, noise, write_run};
use crate::common::{f32_bytes, refused, run, write_tensors};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

const SHAPES: [(usize, usize); 5] = [(48, 64), (300, 280), (32, 64), (64, 64), (20, 8)];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Five matrices of unequal cost, one of them with a NaN on the tuned side, and a vector.
fn checkpoints(folder: &Path) -> Vec<String> {
    let write = |file: &str, step: u64, broken: bool| {
        let path = folder.join(file);
        let names: Vec<String> = (0..SHAPES.len()).map(|i| format!("model.layers.{i}.mlp.up_proj.weight")).collect();
        let shapes: Vec<[usize; 2]> = SHAPES.iter().map(|&(m, n)| [m, n]).collect();
        let mut tensors: Vec<(&str, &str, &[usize], Vec<u8>)> = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let mut values = noise(i as u64, shapes[i].iter().product());
            let moved = noise(step + i as u64, values.len());
            values.iter_mut().zip(moved).for_each(|(v, m)| *v += step as f32 * 1e-3 * m);
            if broken && i == 3 {
                values[7] = f32::NAN;
            }
            tensors.push((name, "F32", &shapes[i], f32_bytes(&values)));
        }
        tensors.push(("model.norm.weight", "F32", &[64], f32_bytes(&noise(3, 64))));
        write_tensors(&path, &tensors);
        path
    };
    let (base, tuned) = (write("base.safetensors", 0, false), write("tuned.safetensors", 100, true));
    let args = [
        "spectrum",
        "--base",
        text(&base),
        "--tuned",
        text(&tuned),
        "--skip-nonfinite",
        "--rank",
        "4",
        "--roundings=1",
    ];
    args.map(str::to_owned).to_vec()
}

fn measure_parts(args: &[String], folder: &Path, count: usize) -> Vec<PathBuf> {
    let part = |index| {
        let path = folder.join(format!("part-{index}-of-{count}.json"));
        let part = [format!("--part={index}/{count}"), "-o".into(), text(&path).into()];
        let (code, stdout, stderr) = run(args.iter().chain(&part));
        assert!(code == 0 && stdout.is_empty(), "{stderr}");
        path
    };
    (1..=count).map(part).collect()
}

/// `spectrum --join PARTS`, in an order that is not theirs.
fn joined(parts: &[PathBuf], more: &[&str]) -> (i32, String, String) {
    let parts = parts.iter().rev().map(|p| text(p));
    run(["spectrum", "--join"].into_iter().chain(parts).chain(more.iter().copied()))
}

#[test]
fn joining_any_number_of_parts_gives_the_bytes_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let args = checkpoints(folder.path());
    let gates = ["--require", "effective_rank > 3*r for 50%", "--require", "rank_above_noise < 30 on *layers.1*"];
    let formats: [&[&str]; 5] = [
        &["--format", "json", "--sigma"],
        &["--format", "json"],
        &["--format", "csv"],
        &["--format", "markdown"],
        &["--format", "table"],
    ];
    for count in [1, 2, 3, 7] {
        let parts = measure_parts(&args, folder.path(), count);
        for format in formats {
            let whole = run(args.iter().map(String::as_str).chain(format.iter().copied()).chain(gates));
            let joined = joined(&parts, &[format, &gates].concat());
            assert_eq!((whole.0, &whole.1), (joined.0, &joined.1), "{count} parts, {format:?}: {}", joined.2);
            assert_eq!(whole.0, 1, "the second gate fails");
        }
    }
}

#[test]
fn pages_earlier_results_and_threads_change_nothing_either() {
    let folder = tempfile::tempdir().unwrap();
    let run_folder = write_run(folder.path(), Spec::default());
    let args = ["spectrum".to_owned(), "--run".into(), text(&run_folder).into()];
    let before = folder.path().join("before.json");
    assert_eq!(run(args.iter().map(String::as_str).chain(["--format=json", "-o", text(&before)])).0, 0);
    let single_threaded = [&args[..], &["--threads=1".to_owned()]].concat();
    for count in [2, 3, 7] {
        let parts = measure_parts(&single_threaded, folder.path(), count);
        let page = |name: &str| folder.path().join(format!("{name}-{count}.html"));
        let (one, two) = (page("whole"), page("joined"));
        let more = ["--require", "rank_above_noise > 2*r", "--against", text(&before), "--format", "json", "--report"];
        let whole = run(args.iter().map(String::as_str).chain(more).chain([text(&one)]));
        let joined = joined(&parts, &[&more[..], &[text(&two)]].concat());
        assert_eq!((whole.0, &whole.1), (0, &joined.1), "{} {}", whole.2, joined.2);
        assert!(joined.1.contains("manifest.json\": \""), "the hash of the manifest is there: {}", joined.1);
        assert_eq!(fs::read(one).unwrap(), fs::read(two).unwrap(), "{count} parts");
    }
}

#[test]
fn a_part_reads_as_a_spectrum_of_its_share_but_is_no_whole_one() {
    let folder = tempfile::tempdir().unwrap();
    let args = checkpoints(folder.path());
    let parts = measure_parts(&args, folder.path(), 2);
    let read = |p: &PathBuf| serde_json::from_slice::<Value>(&fs::read(p).unwrap()).unwrap();
    let [a, b] = [read(&parts[0]), read(&parts[1])];
    let names = |v: &Value| v["matrices"].as_array().unwrap().iter().map(|m| m["name"].clone()).collect::<Vec<_>>();
    assert_eq!((&a["schema"], &a["part"]["index"], &a["part"]["count"]), (&1.into(), &1.into(), &2.into()));
    assert_eq!(names(&a), ["model.layers.1.mlp.up_proj.weight"], "the costliest alone");
    assert_eq!(names(&b).len(), 3);
    let whole: Vec<&str> = args.iter().map(String::as_str).collect();
    refused([&whole[..], &["--against", text(&parts[0])]].concat(), 2, &["part 1 of 2", "--join"]);
}

#[test]
fn missing_and_repeated_parts_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let parts = measure_parts(&checkpoints(folder.path()), folder.path(), 7);
    fn combine(parts: &[&PathBuf]) -> Vec<String> {
        ["spectrum", "--combine"].into_iter().chain(parts.iter().map(|p| text(p))).map(str::to_owned).collect()
    }
    let few: Vec<&PathBuf> = parts.iter().step_by(3).collect();
    refused(combine(&few), 2, &["4 of 7 parts are missing: 2/7, 3/7, 5/7, 6/7"]);
    let twice: Vec<&PathBuf> = parts.iter().chain([&parts[2]]).collect();
    refused(combine(&twice), 2, &["part 3/7 is given twice", "part-3-of-7.json"]);
}

#[test]
fn parts_of_other_jobs_are_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let args = checkpoints(folder.path());
    let parts = measure_parts(&args, folder.path(), 2);
    let other = |name: &str, args: &[String], count| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        measure_parts(args, &folder, count).pop().unwrap()
    };
    let dense = other("dense", &[&args[..], &["--dense".to_owned()]].concat(), 2);
    let three = other("three", &args, 3);
    let swapped: Vec<String> = args.iter().map(|a| a.replace("tuned.safe", "base.safe")).collect();
    let swapped = other("swapped", &swapped, 2);
    let tuned = folder.path().join("tuned.safetensors");
    let mut bytes = fs::read(&tuned).unwrap();
    bytes.chunks_mut(4).skip(1000).for_each(|c| c[0] ^= 1);
    fs::write(&tuned, bytes).unwrap();
    let trained_on = other("later", &args, 2);
    let whole = folder.path().join("whole.json");
    run(args.iter().map(String::as_str).chain(["--format", "json", "-o", text(&whole)]));
    let combine = |with: &Path, what: &[&str]| refused(["spectrum", "--combine", text(&parts[0]), text(with)], 2, what);
    combine(&dense, &["parts of different jobs", "part-2-of-2.json", "--dense is false in the first and true"]);
    combine(&three, &["the number of parts is 2 in the first and 3"]);
    combine(&swapped, &["the list of sources", "base.safetensors"]);
    combine(&trained_on, &["the content of an input file", "tuned.safetensors"]);
    combine(&whole, &["whole.json' is no part"]);
    combine(&folder.path().join("nowhere.json"), &["nowhere.json"]);
    combine(&folder.path().join("base.safetensors"), &["is not a spectrum"]);
}

#[test]
fn a_part_whose_lists_do_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let parts = measure_parts(&checkpoints(folder.path()), folder.path(), 2);
    let text_of = fs::read_to_string(&parts[1]).unwrap();
    let mut value: Value = serde_json::from_str(&text_of).unwrap();
    let combine = ["spectrum", "--combine", text(&parts[0]), text(&parts[1])];
    value["matrices"].as_array_mut().unwrap().pop();
    fs::write(&parts[1], value.to_string()).unwrap();
    refused(combine, 2, &["part-2-of-2.json' is damaged"]);
    let mut value: Value = serde_json::from_str(&text_of).unwrap();
    value["part"]["measured"][0]["weight"] = u64::MAX.into();
    fs::write(&parts[1], value.to_string()).unwrap();
    refused(combine, 2, &["part-2-of-2.json' is damaged"]);
    let mut value: Value = serde_json::from_str(&text_of).unwrap();
    value["part"]["measured"][0]["values"][0] = "00ff".into();
    fs::write(&parts[1], value.to_string()).unwrap();
    refused(combine, 2, &["part-2-of-2.json' is damaged"]);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let args = checkpoints(folder.path());
    let with = |more: &[&'static str]| run(args.iter().map(String::as_str).chain(more.iter().copied()));
    for more in [
        &["--shard", "0/3"][..],
        &["--shard", "4/3"],
        &["--shard", "1/2", "--require", "effective_rank > 1"],
        &["--shard", "1/2", "--report", "page.html"],
        &["--shard", "1/2", "--format", "csv"],
        &["--combine", "part.json"],
    ] {
        let (code, _, stderr) = with(more);
        assert_eq!(code, 2, "{more:?}: {stderr}");
    }
    assert!(with(&["--shard", "4/3"]).2.contains("expected I/N"));
}
