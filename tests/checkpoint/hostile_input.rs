//! Files that were damaged or made to do damage: refused in time and within memory, never a panic.

use crate::common::{entry_points, write_raw};
use proptest::prelude::*;
use std::{
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

/// One change of a valid file. Places are shares of its length.
#[derive(Clone, Debug)]
enum Change {
    Flip(f64, u8),
    Write(f64, Vec<u8>),
    Insert(f64, Vec<u8>),
    Remove(f64, f64),
    Repeat(f64, f64, usize),
    Truncate(f64),
}

/// Bytes that parsers trip over: huge lengths, deep nesting, digits, the ends of numbers.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let fixed: Vec<Vec<u8>> = [
        &b"\xff\xff\xff\xff\xff\xff\xff\xff"[..],
        b"\xff\xff\xff\x7f",
        &(100u64 << 30).to_le_bytes(),
        b"999999999999",
        b"18446744073709551615",
        b"-1",
        b"1e308",
        b"[[[[[[[[",
        b"{\"\":",
        b"null",
        b"\"",
        b"\\ud800",
        b"(\x85\x85\x85",
        b"\x8a\xff",
        b"X\xff\xff\xff\xff",
        b"q\x00h\x00h\x00t",
        b"(((((((((",
        b".*{9999}",
    ]
    .iter()
    .map(|b| b.to_vec())
    .collect();
    prop_oneof![prop::sample::select(fixed), prop::collection::vec(any::<u8>(), 1..12)]
}

fn any_change() -> impl Strategy<Value = Change> {
    let at = || 0.0..1.0f64;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, bits)| Change::Flip(at, bits)),
        (at(), any_bytes()).prop_map(|(at, bytes)| Change::Write(at, bytes)),
        (at(), any_bytes()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), 0.0..0.2).prop_map(|(at, share)| Change::Remove(at, share)),
        (at(), 0.0..0.05, 1usize..20).prop_map(|(at, share, times)| Change::Repeat(at, share, times)),
        at().prop_map(Change::Truncate),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let len = bytes.len();
    let place = |share: f64| (share * len as f64) as usize;
    match change {
        _ if bytes.is_empty() => {}
        Change::Flip(at, bits) => bytes[place(*at)] ^= bits,
        Change::Write(at, new) => {
            let (at, count) = (place(*at), new.len().min(len - place(*at)));
            bytes[at..at + count].copy_from_slice(&new[..count]);
        }
        Change::Insert(at, new) => drop(bytes.splice(place(*at)..place(*at), new.iter().copied())),
        Change::Remove(at, share) => drop(bytes.drain(place(*at)..len.min(place(*at) + place(*share)))),
        Change::Repeat(at, share, times) => {
            let part = bytes[place(*at)..len.min(place(*at) + place(*share))].repeat(*times);
            bytes.splice(place(*at)..place(*at), part);
        }
        Change::Truncate(at) => bytes.truncate(place(*at)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_file_is_read_or_refused(
        entry_point in 0..entry_points::ALL.len(),
        changes in prop::collection::vec(any_change(), 1..6),
        // Most of an adapter file is numbers: what matters is at both ends.
        at_the_ends in any::<bool>(),
    ) {
        let (name, run) = entry_points::ALL[entry_point];
        let mut bytes = entry_points::valid(name);
        for change in &changes {
            if at_the_ends && bytes.len() > 2000 {
                let mut ends = [&bytes[..1000], &bytes[bytes.len() - 1000..]].concat();
                let middle = bytes[1000..bytes.len() - 1000].to_vec();
                apply(&mut ends, change);
                let split = ends.len() / 2;
                bytes = [&ends[..split], &middle, &ends[split..]].concat();
            } else {
                apply(&mut bytes, change);
            }
        }
        run(&bytes);
    }
}

#[test]
fn valid_files_are_read() {
    for (name, run) in entry_points::ALL {
        run(&entry_points::valid(name));
    }
}

#[test]
fn what_a_fuzzer_found_once_is_read_or_refused() {
    for (name, run) in entry_points::ALL {
        for (seed, bytes) in entry_points::seeds(name) {
            println!("{name} {seed}");
            run(&bytes);
        }
    }
}

/// Runs the program with one GiB of address space beyond what an idle one needs.
fn limited(args: &[&str]) -> (Output, Duration) {
    let script = format!("ulimit -v 3000000; exec {:?} --threads 1 \"$@\"", assert_cmd::cargo::cargo_bin("relora-kit"));
    let start = Instant::now();
    let output = Command::new("sh").args(["-c", &script, "sh"]).args(args).output().unwrap();
    (output, start.elapsed())
}

#[track_caller]
fn refused_at_once(path: &Path, command: &[&str], part: &str) {
    let args: Vec<&str> = command.iter().copied().chain([path.to_str().unwrap()]).collect();
    let (output, elapsed) = limited(&args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(part) && stderr.contains("error: "), "{stderr}");
    // Milliseconds; the rest is a busy machine.
    assert!(elapsed < Duration::from_secs(10), "{elapsed:?}");
}

#[test]
fn lengths_that_a_small_file_cannot_hold_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let inspect = &["inspect"][..];
    fs::write(&file, [&(100u64 << 30).to_le_bytes()[..], &[b' '; 1000]].concat()).unwrap();
    refused_at_once(&file, inspect, "claims 107374182400 bytes");
    let tensor =
        |shape: &str, end: &str| format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
    for (shape, end, part) in [
        ("[25000000000]", "100000000000", "promises 100000000000 data bytes"),
        ("[4294967296,4294967296]", "4", "more bytes than a file can hold"),
        ("[1]", "18446744073709551615", "its offsets span 18446744073709551615"),
    ] {
        write_raw(&file, &tensor(shape, end), &[0; 4]);
        refused_at_once(&file, inspect, part);
    }
    write_raw(&file, &"[".repeat(100_000), &[]);
    refused_at_once(&file, inspect, "not the expected JSON");
}

