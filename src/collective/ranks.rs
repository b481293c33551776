//! Which of several processes this one is, as `torchrun`, `mpirun` and Slurm's `srun` tell it in the environment.

use crate::error::{Error, Result};

/// Where the processes of a job meet, and how long they wait for each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Host name or address of rank 0.
    pub host: String,
    /// Its port.
    pub port: u16,
}

/// This process among those of its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// From 0.
    pub rank: usize,
    /// Processes in all.
    pub world_size: usize,
    /// This process among those on the same machine, from 0: the GPU it takes.
    pub local_rank: usize,
    /// Processes on this machine, if that is known.
    pub local_size: Option<usize>,
    /// Where rank 0 can be reached, if that is known.
    pub master: Option<Master>,
    /// Who started them: `torchrun`, `mpirun` or `srun`.
    pub launcher: &'static str,
}

/// The variables of one launcher.
struct Source {
    launcher: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
}

/// In the order in which they are believed: `torchrun` and `mpirun` may run under Slurm, whose numbers are then those of
/// what it started. `SLURM_STEP_NUM_TASKS` is there in what `srun` started and not in a batch script itself.
const SOURCES: [Source; 4] = [
    Source {
        launcher: "torchrun",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
    },
    Source {
        launcher: "mpirun",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    Source {
        launcher: "mpirun",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
    },
    Source {
        launcher: "srun",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "",
    },
];

/// The port that rank 0 listens on where only its address is given: PyTorch's.
const PORT: u16 = 29500;

impl Ranks {
    /// From the environment of this process; `None` where it is alone.
    pub fn from_env() -> Result<Option<Ranks>> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// [`Ranks::from_env`], of any environment.
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Ranks>> {
        let mut found: Option<(Ranks, &Source)> = None;
        for source in &SOURCES {
            let Some(ranks) = source.read(get)? else { continue };
            match &found {
                None => found = Some((ranks, source)),
                Some((first, other)) if other.launcher == "torchrun" && source.launcher == "mpirun" => {
                    check_same(first, other, &ranks, source)?;
                }
                Some(_) => {}
            }
        }
        let Some((mut ranks, _)) = found.filter(|(ranks, _)| ranks.world_size > 1) else { return Ok(None) };
        ranks.master = master(get)?;
        Ok(Some(ranks))
    }

    /// Whether this is the process that writes files and reports.
    pub fn is_leader(&self) -> bool {
        self.rank == 0
    }

    /// How many threads a process should compute with that was given no number: its share of the machine, where nothing
    /// has bound it to some cores already.
    pub fn threads(&self, allowed: usize, cores: usize) -> usize {
        match self.local_size {
            Some(size) if allowed >= cores => (allowed / size).max(1),
            _ => allowed,
        }
    }
}

impl Source {
    fn read(&self, get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Ranks>> {
        let (rank, world_size) = (number(get, self.rank)?, number(get, self.world_size)?);
        let (rank, world_size) = match (rank, world_size) {
            (Some(rank), Some(world_size)) => (rank, world_size),
            // Slurm numbers also what it does not start in parallel.
            (None, None) => return Ok(None),
            _ if self.launcher == "srun" => return Ok(None),
            (found, _) => {
                let (there, missing) =
                    if found.is_some() { (self.rank, self.world_size) } else { (self.world_size, self.rank) };
                return Err(Error::request(format!("{there} is set in the environment, but {missing} is not"))
                    .help(format!("set both, as torchrun does, or neither: unset {there}")));
            }
        };
        if rank >= world_size {
            return Err(Error::request(format!(
                "{} is {rank}, expected a number below {}, which is {world_size}",
                self.rank, self.world_size
            ))
            .help("ranks count from 0"));
        }
        let local_size = if self.local_size.is_empty() { None } else { number(get, self.local_size)? };
        let local_rank = number(get, self.local_rank)?.unwrap_or(0);
        if let Some(size) = local_size.filter(|size| local_rank >= *size) {
            return Err(Error::request(format!(
                "{} is {local_rank}, expected a number below {}, which is {size}",
                self.local_rank, self.local_size
            )));
        }
        Ok(Some(Ranks { rank, world_size, local_rank, local_size, master: None, launcher: self.launcher }))
    }
}

fn check_same(first: &Ranks, one: &Source, second: &Ranks, other: &Source) -> Result<()> {
    let pairs = [
        (one.world_size, first.world_size, other.world_size, second.world_size),
        (one.rank, first.rank, other.rank, second.rank),
    ];
    match pairs.into_iter().find(|(_, a, _, b)| a != b) {
        None => Ok(()),
        Some((one, a, other, b)) => {
            Err(Error::request(format!("the environment contradicts itself: {one} is {a}, but {other} is {b}"))
                .help("unset RANK and WORLD_SIZE under mpirun, or start the processes with torchrun alone"))
        }
    }
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<Option<usize>> {
    let Some(text) = get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(Error::request(format!("{name} is '{text}', expected a whole number"))
            .help("the launcher (torchrun, mpirun, srun) sets it")),
    }
}

fn master(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Master>> {
    let Some(host) = get("MASTER_ADDR").filter(|host| !host.is_empty()) else { return Ok(None) };
    let given = number(get, "MASTER_PORT")?;
    let port = match given.map(u16::try_from) {
        None => PORT,
        Some(Ok(port)) if port > 0 => port,
        _ => {
            return Err(Error::request(format!(
                "MASTER_PORT is {}, expected a number from 1 to 65535",
                given.unwrap_or_default()
            )));
        }
    };
    // torchrun's agent listens on the port itself.
    let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true"));
    Ok(Some(Master { host, port: if taken { port.checked_add(1).unwrap_or(port - 1) } else { port } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Ranks>> {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Ranks::from_variables(&get)
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "node1"),
        ("MASTER_PORT", "1234"),
    ];

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(read(&[]).unwrap(), None);
        let master = |port| Some(Master { host: "node1".into(), port });
        let expected = Ranks {
            rank: 3,
            world_size: 4,
            local_rank: 1,
            local_size: Some(2),
            master: master(1234),
            launcher: "torchrun",
        };
        assert_eq!(read(&TORCHRUN).unwrap(), Some(expected.clone()));
        let agent = [&TORCHRUN[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(read(&agent).unwrap(), Some(Ranks { master: master(1235), ..expected.clone() }));

        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let under_mpirun = Ranks { master: None, launcher: "mpirun", ..expected.clone() };
        assert_eq!(read(&mpirun).unwrap(), Some(under_mpirun.clone()));
        let hydra = [("PMI_RANK", "3"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
        assert_eq!(read(&hydra).unwrap(), Some(under_mpirun.clone()));
        // mpirun started by Slurm: its daemons are the tasks.
        let both = [&mpirun[..], &[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "2")]].concat();
        assert_eq!(read(&both).unwrap(), Some(under_mpirun));

        let srun =
            [("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_LOCALID", "1"), ("MASTER_ADDR", "node1")];
        let under_srun = Ranks { local_size: None, master: master(29500), launcher: "srun", ..expected };
        assert_eq!(read(&srun).unwrap(), Some(under_srun));
        // A batch script is a process of its own, however many tasks were asked for.
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap(), None);
        assert_eq!(read(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
    }

    #[test]
    fn nonsense_and_contradictions_are_refused_in_one_sentence() {
        let with = |more: &[(&str, &str)]| {
            let kept = TORCHRUN.iter().filter(|(name, _)| more.iter().all(|(n, _)| n != name));
            let all: Vec<(&str, &str)> = kept.chain(more).copied().collect();
            let error = read(&all).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.message
        };
        assert_eq!(with(&[("RANK", "4")]), "RANK is 4, expected a number below WORLD_SIZE, which is 4");
        assert_eq!(with(&[("RANK", "x")]), "RANK is 'x', expected a whole number");
        assert_eq!(with(&[("RANK", "")]), "WORLD_SIZE is set in the environment, but RANK is not");
        assert_eq!(with(&[("WORLD_SIZE", "")]), "RANK is set in the environment, but WORLD_SIZE is not");
        assert!(with(&[("LOCAL_RANK", "2")]).contains("LOCAL_RANK is 2, expected a number below LOCAL_WORLD_SIZE"));
        assert!(with(&[("MASTER_PORT", "70000")]).contains("MASTER_PORT is 70000"));
        assert!(with(&[("MASTER_PORT", "0")]).contains("MASTER_PORT is 0"));
        let contradiction = with(&[("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "2")]);
        assert!(contradiction.contains("OMPI_COMM_WORLD_RANK is 3"), "{contradiction}");
        let contradiction = with(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]);
        assert!(contradiction.contains("WORLD_SIZE is 4, but OMPI_COMM_WORLD_SIZE is 2"), "{contradiction}");
    }

    #[test]
    fn processes_of_one_machine_share_its_cores_unless_they_are_bound() {
        let ranks = read(&TORCHRUN).unwrap().unwrap();
        assert_eq!([ranks.threads(8, 8), ranks.threads(1, 1), ranks.threads(2, 8)], [4, 1, 2]);
        assert_eq!(Ranks { local_size: None, ..ranks }.threads(8, 8), 8);
    }
}
