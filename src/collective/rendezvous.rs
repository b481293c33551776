//! How the processes of a job find each other: all come to rank 0, within a time limit, and keep the [`ControlChannel`] they came by.

use super::{
    ControlChannel, OnEnding, Ranks,
    control_channel::{SILENCE, gone},
    wire::{Hello, LARGEST, Message, Sentence},
};
use crate::error::{Error, Result};
use std::{
    io,
    net::{TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

/// Seconds that the processes wait for each other at the start.
pub const JOIN_VARIABLE: &str = "RELORA_KIT_JOIN_SECONDS";
const JOIN_SECONDS: u64 = 120;

/// How much longer than the limit rank 0 may take to say that it has passed.
const GRACE: Duration = Duration::from_secs(2);

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

/// Meets the other processes at `MASTER_ADDR`, within `limit`. `on_ending` is called when one is lost later.
pub(super) fn meet(ranks: &Ranks, limit: Duration, on_ending: OnEnding) -> Result<ControlChannel> {
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
        lead(listener, ranks, &job, limit, on_ending)
    } else {
        join(std::slice::from_ref(&master.host), master.port, ranks, &job, limit, on_ending)
    }
}

/// As rank 0: waits for the others to come.
pub(super) fn lead(
    listener: TcpListener,
    ranks: &Ranks,
    job: &str,
    limit: Duration,
    on_ending: OnEnding,
) -> Result<ControlChannel> {
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
    ControlChannel::start(0, hosts, streams, SILENCE, on_ending)
}

/// As another rank: finds rank 0 under one of its names.
pub(super) fn join(
    hosts: &[String],
    port: u16,
    ranks: &Ranks,
    job: &str,
    limit: Duration,
    on_ending: OnEnding,
) -> Result<ControlChannel> {
    let began = Instant::now();
    let unreachable = |e: String| {
        Error::environment(format!(
            "rank {} cannot reach rank 0 at {}:{port} within {} s: {e}",
            ranks.rank,
            hosts.join(" or "),
            limit.as_secs()
        ))
        .help("check that rank 0 runs, MASTER_ADDR and MASTER_PORT, and that no firewall stands between the machines")
    };
    let mut stream = loop {
        match connect(hosts, port, limit.saturating_sub(began.elapsed())) {
            Ok(stream) => break stream,
            Err(e) if began.elapsed() >= limit => return Err(unreachable(e.to_string())),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    };
    // The others may come later than this one.
    let _ = stream.set_read_timeout(Some(limit.saturating_sub(began.elapsed()).max(Duration::from_millis(10)) + GRACE));
    let answer = Message::Hello(hello(ranks, job)).write(&mut stream);
    match answer.and_then(|()| Message::read(&mut stream, LARGEST)) {
        Ok(Message::Welcome(hosts)) if hosts.len() == ranks.world_size => {
            ControlChannel::start(ranks.rank, hosts, vec![(0, stream)], SILENCE, on_ending)
        }
        Ok(Message::Ended(sentence)) => Err(sentence.into_error()),
        Ok(_) => Err(unreachable("another program answers there".into())),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err(unreachable("it does not answer".into()))
        }
        Err(e) => Err(unreachable(e.to_string())),
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

/// Opens the port on which rank 0 is found; 0 takes any.
pub(super) fn listen(address: &str, port: u16) -> Result<TcpListener> {
    let bound = TcpListener::bind((address, port));
    // Not every machine has IPv6.
    let bound = if address == "::" { bound.or_else(|_| TcpListener::bind(("0.0.0.0", port))) } else { bound };
    bound.map_err(|e| {
        Error::environment(format!("rank 0 cannot listen on port {port}: {e}"))
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
    let failed = |e: io::Error| Error::environment(format!("rank 0 cannot wait for the others: {e}"));
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
    Error::environment(format!(
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
pub(super) mod tests {
    use super::*;
    use crate::collective::control_channel::tests::endings;

    pub fn ranks(rank: usize, world_size: usize) -> Ranks {
        Ranks { rank, world_size, local_rank: rank, local_size: None, master: None, launcher: "torchrun" }
    }

    pub const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn ranks_that_do_not_fit_together_are_refused_by_name() {
        let refused = |members: &[(Ranks, &'static str)]| {
            let listener = listen("127.0.0.1", 0).unwrap();
            let port = listener.local_addr().unwrap().port();
            let join = |(ranks, job): &(Ranks, &'static str)| {
                let (ranks, job) = (ranks.clone(), *job);
                let limit = Duration::from_secs(1);
                thread::spawn(move || join(&["127.0.0.1".into()], port, &ranks, job, limit, endings().0).err())
            };
            let members: Vec<_> = members.iter().map(join).collect();
            let limit = Duration::from_secs(1);
            let leader = lead(listener, &ranks(0, 3), "j", limit, endings().0).err();
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
        let join = |port| join(&["127.0.0.1".into()], port, &ranks(1, 2), "", limit, endings().0).err().unwrap();
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
