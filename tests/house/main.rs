//! The source tree itself: which module may import which, and what README promises.
#![allow(missing_docs)]

mod layering;
mod readme;
