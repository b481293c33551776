//! Numbers for people.

/// `1.5 GiB`, `12 B`.
pub fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}

/// Parses `5GB`, `512MiB`, `1000`. Decimal and binary units as Hugging Face reads them.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        "TIB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unknown unit '{unit}', expected B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n > 0.0 && n * factor < 1e18 => Ok((n * factor) as u64),
        _ => Err(format!("'{text}' is not a size, expected for example 5GB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_hugging_face_reads_them() {
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_bytes("1.5KiB"), Ok(1536));
        assert!(parse_bytes("-1").is_err() && parse_bytes("5 parsecs").is_err() && parse_bytes("").is_err());
    }
}
