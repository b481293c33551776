//! TCP control channel between every process and rank 0: small messages, heartbeats, and propagation of a peer's failure, which
//! reaches the other processes even while they wait inside a collective of another library.

use super::wire::{LARGEST, Message};
use crate::error::{Error, Result};
use std::{
    collections::VecDeque,
    io,
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The time between two heartbeats.
const PING: Duration = Duration::from_secs(2);
/// A peer that sends no heartbeat for this long counts as failed.
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// How long a process that fails waits for rank 0 to say so.
const TELLING: Duration = Duration::from_secs(3);

/// Why this process must end although nothing went wrong in it.
#[derive(Clone, Debug)]
pub struct Ending {
    /// What happened, and to whom.
    pub error: Error,
    /// Whether rank 0 has printed it.
    pub told: bool,
}

/// Called on a thread of its own when the job cannot go on. It should end the process: the others may wait where nothing
/// reaches them.
pub type OnEnding = Arc<dyn Fn(Ending) + Send + Sync>;

/// The open control channel of one process.
pub struct ControlChannel(Arc<Inner>);

struct Inner {
    rank: usize,
    hosts: Vec<String>,
    /// Of rank 0: all others, in their order. Of the others: rank 0.
    peers: Vec<Peer>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    /// From here on it is no loss if a line breaks.
    ending: AtomicBool,
    on_ending: OnEnding,
}

struct Peer {
    rank: usize,
    stream: Mutex<TcpStream>,
}

struct Inbox {
    /// By peer: the parts that came, of rank 0 all parts of each time.
    parts: Vec<VecDeque<Vec<Vec<u8>>>>,
    /// By peer: whether it said goodbye.
    done: Vec<bool>,
    /// Whether rank 0 has ended the job.
    ended: bool,
}

impl ControlChannel {
    /// Opens it, over connections to these ranks. After `silence` without a word, one counts as gone.
    pub(super) fn start(
        rank: usize,
        hosts: Vec<String>,
        streams: Vec<(usize, TcpStream)>,
        silence: Duration,
        on_ending: OnEnding,
    ) -> Result<ControlChannel> {
        let failed = |e: io::Error| Error::environment(format!("cannot keep a line between the ranks: {e}"));
        let (mut peers, mut readers) = (Vec::new(), Vec::new());
        for (rank, stream) in streams {
            let set = || {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(silence))?;
                stream.set_write_timeout(Some(silence))?;
                stream.try_clone()
            };
            readers.push(set().map_err(failed)?);
            peers.push(Peer { rank, stream: Mutex::new(stream) });
        }
        let inbox = Inbox {
            parts: peers.iter().map(|_| VecDeque::new()).collect(),
            done: vec![false; peers.len()],
            ended: false,
        };
        let line = Arc::new(Inner {
            rank,
            hosts,
            peers,
            inbox: Mutex::new(inbox),
            arrived: Condvar::new(),
            ending: AtomicBool::new(false),
            on_ending,
        });
        let spawn = |name: String, work: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name).spawn(work).map(|_| ()).map_err(failed)
        };
        for (i, reader) in readers.into_iter().enumerate() {
            let line = line.clone();
            spawn(format!("watch {i}"), Box::new(move || line.watch(i, reader, silence)))?;
        }
        let pinging = Arc::downgrade(&line);
        let ping = move || {
            loop {
                thread::sleep(PING.min(silence / 4));
                let Some(line) = pinging.upgrade().filter(|line| !line.ending.load(Ordering::SeqCst)) else { return };
                line.send_all(&Message::Ping);
            }
        };
        spawn("ping".into(), Box::new(ping))?;
        Ok(ControlChannel(line))
    }

    /// A process in words: `rank 2 (node1)`.
    pub fn name(&self, rank: usize) -> String {
        self.0.name(rank)
    }

    /// The machine of a process.
    pub fn host(&self, rank: usize) -> &str {
        self.0.hosts.get(rank).map_or("?", String::as_str)
    }

    /// Gives every process the bytes of each, in the order of the ranks.
    pub fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let line = &self.0;
        let lost = |peer: &Peer| gone(peer.rank, &line.hosts[peer.rank], "");
        if line.rank > 0 {
            let [leader] = &line.peers[..] else { return Err(Error::environment("there is no line to rank 0")) };
            leader.send(&Message::Part(own.to_vec())).map_err(|_| lost(leader))?;
            return line.next_parts(0).ok_or_else(|| lost(leader));
        }
        let all = self.receive_all(own)?;
        line.send_all(&Message::All(all.clone()));
        Ok(all)
    }

    /// Gives rank 0 the bytes of each process, in the order of the ranks, and the others nothing.
    pub fn collect(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let line = &self.0;
        if line.rank > 0 {
            self.gather(own)?;
            return Ok(Vec::new());
        }
        let all = self.receive_all(own)?;
        line.send_all(&Message::All(Vec::new()));
        Ok(all)
    }

    /// As rank 0: the bytes of each process.
    fn receive_all(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let line = &self.0;
        let mut all = vec![own.to_vec()];
        for (i, peer) in line.peers.iter().enumerate() {
            all.extend(line.next_parts(i).ok_or_else(|| gone(peer.rank, &line.hosts[peer.rank], ""))?);
        }
        Ok(all)
    }

    /// Tells the others that this process ends with `error`. Whether rank 0 has printed the sentence; otherwise the caller
    /// should.
    pub fn fail(&self, error: &Error) -> bool {
        let line = &self.0;
        if line.ending.swap(true, Ordering::SeqCst) {
            // Another thread ends the process.
            thread::sleep(TELLING);
            return true;
        }
        if line.rank == 0 {
            line.send_all(&Message::Ended(error.into()));
            // What is on its way would be lost with the connection.
            thread::sleep(Duration::from_millis(100));
            return false;
        }
        line.send_all(&Message::Failed(error.into()));
        let began = Instant::now();
        let mut inbox = line.inbox();
        while !inbox.ended && began.elapsed() < TELLING {
            let left = TELLING.saturating_sub(began.elapsed());
            inbox = line.arrived.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inbox.ended
    }

    /// Ends the line when all processes have come here: from now on they may go.
    pub fn finish(&self) -> Result<()> {
        self.gather(&[])?;
        self.0.ending.store(true, Ordering::SeqCst);
        self.0.send_all(&Message::Bye);
        Ok(())
    }
}

