//! A line of TCP from every process to rank 0: they find each other within a time limit, exchange small messages, and
//! notice when one of them is gone, also while they wait in a collective of another library.

use super::{
    Ranks,
    wire::{Hello, LARGEST, Message, Sentence},
};
use crate::error::{Error, Result};
use std::{
    collections::VecDeque,
    io,
    net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Seconds that the processes wait for each other at the start.
pub const JOIN_VARIABLE: &str = "RELORA_KIT_JOIN_SECONDS";
const JOIN_SECONDS: u64 = 120;

/// The time between two signs of life.
const PING: Duration = Duration::from_secs(2);
/// After so long without any, a process counts as gone.
const SILENCE: Duration = Duration::from_secs(30);
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

/// The time limit of joining: [`JOIN_VARIABLE`], or two minutes.
pub fn join_limit() -> Result<Duration> {
    let Ok(text) = std::env::var(JOIN_VARIABLE) else { return Ok(Duration::from_secs(JOIN_SECONDS)) };
    match text.parse::<u64>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err(Error::request(format!("{JOIN_VARIABLE} is '{text}', expected a number of seconds"))),
    }
}

/// The name of this machine.
pub(super) fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the call writes at most so many bytes of `name`, the last of which stays 0.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } != 0;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    if failed || name.is_empty() { "a host without a name".into() } else { String::from_utf8_lossy(name).into_owned() }
}

/// The addresses of this machine that another may reach it under.
#[cfg(feature = "mpi")]
pub(super) fn addresses() -> Vec<std::net::IpAddr> {
    let mut found = Vec::new();
    let mut list = std::ptr::null_mut();
    // SAFETY: the call makes a list and its end is null; every entry stays until the list is freed, and an address says by
    // its family what it is.
    unsafe {
        if libc::getifaddrs(&mut list) != 0 {
            return found;
        }
        let mut entry = list;
        while let Some(interface) = entry.as_ref() {
            if let Some(address) = interface.ifa_addr.as_ref() {
                match i32::from(address.sa_family) {
                    libc::AF_INET => {
                        let address = &*interface.ifa_addr.cast::<libc::sockaddr_in>();
                        found.push(std::net::IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()));
                    }
                    libc::AF_INET6 => {
                        let address = &*interface.ifa_addr.cast::<libc::sockaddr_in6>();
                        found.push(std::net::IpAddr::from(address.sin6_addr.s6_addr));
                    }
                    _ => {}
                }
            }
            entry = interface.ifa_next;
        }
        libc::freeifaddrs(list);
    }
    // One that holds on this link only says nothing without the link.
    let local = |address: &std::net::IpAddr| matches!(address, std::net::IpAddr::V6(a) if a.is_unicast_link_local());
    found.retain(|address| !address.is_loopback() && !local(address));
    found
}

/// The open line.
pub struct Rendezvous(Arc<Line>);

struct Line {
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

impl Rendezvous {
    /// Meets the other processes at `MASTER_ADDR`, within `limit`. `on_ending` is called when one is lost later.
    pub fn meet(ranks: &Ranks, limit: Duration, on_ending: OnEnding) -> Result<Rendezvous> {
        let master = ranks.master.as_ref().ok_or_else(|| {
            Error::request(format!("{} processes were started, but MASTER_ADDR is not set", ranks.world_size))
                .help("under Slurm: export MASTER_ADDR=$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1)")
        })?;
        // Other jobs may use the same port.
        let job = ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"].into_iter().find_map(|name| std::env::var(name).ok());
        let job = job.unwrap_or_default();
        if ranks.is_leader() {
            let local = ["localhost", "127.0.0.1", "::1"].contains(&master.host.as_str());
            let listener = listen(if local { &master.host } else { "::" }, master.port)?;
            Rendezvous::lead(listener, ranks, &job, limit, on_ending)
        } else {
            Rendezvous::join(std::slice::from_ref(&master.host), master.port, ranks, &job, limit, on_ending)
        }
    }

