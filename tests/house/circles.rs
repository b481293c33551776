//! No two files import each other, directly or by way of others.
//!
//! What a folder's `mod.rs` defines is the vocabulary of the folder: its files may use it, so an import of one's own `mod.rs`
//! does not count. A name that `mod.rs` re-exports counts as an import of the file that defines it.

use crate::sources::sources;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Circles that are still there. The list may only shrink: a circle that is gone must leave it.
const ALLOWED: &[&[&str]] = &[
    &["adapter/names", "adapter/types"],
    &["collective/job", "collective/mpi", "collective/mpi/gpus"],
    &["merge/apply", "merge/row_arithmetic"],
    &["merge/dtype_advice", "merge/result"],
    &["model/linear", "model/lora", "model/params", "model/product"],
];

/// A path as its segments: `merge::plan` is `["merge", "plan"]`.
type Segments = Vec<String>;

/// The files of the crate by their module paths, with the names that each re-exports.
struct Crate {
    code: BTreeMap<Segments, String>,
    exported: BTreeMap<Segments, BTreeMap<String, Segments>>,
}

#[test]
fn no_files_import_each_other() {
    let files = sources().into_iter().map(|(path, _, code)| (module_path(&path), code));
    let found = circles(files.collect());
    let allowed: BTreeSet<Vec<String>> = ALLOWED.iter().map(|c| c.iter().map(|f| (*f).to_owned()).collect()).collect();
    let new: Vec<_> = found.difference(&allowed).collect();
    let gone: Vec<_> = allowed.difference(&found).collect();
    assert!(new.is_empty(), "files import each other: {new:#?}");
    assert!(gone.is_empty(), "these circles are gone: remove them from ALLOWED in tests/house/circles.rs: {gone:#?}");
}

#[test]
fn a_circle_is_found_in_every_form() {
    let circles_of = |files: &[(&str, &str)]| {
        let files = files.iter().map(|(path, code)| (segments(path, '/'), (*code).to_owned())).collect();
        circles(files).into_iter().map(|circle| circle.join(" ")).collect::<Vec<_>>()
    };
    let b = ("room/b", "use super::a::A;");
    for a in [
        "use super::b::B;",
        "use crate::room::{c, b::{self, B}};",
        "use crate::{error, room::b as other};",
        "fn f() { super::b::g() }",
        "fn f() { crate::room::b::g() }",
        "use super::B;",
        "use super::{C, B as Other};",
    ] {
        let files = [("room", "mod a;\nmod b;\npub use b::{B, A};\n"), ("room/a", a), b, ("room/c", "")];
        assert_eq!(circles_of(&files), ["room/a room/b"], "{a}");
    }
    // By way of a third file; and the vocabulary of `mod.rs`, which does not count.
    assert_eq!(circles_of(&[("x", "use crate::y::Y;"), ("y", "use crate::z;"), ("z", "use super::x;")]), ["x y z"]);
    assert!(circles_of(&[("room", "mod a;\nuse a::A;\nstruct S;"), ("room/a", "use super::S;")]).is_empty());
    assert!(circles_of(&[("a", "use crate::b::B;"), ("b", "use std::a::A;")]).is_empty());
}

/// `src/merge/plan.rs` -> merge, plan; `src/merge/mod.rs` -> merge.
fn module_path(file: &Path) -> Segments {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let relative = file.strip_prefix(root).unwrap().with_extension("");
    let mut path = segments(relative.to_str().unwrap(), '/');
    path.pop_if(|last| last == "mod");
    path
}

fn segments(path: &str, separator: char) -> Segments {
    path.split(separator).map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect()
}

/// Sets of files that reach each other by imports, each sorted.
fn circles(mut code: BTreeMap<Segments, String>) -> BTreeSet<Vec<String>> {
    code.retain(|path, _| path != &["lib"] && path != &["main"]);
    let mut all = Crate { code, exported: BTreeMap::new() };
    let exported = all.code.iter().map(|(module, code)| {
        let paths = uses(code).into_iter().filter(|(public, _)| *public).flat_map(|(_, tree)| expand(&tree));
        let names = paths.filter_map(|path| all.absolute(module, &path)).filter(|p| !p.is_empty());
        (module.clone(), names.map(|path| (path.last().unwrap().clone(), path)).collect())
    });
    all.exported = exported.collect();
    let imports: BTreeMap<&Segments, BTreeSet<Segments>> =
        all.code.keys().map(|module| (module, all.imports(module))).collect();
    let reach = |from: &Segments| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(next) = open.pop() {
            open.extend(imports[&next].iter().filter(|&file| seen.insert(file.clone())).cloned());
        }
        seen
    };
    let reached: BTreeMap<&Segments, BTreeSet<Segments>> = all.code.keys().map(|m| (m, reach(m))).collect();
    let inside = all.code.keys().filter(|m| reached[m].contains(*m));
    inside.map(|m| reached[m].iter().filter(|n| reached[n].contains(m)).map(|n| n.join("/")).collect()).collect()
}

