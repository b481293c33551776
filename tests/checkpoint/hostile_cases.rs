//! Cases in which version 0.1.0 lost a file, wrote a wrong one, hung, crashed or passed on what a file said. Each test
//! failed there. What belongs to one command alone is tested beside it: `train/forgeries.rs` (a stripped run),
//! `train/locks.rs` (two trainings of one run), `train/hostile_text.rs` (text, tokenizers).

use crate::common::{entries, f32_bytes, refused, relora_kit, run, small_merge::Small, write_tensors};
use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt, fs::FileTypeExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// The program, started in `folder`, with its output kept.
fn start<S: AsRef<OsStr>>(folder: &Path, args: impl IntoIterator<Item = S>) -> Child {
    let program = relora_kit().get_program().to_owned();
    let mut command = Command::new(program);
    command.current_dir(folder).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Exit code and stderr, or a failed test after `seconds`.
fn end_of(mut child: Child, seconds: u64) -> (i32, String) {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > Duration::from_secs(seconds) {
            child.kill().unwrap();
            panic!("it did not end within {seconds} s");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits until `child` has mapped a file of this name.
fn wait_for_mapping(child: &mut Child, name: &str) {
    let maps = format!("/proc/{}/maps", child.id());
    let began = Instant::now();
    while !fs::read_to_string(&maps).is_ok_and(|maps| maps.contains(name)) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it read");
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}

/// `spectrum --shard 1/1` of two small checkpoints, as a value to change.
fn part(folder: &Path) -> serde_json::Value {
    let path = folder.join("part.json");
    let (base, tuned) = (text(&fixture("tiny_llama")), text(&fixture("relora")));
    let (code, _, stderr) =
        run(["spectrum", "--base", &base, "--tuned", &tuned, "--shard", "1/1", "-o", &text(&path), "--force"]);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// What `spectrum --combine` says about a part that was changed.
fn combined(change: impl FnOnce(&mut serde_json::Value), more: &[&str]) -> (i32, String) {
    let root = tempfile::tempdir().unwrap();
    let mut value = part(root.path());
    change(&mut value);
    let path = root.path().join("forged.json");
    fs::write(&path, value.to_string()).unwrap();
    let path = text(&path);
    let args = [&["spectrum", "--combine", &path], more].concat();
    end_of(start(root.path(), args), 60)
}

/// Case 1.
#[test]
fn a_part_whose_hash_is_html_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let page = root.path().join("page.html");
    let forge = |v: &mut serde_json::Value| {
        v["sources"][0]["files"] = serde_json::json!({"model.safetensors": "<script>alert('hash')</script>"});
    };
    let (code, stderr) = combined(forge, &["--report", &text(&page)]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("is not 64 hexadecimal digits") && !page.exists(), "{stderr}");
}

/// Case 4.
#[test]
fn force_replaces_no_input_no_other_folder_and_nothing_of_another_kind() {
    let small = Small::new();
    let root = small.0.path();
    fs::write(small.path("notes"), "precious").unwrap();
    fs::create_dir(small.path("other")).unwrap();
    fs::write(small.path("other/weights"), "precious").unwrap();
    let merge = |output: &str| -> Vec<String> {
        let mut args = small.args(&["--force"]);
        let place = args.iter().position(|a| a == "-o").unwrap();
        args[place + 1] = output.to_owned();
        args
    };
    let before = entries(root);
    refused(merge(&text(root)), 2, &["contains the input"]);
    refused(merge(&text(&small.path("base"))), 2, &["is the input"]);
    refused(merge(&text(&small.path("adapter"))), 2, &["is the input"]);
    refused(merge(&text(&small.path("other"))), 2, &["holds 'weights', which this command does not write"]);
    std::os::unix::fs::symlink("base", small.path("link")).unwrap();
    refused(merge(&text(&small.path("link"))), 2, &["is the input"]);
    fs::remove_file(small.path("link")).unwrap();
    let (base, other) = (text(&small.path("base")), text(&small.path("other")));
    refused(["inspect", &base, "-o", &other, "--force"], 2, &["is a folder; this command writes a file"]);
    let report = ["spectrum", "--base", &base, "--tuned", &base, "--report", &other, "--force"];
    refused(report, 2, &["is a folder; this command writes a file"]);
    let text_file = text(&small.path("notes"));
    refused(["tokenize", &text_file, "-o", &other, "--force"], 2, &["is a folder"]);
    refused(["tokenize", &text_file, "-o", &text_file, "--force"], 2, &["is the input"]);
    let weights = text(&small.path("base/model.safetensors"));
    refused(["inspect", &weights, "-o", &weights, "--force"], 2, &["is the input"]);
    fs::hard_link(&weights, small.path("hard")).unwrap();
    refused(["inspect", &base, "-o", &text(&small.path("hard")), "--force"], 2, &["is another name of the input"]);
    fs::remove_file(small.path("hard")).unwrap();
    let twice = ["spectrum", "--base", &base, "--tuned", &base, "--report", "same", "-o", "./same"];
    refused(twice, 2, &["two outputs go to"]);
    assert_eq!(entries(root), before);
    assert_eq!(fs::read_to_string(small.path("other/weights")).unwrap(), "precious");
    assert_eq!(fs::read_to_string(small.path("notes")).unwrap(), "precious");
}

/// Case 4, of a GGUF file.
#[test]
fn convert_does_not_replace_its_source() {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("m.gguf");
    fs::copy(fixture("gguf/types.gguf"), &source).unwrap();
    refused(["convert", &text(&source), "-o", &text(&source), "--force"], 2, &["is the input"]);
    assert!(source.is_file());
}

/// Starts a script as process 1 of a PID namespace, as a container does; `None` where that is not permitted.
fn as_first_process(folder: &Path, args: &[&str]) -> Option<(i32, String)> {
    let allowed = Command::new("unshare").args(["--map-root-user", "--pid", "--fork", "true"]).status();
    if !allowed.is_ok_and(|status| status.success()) {
        println!("skipped: PID namespaces are not permitted here");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--pid", "--fork"]).arg(relora_kit().get_program()).args(args);
    let child = command.current_dir(folder).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    Some(end_of(child, 60))
}

/// Case 5. Every main process of a container has the number 1.
#[test]
fn a_process_of_the_same_number_does_not_take_what_another_holds() {
    let small = Small::new();
    let held = small.path(".out.tmp-1");
    fs::create_dir(&held).unwrap();
    fs::write(held.join("model.safetensors"), "half of another process").unwrap();
    let owner = fs::File::open(&held).unwrap();
    rustix::fs::flock(&owner, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let args = small.args(&[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let Some((code, stderr)) = as_first_process(small.0.path(), &args) else { return };
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(fs::read_to_string(held.join("model.safetensors")).unwrap(), "half of another process");
}

/// Case 6.
#[test]
fn a_planted_link_is_not_written_through() {
    let root = tempfile::tempdir().unwrap();
    let victim = root.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    std::os::unix::fs::symlink("victim", root.path().join(".res.json.tmp-1")).unwrap();
    let model = text(&fixture("tiny_llama"));
    let args = ["inspect", &model, "--format", "json", "-o", "res.json"];
    let Some((code, stderr)) = as_first_process(root.path(), &args) else { return };
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert!(root.path().join("res.json").symlink_metadata().unwrap().is_file());
}

/// A checkpoint of 1 GiB that takes no space, and an adapter for its last weight.
fn large(root: &Path) -> Vec<OsString> {
    use std::io::{Seek, Write};
    let (extent, layers) = (4096, 16);
    let name = |i: usize| format!("model.layers.{i}.self_attn.q_proj");
    let bytes = extent * extent * 4;
    let header: serde_json::Map<String, serde_json::Value> = (0..layers)
        .map(|i| {
            let place = [i * bytes, (i + 1) * bytes];
            let entry = serde_json::json!({"dtype": "F32", "shape": [extent, extent], "data_offsets": place});
            (name(i) + ".weight", entry)
        })
        .collect();
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = fs::File::create(root.join("large.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let begin = file.stream_position().unwrap();
    file.set_len(begin + (layers * bytes) as u64).unwrap();
    ["inspect", "large.safetensors", "--stats", "-o", "stats.json"].map(OsString::from).to_vec()
}

/// Case 7, first part. The mapping of a file that was cut short raises SIGBUS.
#[test]
fn a_file_that_is_cut_short_while_it_is_mapped_ends_in_a_sentence() {
    let root = tempfile::tempdir().unwrap();
    let args = large(root.path());
    let mut child = start(root.path(), args);
    wait_for_mapping(&mut child, "large.safetensors");
    fs::File::options().write(true).open(root.path().join("large.safetensors")).unwrap().set_len(1 << 16).unwrap();
    let (code, stderr) = end_of(child, 60);
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("'large.safetensors'") && stderr.contains("cut short"), "{stderr}");
    assert_eq!(entries(root.path()), ["large.safetensors"]);
}

/// Case 7, second part.
#[test]
fn a_file_that_is_rewritten_in_place_withholds_the_output() {
    let root = tempfile::tempdir().unwrap();
    let args = large(root.path());
    let mut child = start(root.path(), args);
    wait_for_mapping(&mut child, "large.safetensors");
    signal(&child, "-STOP");
    let file = fs::File::options().write(true).open(root.path().join("large.safetensors")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 1 << 20).unwrap();
    signal(&child, "-CONT");
    let (code, stderr) = end_of(child, 120);
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("'large.safetensors' changed while it was read"), "{stderr}");
    assert_eq!(entries(root.path()), ["large.safetensors"]);
}

/// Case 8.
#[test]
fn counts_and_numbers_of_a_part_are_checked_before_they_are_used() {
    let number = |v: &mut serde_json::Value, key: &str, n: u64| v["part"][key] = n.into();
    let (code, stderr) = combined(|v| number(v, "count", 1 << 40), &[]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains(&format!("{} of {} parts are missing", (1u64 << 40) - 1, 1u64 << 40)), "{stderr}");
    let values = |v: &mut serde_json::Value, digits: &str| {
        let first = v["part"]["measured"][0]["values"][0].as_str().unwrap().to_owned();
        v["part"]["measured"][0]["values"][0] = format!("{}{digits}{}", &first[..16], &first[32..]).into();
    };
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let damaged: [(&str, Change); 4] = [
        ("a count of 0", &|v| number(v, "count", 0)),
        ("no elements", &|v| v["matrices"][0]["shape"] = serde_json::json!([0, 0])),
        ("NaN", &|v| values(v, "7ff8000000000000")),
        ("a negative singular value", &|v| values(v, "bff0000000000000")),
    ];
    for (what, change) in damaged {
        let (code, stderr) = combined(change, &[]);
        assert!(code == 2 && stderr.contains("is damaged"), "{what}: {code} {stderr}");
    }
}

/// Case 9.
#[test]
fn the_number_of_layers_is_compared_with_the_tensors_before_anything_is_allocated() {
    let root = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("tiny_llama")).unwrap().flatten() {
        fs::copy(entry.path(), root.path().join(entry.file_name())).unwrap();
    }
    let config = root.path().join("config.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    for layers in [1_000_000_000_000u64, 60_000] {
        value["num_hidden_layers"] = layers.into();
        fs::write(&config, value.to_string()).unwrap();
        let args = ["generate", "--model", &text(root.path()), "--prompt", "x", "--max-new-tokens", "3"];
        let began = Instant::now();
        refused(args, 2, &["num_hidden_layers"]);
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

/// Case 10.
#[test]
fn a_key_of_60000_parts_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let key = vec!["a"; 60_000].join(".");
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny.toml");
    let output = text(&root.path().join("out"));
    let args = ["train", "--config", &text(&tiny), "--set", &format!("{key}=1"), "-o", &output];
    let stderr = refused(args, 2, &["--set"]);
    assert!(stderr.len() < 2000, "{}", stderr.len());
}

/// Names that mean something to a terminal, a browser, a spreadsheet or a reader of Markdown.
const NAMES: [&str; 7] = [
    "model.layers.0.<script>alert(1)</script>.weight",
    "model.layers.1.line\nbreak\r|pipe|.weight",
    "model.layers.2.\u{1b}[31mred\u{1b}]0;title\u{7}\u{1b}[2J.weight",
    "=cmd|' /C calc'!A0",
    "\t=1+1",
    "model.layers.3.\u{202e}gnirts\u{200b}.weight",
    "model.layers.4.<!--[l](javascript:alert(4)).weight",
];

fn hostile_names(path: &Path, shift: f32) {
    let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 11) as f32 - 5.0) * (1.0 + shift)).collect();
    let bytes = f32_bytes(&values);
    let tensors: Vec<_> = NAMES.iter().map(|name| (*name, "F32", [8usize, 8], bytes.clone())).collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, d, s, b)| (*n, *d, s.as_slice(), b.clone())).collect();
    write_tensors(path, &tensors);
}

/// Whether text holds nothing that controls a terminal or reorders what is shown.
#[track_caller]
fn plain(text: &str) {
    let bad = text.chars().find(|c| (c.is_control() && *c != '\n') || ['\u{202e}', '\u{200b}'].contains(c));
    assert_eq!(bad, None, "{text:?}");
}

/// Case 11.
#[test]
fn names_mean_nothing_in_any_format() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = (root.path().join("a.safetensors"), root.path().join("b.safetensors"));
    hostile_names(&a, 0.0);
    hostile_names(&b, 0.5);
    let (a, b, page) = (text(&a), text(&b), text(&root.path().join("page.html")));
    let shown = |format: &str, more: &[&str]| {
        let (code, stdout, stderr) =
            run([&["spectrum", "--base", &a, "--tuned", &b, "--format", format], more].concat());
        assert_eq!(code, 0, "{stderr}");
        plain(&stdout);
        stdout
    };
    shown("table", &["--report", &page]);
    let csv = shown("csv", &[]);
    assert!(csv.contains("\n'=cmd|' /C calc'!A0,") && csv.lines().count() == NAMES.len() + 1, "{csv}");
    let markdown = shown("markdown", &[]);
    assert!(!markdown.contains("<script") && !markdown.contains("<!--") && !markdown.contains("[l]("), "{markdown}");
    assert!(!fs::read_to_string(page).unwrap().contains("<script"));
}

/// Case 12.
#[test]
fn names_in_errors_do_not_reach_the_terminal_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let (a, empty) = (root.path().join("a.safetensors"), root.path().join("b.safetensors"));
    hostile_names(&a, 0.0);
    write_tensors(&empty, &[("x\u{1b}[2J\nerror: forged", "F32", &[2, 2], f32_bytes(&[1.0; 4]))]);
    let (code, stdout, stderr) = run(["spectrum", "--base", &text(&empty), "--tuned", &text(&a)]);
    assert_ne!(code, 0);
    plain(&(stdout + &stderr));
    assert!(!stderr.contains("\nerror: forged"), "{stderr}");
}

