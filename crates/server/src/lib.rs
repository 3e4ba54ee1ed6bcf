//! The API over HTTP. Translation only: what is asked becomes calls of a [`Backend`], what comes of
//! them becomes answers. Policy is the engine's; sockets are the daemon's.

mod answer;
mod backend;
mod connection;
mod document;
mod exec;
mod files;
mod guard;
mod lines;
mod live;
mod local;
mod metrics;
mod page;
mod path;
mod request;
mod routes;
mod stream;
mod template;

pub use backend::{Backend, Forwarded, Input};
pub use connection::serve;
pub use document::document;
pub use guard::Origin;
pub use local::Local;
pub use metrics::{Measured, Metrics, merged};
pub use routes::router;
pub use template::{
    recipe_failure, template_detail, template_failure, template_for, template_info, template_list,
    templates_ready,
};
