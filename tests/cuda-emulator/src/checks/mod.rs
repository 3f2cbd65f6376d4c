//! What goes wrong, found and named.

pub mod clock;
pub mod finding;
pub mod global_race;
pub mod shared_race;

pub use finding::{Fault, Finding, Kind};
