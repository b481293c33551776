//! Memory while requests are held back ([`super::launch_queue`]): what is given back is still needed by requests that the GPU has not
//! seen yet, so the driver does not get it. It is kept here by its size, and the next who needs as much takes the lowest address:
//! the same requests take the same memory every time, and can be recognised by it.

use super::driver::Gpu;
use crate::error::Result;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{MutexGuard, PoisonError},
};

/// Whose a piece of memory is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The driver's.
    Driver,
    /// The shelf's.
    Shelf,
    /// The shelf's, written by the host: at once, before all that is held back. So that nothing held back uses it for something
    /// else, it comes back for none but uploads, and not before these requests are gone.
    Uploads,
}

/// A piece of memory.
#[derive(Clone, Copy)]
pub struct Piece {
    /// Of its first byte, as the GPU counts.
    pub address: u64,
    pub bytes: usize,
    pub owner: Owner,
}

/// What is kept.
#[derive(Default)]
pub struct Shelf {
    holding: bool,
    /// Addresses by owner and size.
    free: BTreeMap<(Owner, usize), BTreeSet<u64>>,
    /// Given back, and still needed by what is held back.
    later: Vec<Piece>,
}

impl Shelf {
    fn put(&mut self, piece: Piece) {
        self.free.entry((piece.owner, piece.bytes)).or_default().insert(piece.address);
    }

    /// Who owns what is taken now.
    pub fn owner(&self, upload: bool) -> Owner {
        match (self.holding, upload) {
            (false, _) => Owner::Driver,
            (true, false) => Owner::Shelf,
            (true, true) => Owner::Uploads,
        }
    }

    /// One of so many bytes, if there is one.
    pub fn take(&mut self, owner: Owner, bytes: usize) -> Option<Piece> {
        let address = self.free.get_mut(&(owner, bytes))?.pop_first()?;
        Some(Piece { address, bytes, owner })
    }
}

impl Gpu {
    /// The shelf.
    pub fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, memory comes from the shelf and goes there, or does not.
    pub fn keep_memory(&self, keep: bool) {
        self.shelf().holding = keep;
    }

    /// Takes a piece back.
    pub fn give_back(&self, piece: Piece) -> Result<()> {
        let mut shelf = self.shelf();
        match piece.owner {
            Owner::Shelf => shelf.put(piece),
            Owner::Uploads if !shelf.holding => shelf.put(piece),
            Owner::Driver if !shelf.holding => return self.free(piece.address),
            Owner::Driver | Owner::Uploads => shelf.later.push(piece),
        }
        Ok(())
    }

    /// Nothing is held back any more.
    pub fn deferred_memory_is_idle(&self) -> Result<()> {
        let mut shelf = self.shelf();
        for piece in std::mem::take(&mut shelf.later) {
            match piece.owner {
                Owner::Driver => self.free(piece.address)?,
                _ => shelf.put(piece),
            }
        }
        Ok(())
    }

    /// Gives the driver all that lies on the shelf; nothing is held back.
    pub fn clear_shelf(&self) -> Result<()> {
        let free = std::mem::take(&mut self.shelf().free);
        free.into_values().flatten().try_for_each(|address| self.free(address))
    }
}
