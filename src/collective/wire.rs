//! The messages of the line to rank 0: a kind, a length, bytes.

use crate::error::{Error, Kind};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};

/// What a process says when it comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// The program and its version.
    pub tool: String,
    /// What distinguishes this job from others that might use the same port.
    pub job: String,
    pub rank: usize,
    pub world_size: usize,
    pub host: String,
}

/// An error on its way to another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sentence {
    pub message: String,
    pub help: Option<String>,
    pub exit_code: u8,
}

impl From<&Error> for Sentence {
    fn from(e: &Error) -> Self {
        Sentence { message: e.message.clone(), help: e.help.clone(), exit_code: e.exit_code() }
    }
}

impl Sentence {
    pub fn into_error(self) -> Error {
        let kind = if self.exit_code == 2 { Kind::Request } else { Kind::Environment };
        Error { kind, message: self.message, help: self.help }
    }
}

/// What the processes tell each other.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// I am alive.
    Ping,
    /// First, to rank 0.
    Hello(Hello),
    /// From rank 0 when all are there: the host of each.
    Welcome(Vec<String>),
    /// To rank 0: this process's part of what is gathered.
    Part(Vec<u8>),
    /// From rank 0: all parts.
    All(Vec<Vec<u8>>),
    /// This process ends with an error.
    Failed(Sentence),
    /// From rank 0: the job ends, and the sentence was printed.
    Ended(Sentence),
    /// This process is done.
    Bye,
}

/// Bytes of a message at most.
pub(super) const LARGEST: u64 = 1 << 32;

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Ping => 0,
            Message::Hello(_) => 1,
            Message::Welcome(_) => 2,
            Message::Part(_) => 3,
            Message::All(_) => 4,
            Message::Failed(_) => 5,
            Message::Ended(_) => 6,
            Message::Bye => 7,
        }
    }

    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let payload = match self {
            Message::Ping | Message::Bye => Vec::new(),
            Message::Hello(hello) => serde_json::to_vec(hello)?,
            Message::Welcome(hosts) => serde_json::to_vec(hosts)?,
            Message::Part(part) => part.clone(),
            Message::All(parts) => {
                let sized = |part: &Vec<u8>| [&(part.len() as u64).to_le_bytes(), &part[..]].concat();
                parts.iter().flat_map(sized).collect()
            }
            Message::Failed(sentence) | Message::Ended(sentence) => serde_json::to_vec(sentence)?,
        };
        let mut bytes = Vec::with_capacity(9 + payload.len());
        bytes.push(self.kind());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// The next message, of no more than `largest` bytes.
    pub fn read(from: &mut impl Read, largest: u64) -> io::Result<Message> {
        let mut head = [0; 9];
        from.read_exact(&mut head)?;
        let len = u64::from_le_bytes(head[1..].try_into().unwrap_or_default());
        if len > largest {
            return Err(invalid());
        }
        let mut payload = Vec::new();
        // Not allocated before it is there: the length may be anybody's.
        from.take(len).read_to_end(&mut payload)?;
        if (payload.len() as u64) < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(match head[0] {
            0 => Message::Ping,
            1 => Message::Hello(json(&payload)?),
            2 => Message::Welcome(json(&payload)?),
            3 => Message::Part(payload),
            4 => Message::All(parts(&payload).ok_or_else(invalid)?),
            5 => Message::Failed(json(&payload)?),
            6 => Message::Ended(json(&payload)?),
            7 => Message::Bye,
            _ => return Err(invalid()),
        })
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a message of relora-kit")
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|_| invalid())
}

fn parts(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        let (len, rest) = bytes.split_first_chunk::<8>()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        parts.push(part.to_vec());
        bytes = rest;
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let hello = Hello { tool: "t".into(), job: "j".into(), rank: 1, world_size: 2, host: "h".into() };
        let sentence = Sentence::from(&Error::request("no").help("yes"));
        let messages = [
            Message::Ping,
            Message::Hello(hello),
            Message::Welcome(vec!["a".into(), "b".into()]),
            Message::Part(vec![1, 2, 3]),
            Message::All(vec![vec![], vec![7; 300], vec![1]]),
            Message::Failed(sentence.clone()),
            Message::Ended(sentence.clone()),
            Message::Bye,
        ];
        let mut bytes = Vec::new();
        messages.iter().for_each(|m| m.write(&mut bytes).unwrap());
        let mut from = &bytes[..];
        for message in &messages {
            assert_eq!(Message::read(&mut from, LARGEST).unwrap(), *message);
        }
        assert!(from.is_empty());
        let back = sentence.into_error();
        assert_eq!((back.message.as_str(), back.help.as_deref(), back.exit_code()), ("no", Some("yes"), 2));
    }

    #[test]
    fn what_is_no_message_is_refused_without_taking_memory_for_it() {
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[9, 0, 0, 0, 0, 0, 0, 0, 0], &[4, 1, 0, 0, 0, 0, 0, 0, 0, 5]] {
            assert_eq!(Message::read(&mut &bytes[..], 1 << 20).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let torn = [3, 255, 255, 255, 255, 0, 0, 0, 0, 1];
        assert_eq!(Message::read(&mut &torn[..], LARGEST).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
