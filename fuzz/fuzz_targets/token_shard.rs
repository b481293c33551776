#![no_main]

#[path = "../../tests/common/entry_points.rs"]
#[allow(dead_code)]
mod entry_points;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entry_points::token_shard(bytes));