    /// As rank 0: waits for the others to come.
    pub fn lead(
        listener: TcpListener,
        ranks: &Ranks,
        job: &str,
        limit: Duration,
        on_ending: OnEnding,
    ) -> Result<Rendezvous> {
        let own = hello(ranks, job);
        let mut found: Vec<Option<(TcpStream, String)>> = (1..ranks.world_size).map(|_| None).collect();
        match accept_all(&listener, &own, limit, &mut found) {
            Ok(()) => {}
            Err(e) => {
                found.iter_mut().flatten().for_each(|(s, _)| drop(Message::Ended(Sentence::from(&e)).write(s)));
                return Err(e);
            }
        }
        let mut hosts = vec![own.host];
        hosts.extend(found.iter().flatten().map(|(_, host)| host.clone()));
        let mut streams = Vec::new();
        for (i, (mut stream, host)) in found.into_iter().flatten().enumerate() {
            let welcome = Message::Welcome(hosts.clone());
            welcome.write(&mut stream).map_err(|e| gone(i + 1, &host, &format!(": {e}")))?;
            streams.push((i + 1, stream));
        }
        Rendezvous::start(0, hosts, streams, SILENCE, on_ending)
    }

    /// As another rank: finds rank 0 under one of its names.
    pub fn join(
        hosts: &[String],
        port: u16,
        ranks: &Ranks,
        job: &str,
        limit: Duration,
        on_ending: OnEnding,
    ) -> Result<Rendezvous> {
        let began = Instant::now();
        let unreachable = |e: String| {
            Error::world(format!(
                "rank {} cannot reach rank 0 at {}:{port} within {} s: {e}",
                ranks.rank,
                hosts.join(" or "),
                limit.as_secs()
            ))
            .help(
                "check that rank 0 runs, MASTER_ADDR and MASTER_PORT, and that no firewall stands between the machines",
            )
        };
        let mut stream = loop {
            match connect(hosts, port, limit.saturating_sub(began.elapsed())) {
                Ok(stream) => break stream,
                Err(e) if began.elapsed() >= limit => return Err(unreachable(e.to_string())),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        };
        // The others may come later than this one.
        let _ =
            stream.set_read_timeout(Some(limit.saturating_sub(began.elapsed()).max(Duration::from_millis(10)) + PING));
        let answer = Message::Hello(hello(ranks, job)).write(&mut stream);
        match answer.and_then(|()| Message::read(&mut stream, LARGEST)) {
            Ok(Message::Welcome(hosts)) if hosts.len() == ranks.world_size => {
                Rendezvous::start(ranks.rank, hosts, vec![(0, stream)], SILENCE, on_ending)
            }
            Ok(Message::Ended(sentence)) => Err(sentence.into_error()),
            Ok(_) => Err(unreachable("another program answers there".into())),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(unreachable("it does not answer".into()))
            }
            Err(e) => Err(unreachable(e.to_string())),
        }
    }