#[test]
fn any_number_of_empty_rows_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("model.safetensors"), dir.path().join("out"));
    let header = r#"{"w":{"dtype":"F32","shape":[4611686018427387,0],"data_offsets":[0,0]}}"#;
    write_raw(&file, header, &[]);
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    for args in [
        &["merge", "--base", file, "--dtype", "bf16", "-o", out][..],
        &["inspect", "--stats", file],
        &["diff", file, file],
    ] {
        let (output, elapsed) = limited(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(elapsed < Duration::from_secs(10), "{args:?}: {elapsed:?}");
    }
}

/// A folder with an adapter's configuration and anything called `adapter_model.bin`.
fn pickled(bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2}"#).unwrap();
    fs::write(dir.path().join("adapter_model.bin"), bytes).unwrap();
    dir
}

#[test]
fn patterns_that_compile_to_gigabytes_are_refused() {
    let dir = pickled(b"");
    let config =
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(((\\w{500}){500}){500}){500}": 4}}"#;
    fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    refused_at_once(dir.path(), &["spectrum", "--adapter"], "adapter_config.json");
}

#[test]
fn a_configuration_without_an_end_is_refused() {
    let dir = pickled(b"");
    let config = dir.path().join("adapter_config.json");
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
    refused_at_once(dir.path(), &["spectrum", "--adapter"], "is a device, expected a regular file");
}

/// A zip with stored entries.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let crc = data.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
        });
        let sizes = [!crc, data.len() as u32, data.len() as u32].map(u32::to_le_bytes).concat();
        let name_len = (name.len() as u16).to_le_bytes();
        let common = [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &sizes, &name_len, &[0, 0]].concat();
        let place = (file.len() as u32).to_le_bytes();
        directory.extend([b"PK\x01\x02\x14\x00", &common[..], &[0; 10], &place, name.as_bytes()].concat());
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), data].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let sizes = [(directory.len() as u32).to_le_bytes(), (file.len() as u32).to_le_bytes()].concat();
    [&file[..], &directory, b"PK\x05\x06\x00\x00\x00\x00", &count, &count, &sizes, &[0, 0]].concat()
}

