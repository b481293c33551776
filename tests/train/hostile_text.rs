//! Text, records and tokenizers of others: what made version 0.1.0 panic, hang, run out of memory or pass over half of it.

use crate::common::{entries, refused, relora_kit, run};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn tokenize(input: &Path, more: &[&str]) -> Vec<String> {
    let output = input.with_file_name("out.safetensors");
    let args = ["tokenize", input.to_str().unwrap(), "-o", output.to_str().unwrap()];
    args.iter().chain(more).map(|s| (*s).to_owned()).collect()
}

/// Case 2.
#[test]
fn records_that_are_no_objects_are_named() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.jsonl");
    for line in ["[1]", "\"str\"", "5", "true", "null"] {
        fs::write(&path, format!("{line}\n")).unwrap();
        refused(tokenize(&path, &[]), 2, &["a.jsonl"]);
    }
}

/// Case 3.
#[test]
fn a_tokenizer_that_is_cut_anywhere_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let whole = fs::read_to_string(fixture("tokenizer/tokenizer.json")).unwrap();
    let path = root.path().join("tokenizer.json");
    let decoder = whole.find("\"decoder\"").unwrap();
    for end in (decoder..whole.len() - 1).step_by(7).take(40) {
        let Some(cut) = whole.get(..end) else { continue };
        fs::write(&path, cut).unwrap();
        let error = relora_kit::tokenize::Tokenizer::load(&path, None).err().unwrap();
        assert!(error.exit_code() == 2 && error.message.contains("is not a"), "{error}");
    }
}

/// The program under a limit of 6 GB of memory.
fn limited(args: &[String]) -> (i32, String) {
    let script = format!("ulimit -v 6000000; exec {:?} --threads 1 \"$@\"", relora_kit().get_program());
    let output = Command::new("sh").args(["-c", &script, "sh"]).args(args).output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Case 14. A frame of zstd that repeats one block is small whatever it becomes.
#[test]
fn a_record_that_never_ends_is_refused_before_it_fills_the_memory() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("bomb.jsonl.zst");
    let file = fs::File::create(&path).unwrap();
    let mut encoder = zstd::Encoder::new(file, 1).unwrap();
    encoder.write_all(b"{\"text\":\"").unwrap();
    let block = vec![b'a'; 1 << 24];
    for _ in 0..512 {
        encoder.write_all(&block).unwrap();
    }
    encoder.write_all(b"\"}\n").unwrap();
    encoder.finish().unwrap();
    let (code, stderr) = limited(&tokenize(&path, &["--max-bytes", "1000"]));
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("a document of more than 1073741824 bytes"), "{stderr}");
    assert_eq!(entries(root.path()), ["bomb.jsonl.zst"]);
}

/// Case 18.
#[test]
fn links_to_files_below_a_folder_are_read() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("in")).unwrap();
    fs::write(root.path().join("real.txt"), "hello text").unwrap();
    std::os::unix::fs::symlink("../real.txt", root.path().join("in/a.txt")).unwrap();
    let (code, stdout, stderr) = run(tokenize(&root.path().join("in"), &["--format", "json"]));
    assert_eq!(code, 0, "{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary["text_bytes"], 10);
}

/// Case 20. Each byte of the footer, and of the pages, replaced: the reader panics on some.
#[test]
fn damaged_parquet_is_read_or_refused() {
    use parquet::{
        data_type::{ByteArray, ByteArrayType},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.parquet");
    let schema = std::sync::Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
    let properties = std::sync::Arc::new(WriterProperties::builder().build());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    let mut column = rows.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("one"), ByteArray::from("two")], None, None).unwrap();
    column.close().unwrap();
    rows.close().unwrap();
    writer.close().unwrap();
    let options = relora_kit::tokenize::Options {
        inputs: vec![path.clone()],
        include: None,
        layout: relora_kit::tokenize::Layout { field: "text".into(), ..Default::default() },
        max_bytes: None,
        skip_unreadable: false,
        special_tokens: false,
        output: root.path().join("out.safetensors"),
        force: true,
    };
    let progress = relora_kit::progress::Progress::hidden();
    for at in 0..bytes.len() {
        for value in [0xff, 0x7f, 0x01, bytes[at] ^ 0x55] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            fs::write(&path, &damaged).unwrap();
            // An answer or an error; a panic fails the test.
            let _ = relora_kit::tokenize::run(&options, &relora_kit::tokenize::Tokenizer::Bytes, &progress);
        }
    }
}

/// Case 22. The pattern tries ways in number exponential in the text.
#[test]
fn one_signal_ends_a_tokenizer_that_would_take_for_ever() {
    let root = tempfile::tempdir().unwrap();
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("tokenizer/tokenizer.json")).unwrap()).unwrap();
    tokenizer["pre_tokenizer"] = serde_json::json!({
        "type": "Split", "pattern": {"Regex": "(?>(a|aa)+)+(?!a)c"}, "behavior": "Isolated", "invert": false
    });
    let file = root.path().join("tokenizer.json");
    fs::write(&file, tokenizer.to_string()).unwrap();
    let text = root.path().join("a.txt");
    fs::write(&text, "a".repeat(100_000)).unwrap();
    let args = tokenize(&text, &["--tokenizer", file.to_str().unwrap()]);
    let mut command = Command::new(relora_kit().get_program());
    let mut child = command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(child.try_wait().unwrap().is_none(), "the pattern takes its time");
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(10), "it goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_eq!(entries(root.path()), ["a.txt", "tokenizer.json"]);
}
