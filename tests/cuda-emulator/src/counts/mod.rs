//! What a launch costs: instructions, memory traffic, conflicts; and from a card's rates the time that models.

pub mod card;
pub mod counters;
pub mod l2;
pub mod report;
pub mod traffic;

pub use card::Card;
pub use counters::Counters;
pub use l2::L2;
