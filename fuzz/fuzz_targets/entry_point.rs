//! All fuzz targets in one program: `RELORA_KIT_FUZZ` names the entry point. Linked once instead of a dozen times.
#![no_main]

#[path = "../../tests/common/entry_points.rs"]
#[allow(dead_code)]
mod entry_points;

use std::sync::OnceLock;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static CHOSEN: OnceLock<fn(&[u8])> = OnceLock::new();
    let run = CHOSEN.get_or_init(|| {
        let name = std::env::var("RELORA_KIT_FUZZ").expect("RELORA_KIT_FUZZ names an entry point");
        let found = entry_points::ALL.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("no entry point '{name}'")).1
    });
    run(bytes);
});
