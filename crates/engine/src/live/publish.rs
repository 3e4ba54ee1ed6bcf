//! A moment of a sandbox as a template: on disk, where it outlives the sandbox, and is forked like any other.

use super::branch::Moment;
use super::contexts::ContextSpec;
use super::error::LiveError;
use super::sandbox::Sandbox;
use crate::engine::Engine;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::spawn_blocking;
use zygote_protocol::{PROTOCOL_VERSION, ProcessId};
use zygote_runner::chain;
use zygote_template::{Derived, Fresh, Store, StoreError, Template};

/// Beside a template's snapshot, if that is of a sandbox.
const CONTEXTS_FILE: &str = "contexts.json";

/// What is wanted.
#[derive(Clone, Debug)]
pub struct PublishSpec {
    /// What the template is called.
    pub name: String,
    /// A moment that is kept; `None`: now.
    pub moment: Option<String>,
    /// How long the sandbox's processes may take to stop.
    pub limit: Duration,
    /// Whether to go on although some have not.
    pub anyway: bool,
}

/// Interpreters that stay, with their processes.
pub type Contexts = Vec<(ContextSpec, ProcessId)>;

impl Engine {
    /// Writes a moment of a sandbox to disk, as a template; the sandbox goes on meanwhile. The caller holds the lock of
    /// builds.
    ///
    /// # Errors
    /// If the name is that of a template that was built, or of another tenant's, the sandbox cannot be branched, or the disk is full: then
    /// there is no trace of it.
    pub async fn publish(
        &self,
        sandbox: &Sandbox,
        spec: &PublishSpec,
    ) -> Result<Template, LiveError> {
        let failed = |error: &dyn Error| LiveError::NotPublished(chain(error));
        sandbox.touch().await;
        let store = &self.settings().store;
        let fresh = begin(store, sandbox, spec.name.clone()).await?;
        let moment = match &spec.moment {
            Some(words) => sandbox.moment(words).await?,
            None => Arc::new(sandbox.branch(spec.limit, spec.anyway).await?),
        };
        let saved = moment.zygote.save(&fresh.1.replica(0)).await;
        saved.map_err(|error| failed(&error))?;
        finish(store, fresh, &moment).await
    }
}

/// A description, and a folder for what it describes.
async fn begin(
    store: &Store,
    sandbox: &Sandbox,
    name: String,
) -> Result<(Template, Fresh), LiveError> {
    let (store, id) = (store.clone(), sandbox.id);
    let (template, build) = (sandbox.spec.template.clone(), sandbox.build.clone());
    let tenant = sandbox.spec.tenant.clone();
    let begun = spawn_blocking(move || -> Result<_, StoreError> {
        store.may_derive(&name, false, tenant.as_deref())?;
        let base = store.inspect_build(&template, &build)?;
        let fresh = store.begin_new(&name)?;
        let derived = Derived {
            from: template,
            build,
            run: Vec::new(),
            warm: base.warm_code().unwrap_or_default(),
            sandbox: Some(id.to_string()),
        };
        let described = Template {
            name,
            replicas: 1,
            protocol_version: PROTOCOL_VERSION,
            // Nothing else is the same.
            digest: fresh.unique(),
            recipe: None,
            derived: Some(derived),
            tenant,
            ..base
        };
        Ok((described, fresh))
    });
    Ok(begun
        .await
        .map_err(|error| LiveError::NotPublished(error.to_string()))??)
}

async fn finish(
    store: &Store,
    (template, fresh): (Template, Fresh),
    moment: &Moment,
) -> Result<Template, LiveError> {
    let contexts = serde_json::to_vec(&moment.contexts).unwrap_or_default();
    let store = store.clone();
    let published = spawn_blocking(move || -> Result<Template, String> {
        let path = fresh.folder().join(CONTEXTS_FILE);
        let written = fs::File::create(&path).and_then(|mut file| {
            file.write_all(&contexts)?;
            file.sync_all()
        });
        written.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let template = Template {
            created_unix_s: zygote_template::unix_seconds(),
            disk_bytes: zygote_template::disk_bytes(fresh.folder()),
            ..template
        };
        let published = store.publish(fresh, &template);
        published.map_err(|error| chain(&error))?;
        Ok(template)
    });
    let published = published.await.map_err(|error| error.to_string());
    published
        .and_then(|published| published)
        .map_err(LiveError::NotPublished)
}

/// What a sandbox's interpreters were when a template was made of it; `None` for one that was built.
pub fn contexts_of(snapshot: &Path) -> Option<Contexts> {
    if !zygote_template::is_held(snapshot) {
        return None;
    }
    let path = snapshot.parent()?.join(CONTEXTS_FILE);
    // Without it they are processes like others.
    let contexts = fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Some(contexts.unwrap_or_default())
}
