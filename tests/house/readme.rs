//! README and docs say what is true: their commands run, every configuration key is explained, every link leads somewhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Pages for users: README, docs/*.md, fixtures/README.md.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|e| e.unwrap().path());
    let mut pages: Vec<_> = docs.filter(|p| p.extension().is_some_and(|e| e == "md")).collect();
    pages.extend(["README.md", "CHANGELOG.md", "fixtures/README.md"].map(|p| root().join(p)));
    pages.sort();
    pages
}

/// A folder in which README's commands work: examples, fixtures and a text, and the program in PATH.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Desk {
        let dir = tempfile::tempdir().unwrap();
        for name in ["examples", "fixtures", "LICENSE", "README.md"] {
            std::os::unix::fs::symlink(root().join(name), dir.path().join(name)).unwrap();
        }
        Desk(dir)
    }

    /// Runs a line as a shell would; returns stdout.
    #[track_caller]
    fn run(&self, line: &str) -> String {
        let program = assert_cmd::cargo::cargo_bin("relora-kit");
        let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let output =
            Command::new("sh").args(["-c", line]).current_dir(self.0.path()).env("PATH", path).output().unwrap();
        assert!(output.status.success(), "$ {line}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// `| [name](page) | what | \`relora-kit name ...\` |`: the rows of README's table of commands.
fn table_of_commands() -> Vec<(String, String)> {
    let readme = read("README.md");
    let rows = readme.lines().filter(|l| l.starts_with("| [`"));
    let rows: Vec<_> = rows
        .map(|row| {
            let name = row.split('`').nth(1).unwrap().to_owned();
            let example = row.rsplit("| `").next().unwrap().trim_end_matches(['|', ' ', '`']).replace("\\|", "|");
            (name, example)
        })
        .collect();
    assert!(rows.len() > 3, "README's table of commands has changed its form");
    rows
}

#[test]
fn the_table_has_a_row_for_every_command_and_each_example_runs() {
    let desk = Desk::new();
    let help = desk.run("relora-kit --help");
    let commands: BTreeSet<&str> = help
        .split("Commands:\n")
        .nth(1)
        .unwrap()
        .lines()
        .take_while(|l| !l.is_empty())
        .filter(|l| l.starts_with("  ") && !l.starts_with("   "))
        .filter_map(|l| l.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    let table = table_of_commands();
    let named: BTreeSet<&str> = table.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(named, commands);
    for (name, example) in &table {
        assert!(example.starts_with(&format!("relora-kit {name} ")), "{name}: {example}");
        desk.run(example);
    }
}

#[test]
fn the_output_shown_for_the_fixtures_is_the_programs() {
    let readme = read("README.md");
    let desk = Desk::new();
    let mut shown = 0;
    for block in readme.split("```console\n").skip(1).map(|b| b.split("```").next().unwrap()) {
        let (command, expected) = block.split_once('\n').unwrap();
        let Some(command) = command.strip_prefix("$ ").filter(|c| c.contains("fixtures/")) else { continue };
        let trimmed = |text: &str| text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim().to_owned();
        assert_eq!(trimmed(&desk.run(command)), trimmed(expected), "$ {command}");
        shown += 1;
    }
    assert!(shown > 0, "README shows no command on fixtures/");
}

#[test]
fn every_configuration_key_is_explained() {
    let page = read("docs/train.md");
    let source = read("src/train/config/mod.rs");
    let source = source.split("fn yes()").next().unwrap();
    let keys = source.lines().filter_map(|l| l.strip_prefix("    pub ")?.split(':').next()).filter(|key| {
        // The sections themselves stand in the headings.
        let section = ["model", "data", "train", "warm_start", "relora"].contains(key);
        !section || page.contains(&format!("`[{key}]`"))
    });
    let mut count = 0;
    for key in keys {
        assert!(page.contains(&format!("`{key}`")) || page.contains(&format!("`[{key}]`")), "docs/train.md: {key}");
        count += 1;
    }
    assert!(count > 30, "found only {count} keys in src/train/config/mod.rs");
}

#[test]
fn every_preset_is_named() {
    let page = read("docs/train.md");
    for name in relora_kit::model::LlamaConfig::preset_names() {
        assert!(page.contains(&format!("`{name}`")), "docs/train.md: {name}");
    }
}

#[test]
fn links_lead_to_files() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap();
            if !target.contains("://") && !file.is_empty() {
                assert!(page.parent().unwrap().join(file).exists(), "{}: {target}", page.display());
            }
        }
    }
}

#[test]
fn every_command_has_a_page_that_is_linked() {
    let readme = read("README.md");
    for (name, _) in table_of_commands().iter().filter(|(name, _)| name != "completions") {
        assert!(readme.contains(&format!("[`{name}`](docs/{name}.md)")), "README does not link docs/{name}.md");
    }
}
