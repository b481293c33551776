//! `relora-kit merge --shard` and `--combine`: a job array writes what one process writes.

use crate::common::{entries, refused, run};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The fixtures, and an output with one file for every few tensors.
struct Array {
    folder: tempfile::TempDir,
    args: Vec<String>,
}

impl Array {
    fn new(more: &[&str]) -> Array {
        let folder = tempfile::tempdir().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let copy = |name: &str| {
            let target = folder.path().join(name);
            fs::create_dir(&target).unwrap();
            for file in fixtures.join(name).read_dir().unwrap().map(|e| e.unwrap().path()) {
                fs::copy(&file, target.join(file.file_name().unwrap())).unwrap();
            }
            target.display().to_string()
        };
        let (base, adapter) = (copy("tiny_llama"), copy("tiny_adapter"));
        let args = ["merge", "--base", &base, "--adapter", &adapter, "--max-shard-size", "20KB"];
        let args = args.iter().chain(more).map(|s| (*s).to_owned()).collect();
        Array { folder, args }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let out = self.out().display().to_string();
        self.args
            .iter()
            .map(String::as_str)
            .chain(["-o", &out])
            .chain(more.iter().copied())
            .map(str::to_owned)
            .collect()
    }

    #[track_caller]
    fn done(&self, more: &[&str]) -> String {
        let (code, stdout, stderr) = run(self.args(more));
        assert_eq!(code, 0, "{more:?}: {stderr}");
        stdout
    }
}

fn bytes(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    entries(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

#[test]
fn any_number_of_jobs_in_any_order_writes_the_bytes_of_one_process() {
    for more in [&[][..], &["--dtype", "bf16", "--rounding", "stochastic", "--seed", "7"]] {
        let array = Array::new(more);
        array.done(&[]);
        let whole = bytes(&array.out());
        assert!(whole.len() > 5 && whole.contains_key("config.json"), "{:?}", whole.keys());
        fs::remove_dir_all(array.out()).unwrap();
        for count in [1, 2, 3, 7, 40] {
            for index in (1..=count).rev() {
                array.done(&["--shard", &format!("{index}/{count}")]);
                assert!(!array.out().exists(), "the output appears at once");
            }
            array.done(&["--combine"]);
            assert!(bytes(&array.out()) == whole, "{count} jobs");
            assert!(!entries(array.folder.path()).contains(&"out.parts".to_owned()), "the parts are removed");
            fs::remove_dir_all(array.out()).unwrap();
        }
    }
}

#[test]
fn the_combined_report_is_about_all_tensors() {
    let array = Array::new(&["--dtype", "bf16", "--format", "json", "--threads", "1"]);
    let whole = array.done(&[]);
    fs::remove_dir_all(array.out()).unwrap();
    let parts: Vec<serde_json::Value> =
        (1..=3).map(|i| serde_json::from_str(&array.done(&["--shard", &format!("{i}/3")])).unwrap()).collect();
    assert_eq!(array.done(&["--combine"]), whole);
    let whole: serde_json::Value = serde_json::from_str(&whole).unwrap();
    let tensors = |v: &serde_json::Value| v["tensors"].as_array().unwrap().len();
    assert_eq!(parts.iter().map(tensors).sum::<usize>(), tensors(&whole));
    assert!(parts[0]["output"].as_str().unwrap().ends_with("out.parts/1-of-3"), "{}", parts[0]["output"]);
}

#[test]
fn missing_damaged_and_foreign_parts_are_refused_and_nothing_is_written() {
    let array = Array::new(&[]);
    refused(array.args(&["--combine"]), 2, &["no parts in", "out.parts"]);
    for index in [1, 3, 4] {
        array.done(&["--shard", &format!("{index}/4")]);
    }
    refused(array.args(&["--combine"]), 2, &["1 of 4 parts are missing", "2/4"]);
    refused(array.args(&["--shard", "1/4"]), 2, &["1-of-4", "exists already"]);
    array.done(&["--shard", "2/4"]);
    refused(array.args(&["--combine", "--dtype", "bf16"]), 2, &["another merge: --dtype is keep there and bf16 here"]);
    array.done(&["--shard", "1/2"]);
    refused(array.args(&["--combine"]), 2, &["different jobs", "1-of-2", "1-of-4"]);
    let parts = array.folder.path().join("out.parts");
    fs::remove_dir_all(parts.join("1-of-2")).unwrap();

    let part = parts.join("2-of-4");
    let file = entries(&part).into_iter().find(|n| n.ends_with(".safetensors")).unwrap();
    let whole = fs::read(part.join(&file)).unwrap();
    fs::write(part.join(&file), &whole[..whole.len() - 1]).unwrap();
    refused(array.args(&["--combine"]), 2, &[&file, "--force"]);
    array.done(&["--shard", "2/4", "--force"]);

    let base = array.folder.path().join("tiny_llama/model.safetensors");
    let before = fs::read(&base).unwrap();
    let mut later = before.clone();
    let last = later.len() - 1;
    later[last] ^= 1;
    fs::write(&base, later).unwrap();
    refused(array.args(&["--combine"]), 2, &["another merge: an input file", "model.safetensors"]);
    fs::write(&base, before).unwrap();
    assert!(!array.out().exists());
    array.done(&["--combine"]);
    refused(array.args(&["--shard", "1/4"]), 2, &["exists already"]);
}

#[test]
fn what_a_killed_job_left_is_no_part() {
    let array = Array::new(&[]);
    let left = array.folder.path().join("out.parts/.2-of-2.tmp-1");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("part.json"), "{").unwrap();
    array.done(&["--shard", "1/2"]);
    refused(array.args(&["--combine"]), 2, &["1 of 2 parts are missing", "2/2"]);
    array.done(&["--shard", "2/2"]);
    assert!(!left.exists());
    array.done(&["--combine"]);
}