#[test]
fn tensors_that_share_their_bytes_are_not_written_out_without_end() {
    // A thousand tensors over one storage of a megabyte.
    let count = 1u32 << 18;
    let mut pickle = b"\x80\x02}(".to_vec();
    for i in 0..1000u32 {
        let name = format!("base_model.model.m{i}.weight");
        pickle.extend([&b"X"[..], &(name.len() as u32).to_le_bytes(), name.as_bytes()].concat());
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n");
        pickle.extend(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ");
        pickle.extend([&count.to_le_bytes()[..], b"tQK\x00J", &count.to_le_bytes(), b"\x85K\x01\x85\x89NtR"].concat());
    }
    pickle.extend(b"u.");
    let storage = vec![0; 4 * count as usize];
    let bytes = zip(&[("archive/data.pkl", &pickle[..]), ("archive/data/0", &storage)]);
    refused_at_once(pickled(&bytes).path(), &["spectrum", "--adapter"], "share their bytes");
}

#[test]
fn pickles_made_to_do_damage_are_refused() {
    let number = |n: u32| n.to_le_bytes();
    // A tensor of one element with a shape of a million extents, and its storage; then the same shape again and again.
    let mut shapes = b"\x80\x02}(".to_vec();
    shapes.extend(b"(");
    shapes.extend(b"K\x01".repeat(1_000_000));
    shapes.extend(b"tq\x01");
    let storage: &[u8] =
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQq\x02";
    shapes.extend(storage);
    shapes.extend(b"ctorch._utils\n_rebuild_tensor_v2\nq\x030000");
    shapes.extend(b"}(");
    for i in 0..200_000u32 {
        shapes.extend(b"X\x04\x00\x00\x00");
        shapes.extend(number(0x3030_3030 + i % 10 + ((i / 10 % 10) << 8)));
        shapes.extend(b"h\x03(h\x02K\x00h\x01h\x01\x89NtR");
    }
    shapes.extend(b"u.");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a text of four gigabytes", [&b"\x80\x02X"[..], &number(u32::MAX), b"abc."].concat()),
        ("deep nesting", [&b"\x80\x02)"[..], &b"\x85".repeat(3_000_000), b"."].concat()),
        ("doubling", [&b"\x80\x02)"[..], &b"q\x00h\x00\x86".repeat(10_000), b"."].concat()),
        ("a tuple that is too short", b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n)Rs.".to_vec()),
        ("a number of 200 bytes", [&b"\x80\x02\x8a\xc8"[..], &[7; 200], b"."].concat()),
        ("a million marks", [&b"\x80\x02"[..], &b"(".repeat(1_000_000), b"."].concat()),
        ("an unknown class", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.".to_vec()),
        ("nothing", Vec::new()),
        ("a shape of a million extents", shapes),
        (
            "a dictionary inside itself",
            b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00sX\x01\x00\x00\x00wcos\nsystem\n)Rs.".to_vec(),
        ),
        ("a long name again and again", {
            let text = [&b"X"[..], &number(1_000_000), &b"n".repeat(1_000_000)].concat();
            [&b"\x80\x02"[..], &text, b"q\x00", &b"h\x00h\x00\x93".repeat(100_000), b"."].concat()
        }),
    ];
    for (what, pickle) in cases {
        println!("{what}");
        for bytes in [zip(&[("archive/data.pkl", &pickle[..])]), pickle] {
            refused_at_once(pickled(&bytes).path(), &["spectrum", "--adapter"], "adapter_model.bin");
        }
    }
}
