//! Where the pickle and the storages lie in a file: a zip, or the layout before PyTorch 1.6.

use super::machine::{Machine, StorageRef, TensorRef, Value};
use std::{
    collections::HashMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

/// The first pickle of the old layout: a number that means "this is PyTorch's".
const OLD_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// A state dict, its storages, and for each storage where its bytes lie: first and how many.
pub(super) struct Found {
    pub tensors: Vec<(String, TensorRef)>,
    /// What stood beside the state dict.
    pub beside: Vec<String>,
    pub storages: Vec<StorageRef>,
    pub places: Vec<(u64, u64)>,
}

type Outcome<T> = Result<T, String>;

pub(super) fn read(file: &File, path: &Path) -> Outcome<Found> {
    let io = |e: std::io::Error| format!("{e}");
    let meta = file.metadata().map_err(io)?;
    if meta.is_dir() {
        return Err(format!("'{}' is a folder", path.display()));
    }
    let mut start = Vec::new();
    let mut file = file;
    file.take(2).read_to_end(&mut start).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    match &start[..] {
        b"PK" => zipped(file),
        [0x80, _] => old(file, meta.len()),
        _ => Err("it is neither a zip nor a pickle".into()),
    }
}

fn zipped(file: &File) -> Outcome<Found> {
    let io = |e: std::io::Error| format!("{e}");
    let mut archive = zip::ZipArchive::new(BufReader::new(file)).map_err(|e| e.to_string())?;
    let mut entries = HashMap::new();
    let mut pickle = None;
    for i in 0..archive.len() {
        let mut entry = archive.by_index_raw(i).map_err(|e| e.to_string())?;
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        let (Some(start), size) = (entry.data_start(), entry.size()) else {
            return Err(format!("its entry '{name}' has no data"));
        };
        if entry.compression() != zip::CompressionMethod::Stored || entry.compressed_size() != size {
            return Err(format!("its entry '{name}' is compressed, which torch.save never does"));
        }
        if name.ends_with("/byteorder") && size == 3 {
            let mut order = Vec::new();
            entry.read_to_end(&mut order).map_err(io)?;
            if order == b"big" {
                return Err("it is big endian, expected little endian".into());
            }
        }
        if let Some(folder) = name.strip_suffix("data.pkl") {
            pickle = Some((folder.to_owned(), start, size));
        }
        entries.insert(name, (start, size));
    }
    let (folder, start, size) = pickle.ok_or("its zip holds no 'data.pkl'")?;
    let mut reader = BufReader::new(file);
    reader.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut machine = Machine::new(reader, size);
    let state = machine.run()?;
    let (tensors, beside) = machine.state_dict(state)?;
    let storages = machine.into_storages();
    let place = |s: &StorageRef| {
        let name = format!("{folder}data/{}", s.key);
        entries.get(&name).copied().ok_or_else(|| format!("its zip holds no '{name}'"))
    };
    Ok(Found { tensors, beside, places: storages.iter().map(place).collect::<Outcome<_>>()?, storages })
}

/// Pickles: magic, protocol, facts about the writer, the state dict, the storages' keys in the order of their bytes; then
/// per storage its number of elements (i64) and its bytes.
fn old(file: &File, len: u64) -> Outcome<Found> {
    let io = |e: std::io::Error| format!("{e}");
    let mut machine = Machine::new(BufReader::new(file), len);
    let magic = machine.run()?;
    if !machine.is_number(magic, &OLD_MAGIC) {
        return Err("it is a pickle, but not one that torch.save wrote".into());
    }
    machine.run()?;
    let facts = machine.run()?;
    if let Some(Value::Bool(false)) = machine.item(facts, "little_endian") {
        return Err("it is big endian, expected little endian".into());
    }
    let state = machine.run()?;
    let (tensors, beside) = machine.state_dict(state)?;
    let keys = machine.run()?;
    let keys = machine.texts(keys).ok_or("the list of its storages is missing")?;
    let mut at = machine.at();
    let storages = machine.into_storages();
    let mut places = vec![None; storages.len()];
    let by_key: HashMap<&str, usize> = storages.iter().enumerate().map(|(i, s)| (s.key.as_str(), i)).collect();
    for key in keys {
        // A file that is cut short ends here.
        let mut count = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(file, &mut count, at).map_err(io)?;
        let count = u64::from_le_bytes(count);
        at += 8;
        let i = *by_key.get(key.as_str()).ok_or_else(|| format!("its storage '{key}' belongs to no tensor"))?;
        let size = super::storage_dtype(&storages[i].class)
            .ok_or_else(|| format!("it holds a {}, which is not supported", storages[i].class))?
            .1;
        let bytes = count.checked_mul(size).filter(|&bytes| bytes <= len - at);
        let bytes = bytes.ok_or_else(|| format!("it is cut short: storage '{key}' claims {count} elements"))?;
        places[i] = Some((at, bytes));
        at += bytes;
    }
    let place = |(i, place): (usize, Option<(u64, u64)>)| {
        place.ok_or_else(|| format!("the bytes of storage '{}' are missing", storages[i].key))
    };
    let places = places.into_iter().enumerate().map(place).collect::<Outcome<_>>()?;
    Ok(Found { tensors, beside, storages, places })
}
