//! What a fork costs, and whose the costs are.

mod census;
mod owners;

pub use census::{Census, CensusError, Course, Phase, Share, take};