impl Drop for ControlChannel {
    fn drop(&mut self) {
        // Whoever drops it without a word has failed: the others see the line break.
        self.0.ending.store(true, Ordering::SeqCst);
        for peer in &self.0.peers {
            let _ = peer.lock().shutdown(Shutdown::Both);
        }
    }
}

impl Peer {
    fn lock(&self) -> MutexGuard<'_, TcpStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &Message) -> io::Result<()> {
        message.write(&mut *self.lock())
    }
}

impl Inner {
    fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.hosts.get(rank).map_or("?", String::as_str))
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever cannot be reached is noticed by its watch.
    fn send_all(&self, message: &Message) {
        self.peers.iter().for_each(|peer| drop(peer.send(message)));
    }

    /// What comes next from this peer; `None` if it went.
    fn next_parts(&self, peer: usize) -> Option<Vec<Vec<u8>>> {
        let mut inbox = self.inbox();
        loop {
            if let Some(parts) = inbox.parts[peer].pop_front() {
                return Some(parts);
            }
            if inbox.done[peer] {
                return None;
            }
            inbox = self.arrived.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes in what a peer sends, until it is done or lost.
    fn watch(&self, peer: usize, mut stream: TcpStream, silence: Duration) {
        let rank = self.peers[peer].rank;
        let lost = loop {
            match Message::read(&mut stream, LARGEST) {
                Ok(Message::Part(part)) => self.deliver(|inbox| inbox.parts[peer].push_back(vec![part])),
                Ok(Message::All(parts)) => self.deliver(|inbox| inbox.parts[peer].push_back(parts)),
                Ok(Message::Bye) => return self.deliver(|inbox| inbox.done[peer] = true),
                Ok(Message::Failed(sentence)) => {
                    let error = sentence.into_error();
                    let message = format!("{}: {}", self.name(rank), error.message);
                    break Ending { error: Error { message, ..error }, told: false };
                }
                Ok(Message::Ended(sentence)) => {
                    self.deliver(|inbox| inbox.ended = true);
                    break Ending { error: sentence.into_error(), told: true };
                }
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let error = gone(
                        rank,
                        &self.hosts[rank],
                        &format!(": nothing was heard of it for {} s", silence.as_secs()),
                    );
                    break Ending { error, told: false };
                }
                Err(_) => break Ending { error: gone(rank, &self.hosts[rank], ""), told: false },
            }
        };
        // Whoever waits for this peer wakes up to a job that is ending for this reason.
        let first = !self.ending.swap(true, Ordering::SeqCst);
        self.deliver(|inbox| inbox.done[peer] = true);
        if first {
            if self.rank == 0 {
                self.send_all(&Message::Ended((&lost.error).into()));
            }
            (self.on_ending)(lost);
        }
    }

    fn deliver(&self, change: impl FnOnce(&mut Inbox)) {
        change(&mut self.inbox());
        self.arrived.notify_all();
    }
}

