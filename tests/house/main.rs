//! The source tree itself: which module may import which, and what README promises.
#![allow(missing_docs)]

mod circles;
mod layering;
mod readme;
mod sources;