/// Case 13.
#[test]
fn pipes_are_refused_at_once_and_the_first_signal_ends_a_command() {
    let root = tempfile::tempdir().unwrap();
    let pipe = root.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    fs::create_dir(root.path().join("model")).unwrap();
    std::os::unix::fs::symlink("../pipe", root.path().join("model/model.safetensors")).unwrap();
    for args in [
        &["inspect", "pipe"][..],
        &["inspect", "model"],
        &["diff", "pipe", "pipe"],
        &["spectrum", "--combine", "pipe"],
        &["convert", "pipe", "-o", "out"],
        &["train", "--config", "pipe", "-o", "out"],
        &["eval", "--model", "pipe", "--data", "pipe"],
    ] {
        let (code, stderr) = end_of(start(root.path(), args), 20);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert!(stderr.contains("is a pipe, expected a regular file"), "{args:?}: {stderr}");
    }
    // Text may come from a pipe; where nothing comes, one signal is enough.
    let child = start(root.path(), ["tokenize", "pipe", "-o", "tokens.safetensors"]);
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, "-TERM");
    let (code, stderr) = end_of(child, 20);
    assert_eq!(code, 3, "{stderr}");
    assert_eq!(entries(root.path()), ["model", "pipe"]);
}

/// Case 15.
#[test]
fn devices_and_pipes_are_written_to_or_refused_and_never_replaced() {
    let root = tempfile::tempdir().unwrap();
    let model = text(&fixture("tiny_llama"));
    let (code, _, stderr) = run(["inspect", &model, "-o", "/dev/null"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(Path::new("/dev/null").metadata().unwrap().file_type().is_char_device());
    let (code, stdout, _) = run(["inspect", &model, "-o", "-"]);
    assert!(code == 0 && stdout.contains("lm_head.weight"), "{stdout}");
    let pipe = root.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let output = text(&pipe);
    let child = start(root.path(), ["inspect", &model, "-o", &output, "--force"]);
    let received = fs::read_to_string(&pipe).unwrap();
    assert_eq!(end_of(child, 20).0, 0);
    assert!(received.contains("lm_head.weight"));
    let stderr = refused(["tokenize", &model, "-o", &output, "--force"], 2, &["is a pipe"]);
    assert!(!stderr.contains("--force"), "{stderr}");
    assert!(pipe.symlink_metadata().unwrap().file_type().is_fifo());
}

/// Case 17.
#[test]
fn a_table_with_a_cell_of_25_megabytes_takes_seconds() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.safetensors");
    let header = serde_json::json!({
        "__metadata__": {"a": "x".repeat(25_000_000)},
        "t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    });
    crate::common::write_raw(&path, &header.to_string(), &[0; 4]);
    let began = Instant::now();
    let (code, stdout, _) = run(["inspect", &text(&path)]);
    assert!(code == 0 && stdout.len() < 10_000, "{}", stdout.len());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Case 19.
#[test]
fn paths_that_are_not_utf8_are_read_and_shown() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(OsStr::from_bytes(b"nu_\xff"));
    fs::create_dir(&path).unwrap();
    for entry in fs::read_dir(fixture("tiny_llama")).unwrap().flatten() {
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    fs::write(path.join(OsStr::from_bytes(b"x\xfe.json")), "{}").unwrap();
    let shown = |args: &[&OsStr]| {
        let output = relora_kit().args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let json = "json".as_ref();
    let path = path.as_os_str();
    assert!(shown(&["inspect".as_ref(), path, "--format".as_ref(), json]).contains("nu_\u{fffd}"));
    let spectrum = ["spectrum", "--base"].map(OsStr::new);
    shown(&[&spectrum[..], &[path, "--tuned".as_ref(), path, "--format".as_ref(), json]].concat());
    let output = root.path().join("out");
    shown(&["merge".as_ref(), "--base".as_ref(), path, "-o".as_ref(), output.as_os_str(), "--format".as_ref(), json]);
    assert!(output.join(OsStr::from_bytes(b"x\xfe.json")).exists(), "the copy keeps its name");
}