/// The error that names a process which is no longer there.
pub(super) fn gone(rank: usize, host: &str, how: &str) -> Error {
    Error::environment(format!("rank {rank} ({host}) is gone{how}"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::collective::rendezvous::{
        self,
        tests::{LIMIT, ranks},
    };
    use std::sync::mpsc::{Receiver, channel};

    /// What a process of the tests hears when the job ends.
    pub fn endings() -> (OnEnding, Receiver<Ending>) {
        let (sender, receiver) = channel();
        let sender = Mutex::new(sender);
        (Arc::new(move |ending| drop(sender.lock().unwrap().send(ending))), receiver)
    }

    /// All ranks of a job, in one process.
    fn job(size: usize) -> Vec<(ControlChannel, Receiver<Ending>)> {
        let listener = rendezvous::listen("127.0.0.1", 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let members: Vec<_> = (1..size)
            .map(|rank| {
                thread::spawn(move || {
                    let (on_ending, endings) = endings();
                    (
                        rendezvous::join(&["127.0.0.1".into()], port, &ranks(rank, size), "j", LIMIT, on_ending)
                            .unwrap(),
                        endings,
                    )
                })
            })
            .collect();
        let (on_ending, endings) = endings();
        let mut all = vec![(rendezvous::lead(listener, &ranks(0, size), "j", LIMIT, on_ending).unwrap(), endings)];
        all.extend(members.into_iter().map(|m| m.join().unwrap()));
        all
    }

    fn heard(endings: &Receiver<Ending>) -> Ending {
        endings.recv_timeout(LIMIT).expect("the end of the job is noticed")
    }

    #[test]
    fn every_rank_gets_the_bytes_of_all_in_their_order() {
        let all = job(3);
        thread::scope(|scope| {
            let results: Vec<_> = all
                .iter()
                .enumerate()
                .map(|(rank, (line, _))| {
                    scope.spawn(move || {
                        let first = line.gather(&vec![rank as u8; rank]).unwrap();
                        let collected = line.collect(&[rank as u8; 2]).unwrap();
                        let expected = if rank == 0 { vec![[0, 0], [1, 1], [2, 2]] } else { Vec::new() };
                        assert_eq!(collected, expected);
                        let second = line.gather(&[9 - rank as u8]).unwrap();
                        line.finish().unwrap();
                        (first, second)
                    })
                })
                .collect();
            for result in results {
                let (first, second) = result.join().unwrap();
                assert_eq!(first, [vec![], vec![1], vec![2, 2]]);
                assert_eq!(second, [[9], [8], [7]]);
            }
        });
        assert!(all[2].0.name(1).starts_with("rank 1 ("));
        // After the end, nobody is missed.
        let endings: Vec<Receiver<Ending>> = all.into_iter().map(|(_, endings)| endings).collect();
        thread::sleep(Duration::from_millis(200));
        assert!(endings.iter().all(|e| e.try_recv().is_err()));
    }

    #[test]
    fn a_rank_whose_line_breaks_is_named_by_rank_0_and_ends_all() {
        let mut all = job(3);
        drop(all.remove(1));
        let ending = heard(&all[0].1);
        assert!(ending.error.message.starts_with("rank 1 (") && ending.error.message.ends_with(") is gone"));
        assert!(!ending.told && ending.error.exit_code() == 3);
        let ending = heard(&all[1].1);
        assert!(ending.told && ending.error.message.starts_with("rank 1 ("), "{ending:?}");
    }

    #[test]
    fn the_others_notice_when_rank_0_is_gone() {
        let mut all = job(3);
        drop(all.remove(0));
        for (_, endings) in &all {
            let ending = heard(endings);
            assert!(!ending.told && ending.error.message.starts_with("rank 0 ("), "{ending:?}");
        }
    }

    #[test]
    fn an_error_of_one_rank_is_told_once_with_its_exit_code() {
        let all = job(3);
        assert!(all[2].0.fail(&Error::request("'x' is no model").help("look")), "rank 0 has told it");
        let ending = heard(&all[0].1);
        assert!(ending.error.message.ends_with("): 'x' is no model") && ending.error.message.starts_with("rank 2 ("));
        assert_eq!((ending.told, ending.error.exit_code(), ending.error.help.as_deref()), (false, 2, Some("look")));
        assert!(heard(&all[1].1).told);
        let all = job(2);
        assert!(!all[0].0.fail(&Error::environment("full")), "rank 0 tells it itself");
        assert_eq!(heard(&all[1].1).error.message, "full");
    }

    #[test]
    fn a_rank_that_falls_silent_is_gone() {
        let listener = rendezvous::listen("127.0.0.1", 0).unwrap();
        let silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let (on_ending, endings) = endings();
        let hosts = vec!["a".into(), "b".into()];
        let _line = ControlChannel::start(0, hosts, vec![(1, stream)], Duration::from_millis(300), on_ending).unwrap();
        let message = heard(&endings).error.message;
        assert!(message.starts_with("rank 1 (b) is gone: nothing was heard of it"), "{message}");
        drop(silent);
    }
}
