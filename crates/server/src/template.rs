//! Templates, and what is wrong with them, in the API's words.

use std::collections::BTreeMap;
use std::path::Path;
use zygote_api::{
    ErrorCode, Failure, PipPackage, TemplateDetail, TemplateHealth, TemplateInfo, TemplateList,
    UnusableTemplate, rfc3339,
};
use zygote_engine::PROTOCOL_VERSION;
use zygote_template::{Recipe, RecipeError, Store, StoreError, Template, Wheel};

/// All templates that are for somebody of a tenant; `None`: for somebody who has all.
pub fn template_list(store: &Store, tenant: Option<&str>) -> TemplateList {
    let mut list = TemplateList::default();
    for (name, template) in store.list() {
        let is_its = |template: &Template| template.is_for(tenant);
        // What is damaged is its owner's to mend.
        if !template.as_ref().map_or(tenant.is_none(), is_its) {
            continue;
        }
        let build = store.current(&name);
        match template.and_then(|template| Ok(template_info(build?, template))) {
            Ok(info) => list.templates.push(info),
            Err(error) => list.unusable.push(UnusableTemplate {
                template: name,
                error: template_failure(&error),
            }),
        }
    }
    list
}

/// Whether each template can be forked, and whose it is.
pub fn templates_ready(store: &Store) -> BTreeMap<String, (Option<String>, TemplateHealth)> {
    let health = |template: Result<Template, StoreError>| {
        let known = template.ok();
        let tenant = known.as_ref().and_then(|own| own.tenant.clone());
        let version = known.as_ref().map(|own| own.protocol_version);
        let contents = known.map(|own| own.contents).unwrap_or_default();
        let by_pip = contents.pip.iter().any(|wheel| wheel.name == "numpy");
        let health = TemplateHealth {
            ready: version == Some(PROTOCOL_VERSION),
            numpy: by_pip || contents.debian.contains_key("python3-numpy"),
        };
        (tenant, health)
    };
    let all = store.list().into_iter();
    all.map(|(name, template)| (name, health(template)))
        .collect()
}

/// A template, if it is for somebody of a tenant (`None`: for somebody who has all).
///
/// # Errors
/// If there is none of that name for him, or its description is damaged.
pub fn template_for(
    store: &Store,
    name: &str,
    tenant: Option<&str>,
) -> Result<Template, StoreError> {
    let found = store.inspect(name);
    let Some(tenant) = tenant else { return found };
    match found {
        Ok(template) if template.is_for(Some(tenant)) => Ok(template),
        // Another's is as if it were not there.
        Ok(_) | Err(StoreError::NotFound { .. }) => Err(store.none_for(name, tenant)),
        Err(error) => Err(error),
    }
}

/// All that is known of a template, to somebody of a tenant.
///
/// # Errors
/// See [`template_for`].
pub fn template_detail(
    store: &Store,
    name: &str,
    tenant: Option<&str>,
) -> Result<TemplateDetail, StoreError> {
    let template = template_for(store, name, tenant)?;
    let is_owner = tenant.is_none();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let recipe = template.recipe.clone();
    let (path, toml) = match recipe {
        Some(recipe) => (recipe.path, Some(recipe.text)),
        None => (None, None),
    };
    let parsed = toml
        .as_ref()
        .and_then(|toml| Recipe::parse(name, toml, path.as_deref()).ok());
    let contents = template.contents.clone();
    let (run, warm) = match &template.derived {
        Some(derived) => (derived.run.clone(), derived.warm.clone()),
        None => parsed.map_or_else(Default::default, |recipe| (recipe.run, recipe.warm)),
    };
    Ok(TemplateDetail {
        info: template_info(store.current(name)?, template),
        // Where things are on the host is for its owner.
        recipe_path: path.as_deref().filter(|_| is_owner).map(text),
        recipe_toml: toml,
        run,
        warm,
        debian_packages: contents.debian,
        pip_packages: contents.pip.into_iter().map(pip_package).collect(),
        files: contents.files.iter().map(|path| text(path)).collect(),
        snapshots: store
            .replicas(name)?
            .iter()
            .filter(|_| is_owner)
            .map(|path| text(path))
            .collect(),
    })
}

fn pip_package(wheel: Wheel) -> PipPackage {
    let Wheel {
        name,
        version,
        file,
        sha256,
    } = wheel;
    PipPackage {
        name,
        version,
        file,
        sha256,
    }
}

/// A template in the API's words.
pub fn template_info(build: String, template: Template) -> TemplateInfo {
    let derived = template.derived;
    TemplateInfo {
        template: template.name,
        build,
        created: rfc3339(template.created_unix_s),
        created_unix_s: template.created_unix_s,
        memory_bytes: template.memory_bytes,
        vcpus: template.vcpus,
        replicas: template.replicas,
        kernel_release: template.kernel_release,
        interpreter: template.interpreter,
        base: template.base,
        packages: template.packages,
        digest: template.digest,
        tenant: template.tenant,
        disk_bytes: template.disk_bytes,
        sandbox: derived.as_ref().and_then(|derived| derived.sandbox.clone()),
        from: derived.map(|derived| derived.from),
    }
}

/// A failure of the store in the API's words.
pub fn template_failure(error: &StoreError) -> Failure {
    let code = match error {
        StoreError::NotFound { .. } | StoreError::NoBuild { .. } => ErrorCode::TemplateNotFound,
        StoreError::Name { .. } => ErrorCode::BadRequest,
        StoreError::Description { .. }
        | StoreError::Snapshot { .. }
        | StoreError::Damaged { .. } => ErrorCode::TemplateUnusable,
        StoreError::Shared { .. } => ErrorCode::Forbidden,
        StoreError::Lock(_) | StoreError::Building | StoreError::Needed { .. } => {
            ErrorCode::Conflict
        }
        StoreError::Taken { .. } | StoreError::Others { .. } => ErrorCode::NameTaken,
        StoreError::File { .. } => ErrorCode::Internal,
    };
    let failure = Failure::of(code, error);
    match error.remedy() {
        Some(remedy) => failure.remedy(remedy),
        None => failure,
    }
}

/// What is wrong with a recipe, in the API's words.
pub fn recipe_failure(error: &RecipeError) -> Failure {
    let code = match error {
        RecipeError::Unknown { .. } => ErrorCode::TemplateNotFound,
        _ => ErrorCode::BadRequest,
    };
    let failure = Failure::of(code, error);
    match error.remedy() {
        Some(remedy) => failure.remedy(remedy),
        None => failure,
    }
}
