//! The place of a process among the processes of a run, from its environment.

use crate::error::{Error, Result};

/// The place of this process among the processes of a run, as torchrun, Slurm or a person set it in
/// the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The number of this process, from 0.
    pub rank: usize,
    /// The number of processes.
    pub world_size: usize,
    /// The number of this process among those of its machine, from 0: the GPU that it uses.
    pub local_rank: usize,
    /// Name or address of the machine that serves the store, through which the processes find each
    /// other.
    pub address: String,
    /// Port of the store.
    pub port: u16,
    /// Whether another program, the agent of torchrun, serves the store. Otherwise rank 0 does.
    pub agent_store: bool,
    /// How often the processes were started before, so that a new start does not read the keys of
    /// an earlier one.
    pub restarts: u64,
}

impl Launch {
    /// Reads the environment of this process. Returns `None` if it runs alone: neither `RANK` nor
    /// `WORLD_SIZE` is set, and in a job of Slurm `MASTER_ADDR` is not set.
    ///
    /// | from | variables |
    /// |---|---|
    /// | torchrun, or by hand | `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`; `LOCAL_RANK`, `TORCHELASTIC_USE_AGENT_STORE`, `TORCHELASTIC_RESTART_COUNT` |
    /// | Slurm (`srun`) | `SLURM_PROCID`, `SLURM_NTASKS`; `SLURM_LOCALID`, `SLURM_RESTART_COUNT`; and by hand `MASTER_ADDR`, `MASTER_PORT` |
    ///
    /// # Errors
    /// [`Error::Config`] with the name of a variable that is missing or has no usable value.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Reads the variables as [`Launch::from_env`] does. `variable` returns the value of a
    /// variable.
    ///
    /// # Errors
    /// The errors of [`Launch::from_env`].
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let names = if set("RANK").is_some() || set("WORLD_SIZE").is_some() {
            ["RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"]
        } else if set("SLURM_PROCID").is_some() && set("MASTER_ADDR").is_some() {
            ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_RESTART_COUNT"]
        } else {
            return Ok(None);
        };
        let [rank, world_size, local_rank, restarts] = names;
        let launch = Launch {
            rank: number(&set, rank, None)?,
            world_size: number(&set, world_size, None)?,
            local_rank: number(&set, local_rank, Some(0))?,
            address: text(&set, "MASTER_ADDR")?,
            port: number(&set, "MASTER_PORT", None)?,
            agent_store: switch(&set, "TORCHELASTIC_USE_AGENT_STORE")?,
            restarts: number(&set, restarts, Some(0))?,
        };
        if launch.world_size == 0 {
            return Err(Error::config(world_size, "1 or more", 0));
        }
        if launch.rank >= launch.world_size {
            let expected = format!("below {world_size}, which is {}", launch.world_size);
            return Err(Error::config(rank, expected, launch.rank));
        }
        Ok(Some(launch))
    }

    /// Returns whether this process serves the store.
    pub(super) fn serves_store(&self) -> bool {
        self.rank == 0 && !self.agent_store
    }

    /// Returns whether the store is at this machine's own address.
    pub(super) fn is_loopback(&self) -> bool {
        let address: Option<std::net::IpAddr> = self.address.parse().ok();
        self.address == "localhost" || address.is_some_and(|address| address.is_loopback())
    }
}

fn text(set: &impl Fn(&str) -> Option<String>, name: &str) -> Result<String> {
    let value = set(name).ok_or_else(|| Error::config(name, "set", "nothing"))?;
    Ok(value.trim().to_owned())
}

fn number<T: std::str::FromStr>(
    set: &impl Fn(&str) -> Option<String>,
    name: &str,
    default: Option<T>,
) -> Result<T> {
    if let (None, Some(default)) = (set(name), default) {
        return Ok(default);
    }
    let value = text(set, name)?;
    value.parse().map_err(|_| Error::config(name, "a whole number", value))
}

fn switch(set: &impl Fn(&str) -> Option<String>, name: &str) -> Result<bool> {
    match set(name).as_deref().map(str::trim) {
        None | Some("False" | "false" | "0") => Ok(false),
        Some("True" | "true" | "1") => Ok(true),
        Some(other) => Err(Error::config(name, "True or False", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name);
        Launch::from_variables(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    const STORE: [(&str, &str); 2] = [("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")];

    #[test]
    fn torchrun_slurm_and_a_process_alone() {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ];
        let launch = read(&[&torchrun[..], &STORE].concat()).unwrap().unwrap();
        let expected = Launch {
            rank: 3,
            world_size: 4,
            local_rank: 1,
            address: "node0".to_owned(),
            port: 29500,
            agent_store: true,
            restarts: 2,
        };
        assert_eq!(launch, expected);
        assert!(!Launch { rank: 0, ..launch }.serves_store());
        let slurm = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0")];
        let launch = read(&[&slurm[..], &STORE].concat()).unwrap().unwrap();
        assert!(launch.serves_store() && launch.world_size == 2 && !launch.is_loopback());
        // A job of Slurm whose program nobody told where the store is.
        assert_eq!(read(&slurm).unwrap(), None);
        assert_eq!(read(&STORE).unwrap(), None);
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let full = [("RANK", "1"), ("WORLD_SIZE", "2"), STORE[0], STORE[1]];
        let without = |name: &str| full.into_iter().filter(|(key, _)| *key != name).collect();
        let with = |name, value| [&[(name, value)], &full[..]].concat();
        let cases: [(Vec<_>, &str); 9] = [
            (without("WORLD_SIZE"), "WORLD_SIZE must be set, found nothing"),
            (without("RANK"), "RANK must be set, found nothing"),
            (without("MASTER_ADDR"), "MASTER_ADDR must be set, found nothing"),
            (without("MASTER_PORT"), "MASTER_PORT must be set, found nothing"),
            (with("RANK", "2"), "RANK must be below WORLD_SIZE, which is 2, found 2"),
            (with("RANK", "-1"), "RANK must be a whole number, found -1"),
            (with("WORLD_SIZE", "0"), "WORLD_SIZE must be 1 or more, found 0"),
            (with("MASTER_PORT", "70000"), "MASTER_PORT must be a whole number, found 70000"),
            (
                with("TORCHELASTIC_USE_AGENT_STORE", "maybe"),
                "TORCHELASTIC_USE_AGENT_STORE must be True or False, found maybe",
            ),
        ];
        for (variables, expected) in cases {
            assert_eq!(read(&variables).unwrap_err().to_string(), expected);
        }
    }
}