impl Crate {
    /// The files that a file imports, without itself and the `mod.rs` of the folders around it.
    fn imports(&self, module: &Segments) -> BTreeSet<Segments> {
        let code = &self.code[module];
        let private = uses(code).into_iter().filter(|(public, _)| !public);
        let mut paths: Vec<Segments> = private.flat_map(|(_, tree)| expand(&tree)).collect();
        paths.extend(inline_paths(code));
        let absolute = paths.iter().filter_map(|path| self.absolute(module, path));
        absolute.filter_map(|path| self.file_of(&path, 0)).filter(|file| !module.starts_with(file)).collect()
    }

    /// A path from the crate's root; `None` for other crates and for names that are in scope already.
    fn absolute(&self, module: &Segments, path: &[String]) -> Option<Segments> {
        let mut base = module.clone();
        match path.first()?.as_str() {
            "crate" => Some(path[1..].to_vec()),
            "self" => Some([&base, &path[1..]].concat()),
            "super" => {
                let up = path.iter().take_while(|s| *s == "super").count();
                base.truncate(base.len().checked_sub(up)?);
                Some([&base, &path[up..]].concat())
            }
            child => {
                base.push(child.to_owned());
                self.code.contains_key(&base).then(|| [module, path].concat())
            }
        }
    }

    /// The file that defines what an absolute path names.
    fn file_of(&self, path: &[String], depth: usize) -> Option<Segments> {
        let length = (1..=path.len()).rev().find(|&n| self.code.contains_key(&path[..n]))?;
        let (module, rest) = path.split_at(length);
        let exported = rest.first().and_then(|name| self.exported[module].get(name));
        match exported.filter(|target| depth < 8 && target[..] != path[..=length]) {
            Some(target) => self.file_of(&[target, &rest[1..]].concat(), depth + 1),
            None => Some(module.to_vec()),
        }
    }
}

/// The `use` declarations: whether one is public, and its tree.
fn uses(code: &str) -> Vec<(bool, String)> {
    let starts = code.match_indices("use ").filter(|(at, _)| {
        let before = code[..*at].chars().next_back();
        before.is_none_or(|c| c.is_whitespace())
    });
    let declarations = starts.filter_map(|(at, word)| {
        let line = code[..at].rsplit(['\n', ';', '}']).next().unwrap_or("").trim();
        let end = code[at..].find(';')?;
        Some((line.starts_with("pub"), code[at + word.len()..at + end].to_owned()))
    });
    declarations.collect()
}

/// `a::{b, c::{self, D as E}}` -> a::b, a::c::self, a::c::D
fn expand(tree: &str) -> Vec<Segments> {
    let tree = tree.trim();
    let Some((prefix, list)) = tree.split_once('{') else {
        let path = tree.split_once(" as ").map_or(tree, |(path, _)| path);
        let mut path: Segments = path.split("::").map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect();
        path.pop_if(|last| last == "self" || last == "*");
        return vec![path];
    };
    let prefix: Segments = prefix.split("::").map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect();
    let list = list.rsplit_once('}').map_or(list, |(list, _)| list);
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    let parts = parts.into_iter().filter(|part| !part.trim().is_empty()).flat_map(expand);
    parts.map(|part| [&prefix[..], &part].concat()).collect()
}

/// Paths outside `use` declarations that begin with `crate`, `super`, or a name that such a declaration brings into scope.
fn inline_paths(code: &str) -> Vec<Segments> {
    let scope: BTreeMap<String, Segments> = (uses(code).into_iter().flat_map(|(_, tree)| expand(&tree)))
        .filter_map(|path| Some((path.last()?.clone(), path)))
        .collect();
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let words = code.split(|c: char| !is_name(c) && c != ':').filter(|word| word.contains("::"));
    let paths = words.map(|word| segments(&word.replace("::", "\0"), '\0')).filter(|path| !path.is_empty());
    paths
        .map(|path| match scope.get(&path[0]) {
            Some(full) => [&full[..], &path[1..]].concat(),
            None => path,
        })
        .collect()
}