    fn start(
        rank: usize,
        hosts: Vec<String>,
        streams: Vec<(usize, TcpStream)>,
        silence: Duration,
        on_ending: OnEnding,
    ) -> Result<Rendezvous> {
        let failed = |e: io::Error| Error::world(format!("cannot keep a line between the ranks: {e}"));
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
        let line = Arc::new(Line {
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
        Ok(Rendezvous(line))
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
            let [leader] = &line.peers[..] else { return Err(Error::world("there is no line to rank 0")) };
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

impl Drop for Rendezvous {
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

impl Line {
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

fn hello(ranks: &Ranks, job: &str) -> Hello {
    Hello {
        tool: concat!("relora-kit ", env!("CARGO_PKG_VERSION")).into(),
        job: job.to_owned(),
        rank: ranks.rank,
        world_size: ranks.world_size,
        host: host_name(),
    }
}

fn gone(rank: usize, host: &str, how: &str) -> Error {
    Error::world(format!("rank {rank} ({host}) is gone{how}"))
}

/// Opens the port on which rank 0 is found; 0 takes any.
pub(super) fn listen(address: &str, port: u16) -> Result<TcpListener> {
    let bound = TcpListener::bind((address, port));
    // Not every machine has IPv6.
    let bound = if address == "::" { bound.or_else(|_| TcpListener::bind(("0.0.0.0", port))) } else { bound };
    bound.map_err(|e| {
        Error::world(format!("rank 0 cannot listen on port {port}: {e}"))
            .help("another job may use it: choose another MASTER_PORT")
    })
}

fn connect(hosts: &[String], port: u16, left: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for host in hosts {
        let addresses = match (host.as_str(), port).to_socket_addrs() {
            Ok(addresses) => addresses,
            Err(e) => {
                last = e;
                continue;
            }
        };
        for address in addresses {
            match TcpStream::connect_timeout(&address, left.clamp(Duration::from_millis(10), Duration::from_secs(10))) {
                Ok(stream) => return Ok(stream),
                Err(e) => last = e,
            }
        }
    }
    Err(last)
}

fn accept_all(
    listener: &TcpListener,
    own: &Hello,
    limit: Duration,
    found: &mut [Option<(TcpStream, String)>],
) -> Result<()> {
    let failed = |e: io::Error| Error::world(format!("rank 0 cannot wait for the others: {e}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let began = Instant::now();
    while found.iter().any(Option::is_none) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if began.elapsed() >= limit {
                    return Err(missing(found, limit));
                }
                crate::interrupt::check()?;
                thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(e) => return Err(failed(e)),
        };
        take_in(stream, own, found)?;
    }
    Ok(())
}

/// Notes who has come; whoever is no rank of a job is sent away.
fn take_in(mut stream: TcpStream, own: &Hello, found: &mut [Option<(TcpStream, String)>]) -> Result<()> {
    let quick = Some(Duration::from_secs(2));
    let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(quick));
    let Ok(Message::Hello(hello)) = ready.and_then(|()| Message::read(&mut stream, 1 << 16)) else { return Ok(()) };
    let refuse = |stream: &mut TcpStream, sentence: String| {
        let error =
            Error::request(sentence).help("start all ranks with one launcher, and the same program on every machine");
        drop(Message::Ended(Sentence::from(&error)).write(stream));
        error
    };
    let Hello { tool, job, rank, world_size, host } = hello;
    if job != own.job {
        let sentence = format!("rank {rank} ({host}) belongs to another job than rank 0 ({}) on this port", own.host);
        let _ = refuse(&mut stream, sentence);
        return Ok(());
    }
    let pairs =
        [("program", &tool, &own.tool), ("number of ranks", &world_size.to_string(), &own.world_size.to_string())];
    if let Some((what, there, here)) = pairs.into_iter().find(|(_, there, here)| there != here) {
        return Err(refuse(
            &mut stream,
            format!("rank {rank} ({host}) has another {what} than rank 0 ({}): {there} instead of {here}", own.host),
        ));
    }
    match rank.checked_sub(1).and_then(|at| found.get_mut(at)) {
        Some(place @ None) => {
            *place = Some((stream, host));
            Ok(())
        }
        Some(Some((_, other))) => {
            let sentence = format!("two processes call themselves rank {rank} ({other} and {host})");
            Err(refuse(&mut stream, sentence))
        }
        None => {
            let sentence = format!("two processes call themselves rank 0 ({} and {host})", own.host);
            Err(refuse(&mut stream, sentence))
        }
    }
}

fn missing(found: &[Option<(TcpStream, String)>], limit: Duration) -> Error {
    let missing: Vec<String> =
        found.iter().enumerate().filter(|(_, f)| f.is_none()).map(|(i, _)| (i + 1).to_string()).collect();
    let shown = missing[..missing.len().min(10)].join(", ");
    Error::world(format!(
        "{} of {} ranks did not come within {} s: {shown}{}",
        missing.len(),
        found.len() + 1,
        limit.as_secs(),
        if missing.len() > 10 { ", ..." } else { "" }
    ))
    .help(format!(
        "check that they run and see the same MASTER_ADDR and MASTER_PORT; {JOIN_VARIABLE} sets how long to wait"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn ranks(rank: usize, world_size: usize) -> Ranks {
        Ranks { rank, world_size, local_rank: rank, local_size: None, master: None, launcher: "torchrun" }
    }

    /// What a process of the tests hears when the job ends.
    fn endings() -> (OnEnding, Receiver<Ending>) {
        let (sender, receiver) = channel();
        let sender = Mutex::new(sender);
        (Arc::new(move |ending| drop(sender.lock().unwrap().send(ending))), receiver)
    }

    const LIMIT: Duration = Duration::from_secs(20);

    /// All ranks of a job, in one process.
    fn job(size: usize) -> Vec<(Rendezvous, Receiver<Ending>)> {
        let listener = listen("127.0.0.1", 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let members: Vec<_> = (1..size)
            .map(|rank| {
                thread::spawn(move || {
                    let (on_ending, endings) = endings();
                    (
                        Rendezvous::join(&["127.0.0.1".into()], port, &ranks(rank, size), "j", LIMIT, on_ending)
                            .unwrap(),
                        endings,
                    )
                })
            })
            .collect();
        let (on_ending, endings) = endings();
        let mut all = vec![(Rendezvous::lead(listener, &ranks(0, size), "j", LIMIT, on_ending).unwrap(), endings)];
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
        assert!(!all[0].0.fail(&Error::world("full")), "rank 0 tells it itself");
        assert_eq!(heard(&all[1].1).error.message, "full");
    }

    #[test]
    fn a_rank_that_falls_silent_is_gone() {
        let listener = listen("127.0.0.1", 0).unwrap();
        let silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let (on_ending, endings) = endings();
        let hosts = vec!["a".into(), "b".into()];
        let _line = Rendezvous::start(0, hosts, vec![(1, stream)], Duration::from_millis(300), on_ending).unwrap();
        let message = heard(&endings).error.message;
        assert!(message.starts_with("rank 1 (b) is gone: nothing was heard of it"), "{message}");
        drop(silent);
    }

    #[test]
    fn ranks_that_do_not_fit_together_are_refused_by_name() {
        let refused = |members: &[(Ranks, &'static str)]| {
            let listener = listen("127.0.0.1", 0).unwrap();
            let port = listener.local_addr().unwrap().port();
            let join = |(ranks, job): &(Ranks, &'static str)| {
                let (ranks, job) = (ranks.clone(), *job);
                let limit = Duration::from_secs(1);
                thread::spawn(move || {
                    Rendezvous::join(&["127.0.0.1".into()], port, &ranks, job, limit, endings().0).err()
                })
            };
            let members: Vec<_> = members.iter().map(join).collect();
            let limit = Duration::from_secs(1);
            let leader = Rendezvous::lead(listener, &ranks(0, 3), "j", limit, endings().0).err();
            let members: Vec<String> =
                members.into_iter().map(|m| m.join().unwrap().map_or(String::new(), |e| e.message)).collect();
            let leader = leader.expect("must be refused");
            (leader.exit_code(), leader.message, members)
        };
        let (code, message, members) = refused(&[(ranks(1, 4), "j")]);
        assert!(code == 2 && message.contains("has another number of ranks") && message.contains("4 instead of 3"));
        assert_eq!(members, [message]);
        let (code, message, _) = refused(&[(ranks(1, 3), "j"), (ranks(1, 3), "j")]);
        assert!(code == 2 && message.starts_with("two processes call themselves rank 1 ("), "{message}");
        let (code, message, members) = refused(&[(ranks(1, 3), "j"), (ranks(2, 3), "other")]);
        assert!(code == 3 && message.starts_with("1 of 3 ranks did not come within 1 s: 2"), "{message}");
        assert!(members[0] == message && members[1].contains("belongs to another job"), "{members:?}");
    }

    #[test]
    fn a_master_that_does_not_answer_is_given_up_in_time() {
        let limit = Duration::from_millis(300);
        let join =
            |port| Rendezvous::join(&["127.0.0.1".into()], port, &ranks(1, 2), "", limit, endings().0).err().unwrap();
        let port = listen("127.0.0.1", 0).unwrap().local_addr().unwrap().port();
        let refused = join(port);
        assert!(refused.message.starts_with(&format!("rank 1 cannot reach rank 0 at 127.0.0.1:{port}")));
        assert_eq!(refused.exit_code(), 3);
        // Somebody listens, and says nothing.
        let mute = listen("127.0.0.1", 0).unwrap();
        let began = Instant::now();
        let message = join(mute.local_addr().unwrap().port()).message;
        assert!(message.ends_with("it does not answer") && began.elapsed() < LIMIT, "{message}");
    }
}
