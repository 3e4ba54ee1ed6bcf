//! `zygote key`: who may use the engine over TCP.

use crate::args::{Global, KeyCreateArgs, KeyVerb};
use crate::failure::usage;
use crate::host;
use crate::out::{complain, say};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use zygote_api::rfc3339;
use zygote_daemon::{Key, KeyFile, KeyFileError, Limits, NewKey, keys};

/// Does it; gives back the exit code.
pub fn run(global: &Global, verb: &KeyVerb) -> anyhow::Result<u8> {
    let file = keys(&host::store(global)?);
    match verb {
        KeyVerb::Create(args) => create(&file, args),
        KeyVerb::Ls { json } => list(&file, *json),
        KeyVerb::Revoke { id, json } => revoke(&file, id, *json),
    }
}

fn create(file: &KeyFile, args: &KeyCreateArgs) -> anyhow::Result<u8> {
    let created = file.create(NewKey {
        name: args.name.clone(),
        role: args.role,
        tenant: args.tenant.clone(),
        expires_unix_s: args.expires.0.map(|time| now() + time.as_secs().max(1)),
        limits: Limits {
            rate: args.rate,
            runs: args.runs,
            sandboxes: args.sandboxes,
            timeout_s: args
                .timeout
                .map(|time| time.0.unwrap_or_default().as_secs_f64()),
            batch: args.batch,
            memory_bytes: args.memory,
            cpus: args.cpus,
            output_bytes: args.output,
            upload_bytes: args.upload,
        },
    });
    let (secret, key) = created.map_err(|error| match error {
        KeyFileError::Bad(why) => usage(why).into(),
        error => anyhow::Error::from(error),
    })?;
    if args.json {
        let mut told = told(&key);
        told["secret"] = secret.reveal().into();
        say!("{told}");
        return Ok(0);
    }
    complain!(
        "zygote: this is the only time that the key is shown; it goes into the header Authorization: Bearer KEY"
    );
    say!("{}", secret.reveal());
    Ok(0)
}

fn list(file: &KeyFile, as_json: bool) -> anyhow::Result<u8> {
    let keys = file.read()?;
    if as_json {
        let keys: Vec<_> = keys.iter().map(told).collect();
        say!("{}", json!({ "keys": keys }));
        return Ok(0);
    }
    say!(
        "{:<13} {:<16} {:<7} {:<12} {:<21} EXPIRES",
        "ID",
        "TENANT",
        "ROLE",
        "NAME",
        "CREATED"
    );
    let now = now();
    for key in &keys {
        let expires = match key.expires_unix_s {
            None => "never".to_owned(),
            Some(end) if key.has_expired(now) => format!("{} (expired)", rfc3339(end)),
            Some(end) => rfc3339(end),
        };
        say!(
            "{:<13} {:<16} {:<7} {:<12} {:<21} {expires}",
            key.id,
            key.tenant.as_deref().unwrap_or("all"),
            key.role.name(),
            key.name.as_deref().unwrap_or("-"),
            rfc3339(key.created_unix_s),
        );
    }
    Ok(0)
}

fn revoke(file: &KeyFile, id: &str, as_json: bool) -> anyhow::Result<u8> {
    let key = file.revoke(id)?;
    if as_json {
        say!("{}", told(&key));
    } else {
        say!("{} counts no more", key.id);
    }
    Ok(0)
}

/// All but the hash.
fn told(key: &Key) -> Value {
    json!({
        "key": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role,
        "created": rfc3339(key.created_unix_s),
        "created_unix_s": key.created_unix_s,
        "expires": key.expires_unix_s.map(rfc3339),
        "expires_unix_s": key.expires_unix_s,
        "limits": key.limits,
    })
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
