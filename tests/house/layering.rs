//! Modules import downwards only: bytes on disk, deltas, then the commands, then reports, then the command line.

use crate::sources::sources;
use std::{collections::BTreeSet, path::Path};

/// What every module may use.
const FOUNDATION: &[&str] =
    &["error", "escape", "guard", "inputs", "interrupt", "job_array", "progress", "staged", "threads", "work_queue"];

/// Module -> what it may import besides itself and the foundation. `api` and `cli` may import everything.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("checkpoint", &[]),
    ("pickle", &["checkpoint"]),
    ("adapter", &["checkpoint", "delta", "pickle"]),
    ("delta", &["checkpoint"]),
    ("run", &["checkpoint"]),
    ("convert", &["checkpoint", "merge", "pickle"]),
    ("diff", &["adapter", "checkpoint", "delta"]),
    ("extract", &["adapter", "architecture", "checkpoint", "delta"]),
    ("inspect", &["adapter", "checkpoint", "delta"]),
    ("architecture", &[]),
    ("merge", &["adapter", "architecture", "checkpoint", "collective", "delta", "ops"]),
    ("spectrum", &["adapter", "checkpoint", "collective", "delta", "ops", "run"]),
    ("verify", &["adapter", "checkpoint", "delta", "ops", "run", "spectrum"]),
    ("ops", &[]),
    ("collective", &["ops"]),
    ("model", &["ops", "adapter", "checkpoint"]),
    ("generate", &["model", "ops", "tokenize"]),
    ("tokenize", &["checkpoint", "run", "train"]),
    ("train", &["collective", "model", "ops", "adapter", "checkpoint", "run"]),
    (
        "report",
        &[
            "convert",
            "diff",
            "extract",
            "inspect",
            "merge",
            "ops",
            "spectrum",
            "verify",
            "tokenize",
            "train",
            "adapter",
            "checkpoint",
        ],
    ),
];

/// A crate that only some modules may name.
const HOMES: &[(&str, &[&str])] = &[
    ("clap", &["cli", "report"]),
    ("memmap2", &["checkpoint"]),
    ("indicatif", &["merge", "progress", "report", "tokenize", "train"]),
    ("comfy_table", &["report"]),
    ("candle_core", &["convert"]),
    ("zip", &["pickle"]),
    ("tokenizers", &["tokenize"]),
    ("parquet", &["tokenize"]),
    ("arrow_ipc", &["tokenize"]),
    ("arrow_array", &["tokenize"]),
    ("arrow_schema", &["tokenize"]),
    ("flate2", &["tokenize"]),
    ("zstd", &["tokenize"]),
    ("cudarc", &["ops"]),
    ("libloading", &["ops"]),
    ("mpi", &["collective"]),
];

#[test]
fn modules_import_downwards_only() {
    let (mut wrong, files) = (Vec::new(), sources());
    let modules: BTreeSet<String> = files.iter().map(|(_, module, _)| module.clone()).collect();
    for (file, module, code) in files {
        if ["api", "main", "lib", "cli"].contains(&module.as_str()) {
            continue;
        }
        let listed = MAY_IMPORT.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed);
        let Some(allowed) = listed.or(FOUNDATION.contains(&module.as_str()).then_some(&[])) else {
            panic!(
                "{}: module '{module}' has no line in tests/house/layering.rs: say what it may import",
                file.display()
            );
        };
        for used in imports(&code, is_top_of_module(&file)).intersection(&modules) {
            if *used != module && !FOUNDATION.contains(&used.as_str()) && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{}: '{module}' imports '{used}'", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn some_crates_have_one_home() {
    let mut wrong = Vec::new();
    for (file, module, code) in sources() {
        for (krate, homes) in HOMES {
            if code.contains(&format!("{krate}::")) && !homes.contains(&module.as_str()) {
                wrong.push(format!("{}: '{krate}' belongs to {homes:?}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_below_the_command_line_prints_or_exits() {
    let mut wrong = Vec::new();
    for (file, module, code) in sources() {
        // Progress is the way to stderr, report::print the way to stdout, and a second Ctrl-C must end the process.
        let excused: &[&str] = match module.as_str() {
            "cli" | "main" => continue,
            "progress" => &["eprintln!"],
            "report" => &["print!"],
            "interrupt" => &["process::exit"],
            _ => &[],
        };
        for call in ["println!", "eprintln!", "print!", "eprint!", "dbg!", "process::exit"] {
            if !excused.iter().any(|e| e.ends_with(call)) && code.contains(call) {
                wrong.push(format!("{}: {call}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_are_found_in_every_form() {
    let code =
        "use crate::{error::Result, ops, model::{Model, config}};\nuse super::run;\nfn f() { crate::merge::run() }\n";
    let found = |top| imports(code, top).into_iter().collect::<Vec<_>>();
    assert_eq!(found(false), ["error", "merge", "model", "ops"]);
    assert_eq!(found(true), ["error", "merge", "model", "ops", "run"]);
}

/// Whether `super` of this file is the crate.
fn is_top_of_module(file: &Path) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let relative = file.strip_prefix(root).unwrap();
    relative.components().count() == 1 || (relative.ends_with("mod.rs") && relative.components().count() == 2)
}

/// Names that follow `crate::`, one by one or as a list in braces.
fn imports(code: &str, super_is_crate: bool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let roots: &[&str] = if super_is_crate { &["crate::", "super::"] } else { &["crate::"] };
    for root in roots {
        for (at, _) in code.match_indices(root) {
            let rest = &code[at + root.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                found.extend(first_names(list));
            } else {
                found.insert(name(rest));
            }
        }
    }
    found.remove("");
    found
}

/// `a::{b, c}, d::e}...` -> a, d
fn first_names(list: &str) -> Vec<String> {
    let (mut depth, mut start, mut names) = (0, 0, Vec::new());
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(name(list[start..i].trim_start()));
                start = i + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

fn name(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}
