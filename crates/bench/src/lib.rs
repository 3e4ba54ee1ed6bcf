//! What a fork costs, and whose the costs are: times of runs beside those of the host itself, memory of
//! sandboxes that are held, and the census of a run's pages.

mod baseline;
mod branches;
mod census;
mod held;
mod measure;
mod owners;
mod plots;
mod runs;
mod samples;

pub use baseline::Baselines;
pub use branches::BranchTimes;
pub use census::{Census, CensusError, Course, Phase, Share, take};
pub use held::{Cost, Held};
pub use measure::{BenchError, HostInfo, Plan, Report, measure};
pub use plots::{draw, draw_load};
pub use runs::{RunError, RunTimes};
pub use samples::Samples;
