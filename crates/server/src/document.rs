//! The API's description, OpenAPI 3.1, from its types.

mod bounds;
mod live;

use serde::Serialize;
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::{OpenApi, ToSchema, openapi};
use zygote_api::*;

/// The scheme by which clients of TCP show who they are.
const KEY: &str = "key";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Zygote",
        description = "Fork real virtual machines the way fork(2) forks processes."
    ),
    paths(
        health,
        status,
        stop,
        metrics,
        exec,
        exec_batch,
        signal,
        lab_exec,
        lab_down,
        templates,
        build,
        template,
        remove,
        live::create,
        live::list,
        live::inspect,
        live::end,
        live::change,
        live::wait,
        live::stats,
        live::publish,
        live::diff,
        live::branch,
        live::keep_moment,
        live::list_moments,
        live::forget_moment,
        live::roll_back,
        live::pause,
        live::resume,
        live::exec_in,
        live::processes,
        live::process,
        live::wait_process,
        live::output,
        live::attach,
        live::input,
        live::signal_process,
        live::resize,
        live::code,
        live::contexts,
        live::create_context,
        live::remove_context,
        live::interrupt,
        live::restart,
        live::read,
        live::write,
        live::act,
        live::remove_file,
        live::watch,
        live::pack,
        live::unpack,
        live::events
    ),
    components(schemas(
        ExecInput,
        ExecEvent,
        BuildEvent,
        ProcessInput,
        ProcessEvent,
        CodeEvent,
        CreateEvent,
        FileEvent
    ))
)]
struct Api;

/// What it says to its owner, or to anybody.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes an answer")]
enum HealthReport {
    Whole(HealthAnswer),
    Public(PublicHealth),
}

/// The description, OpenAPI 3.1 as JSON.
pub fn document() -> serde_json::Value {
    // None of its parts fails to be written.
    let mut document = serde_json::to_value(described()).unwrap_or_default();
    bounds::put(&mut document);
    document
}

fn described() -> Document {
    let mut document = Api::openapi();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
    document.info.license = Some(openapi::License::new("Apache-2.0"));
    let bearer = Http::builder().scheme(HttpAuthScheme::Bearer);
    let bearer = bearer.description(Some("A key, made with: zygote key create"));
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(KEY, SecurityScheme::Http(bearer.build()));
    // On the engine's own socket none is needed.
    let none: [String; 0] = [];
    document.security = Some(vec![SecurityRequirement::new(KEY, none)]);
    document
}

/// Who answers.
#[utoipa::path(get, path = "/v1/health", security(()),
    responses((status = 200, body = HealthReport)))]
#[expect(dead_code, reason = "describes a route")]
fn health() {}

/// What the engine holds and has done.
#[utoipa::path(get, path = "/v1/status", 
    responses((status = 200, body = Status), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn status() {}

/// Ends the engine, once nothing runs any more.
#[utoipa::path(post, path = "/v1/stop", request_body = StopRequest,
    responses((status = 200, body = Stopped), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn stop() {}

/// Runs a program in a fresh fork of a template. With the content type application/x-ndjson the
/// request is the first line, and files and standard input follow as further lines (`ExecInput`).
/// With that type, or text/event-stream, accepted, the answer is a stream of `ExecEvent`.
#[utoipa::path(post, path = "/v1/exec", request_body = ExecRequest,
    responses(
        (status = 200, content((ExecResult = "application/json"),
            (ExecEvent = "application/x-ndjson"), (ExecEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn exec() {}

/// What a monitor reads: counters, times and gauges in Prometheus' text format.
#[utoipa::path(get, path = "/v1/metrics",
    responses((status = 200, body = String, content_type = "text/plain"),
        (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn metrics() {}

/// Runs programs, each in a fresh fork, and answers once all have ended.
#[utoipa::path(post, path = "/v1/exec/batch", request_body = BatchRequest,
    responses((status = 200, body = BatchResult), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn exec_batch() {}

/// Sends a signal to a program that runs, and to what it has started.
#[utoipa::path(post, path = "/v1/exec/{id}/signal", request_body = SignalRequest,
    params(("id" = String, Path, description = "The sandbox's id, from `ready`")),
    responses((status = 200), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn signal() {}

/// Runs any command on the emulated host, which is started if it is not up. Input and answer are those
/// of `/v1/exec`.
#[utoipa::path(post, path = "/v1/lab/exec", request_body = CommandRequest,
    responses(
        (status = 200, content((ExecResult = "application/json"),
            (ExecEvent = "application/x-ndjson"), (ExecEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn lab_exec() {}

/// Ends the emulated host, and what runs on it.
#[utoipa::path(post, path = "/v1/lab/down",
    responses((status = 200), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn lab_down() {}

/// All templates.
#[utoipa::path(get, path = "/v1/templates", 
    responses((status = 200, body = TemplateList), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn templates() {}

/// Builds a template, if it is not there as its recipe says. With application/x-ndjson or
/// text/event-stream accepted, the answer is a stream of `BuildEvent`.
#[utoipa::path(post, path = "/v1/templates", request_body = BuildRequest,
    responses(
        (status = 200, content((Built = "application/json"),
            (BuildEvent = "application/x-ndjson"), (BuildEvent = "text/event-stream"))),
        (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn build() {}

/// What a template is.
#[utoipa::path(get, path = "/v1/templates/{name}",
    params(("name" = String, Path, description = "Its name")),
    responses((status = 200, body = TemplateDetail), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn template() {}

/// Removes a template; sandboxes that run from it go on.
#[utoipa::path(delete, path = "/v1/templates/{name}",
    params(("name" = String, Path, description = "Its name"),
        ("derived" = Option<bool>, Query, description = "With those that are derived from it")),
    responses((status = 200, body = Removed), (status = "default", body = ErrorBody)))]
#[expect(dead_code, reason = "describes a route")]
fn remove() {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of an enumeration's schema.
    fn names_in(schema: &serde_json::Value) -> Vec<String> {
        let one_of = schema["oneOf"].as_array().into_iter().flatten();
        let all = one_of.chain([schema]);
        let values = all.flat_map(|part| {
            let list = part["enum"].as_array().cloned().unwrap_or_default();
            list.into_iter().chain([part["const"].clone()])
        });
        values
            .filter_map(|value| value.as_str().map(str::to_owned))
            .collect()
    }

    /// Tools call functions so (OpenAPI 3.1.0 §4.8.10).
    #[test]
    fn each_operation_has_a_name_of_its_own() {
        let json = document();
        let paths = json["paths"].as_object().unwrap().values();
        let operations = paths.flat_map(|path| path.as_object().unwrap().values());
        let names: Vec<_> = operations
            .filter_map(|operation| operation["operationId"].as_str())
            .collect();
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert!(
            names.len() > 40 && distinct.len() == names.len(),
            "{names:?}"
        );
    }

    #[test]
    fn every_code_of_an_error_is_in_the_docs() {
        let docs = include_str!("../../../docs/json.md");
        let json = document();
        let codes = &json["components"]["schemas"]["ErrorCode"];
        // With a description each, they are alternatives; else an enumeration.
        let text = codes.to_string();
        let known = |code: ErrorCode| text.contains(&serde_json::to_string(&code).unwrap());
        assert!(
            known(ErrorCode::Usage) && known(ErrorCode::GetFailed),
            "{codes}"
        );
        let names = names_in(codes);
        assert!(names.len() > 20, "{codes}");
        for name in names {
            assert!(docs.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn every_type_of_a_path_is_described() {
        let json = document();
        assert!(json["openapi"].as_str().unwrap().starts_with("3.1"));
        let schemas = json["components"]["schemas"].as_object().unwrap();
        let text = json.to_string();
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(schemas.contains_key(name), "{name}");
        }
        assert!(schemas.contains_key("ExecRequest") && schemas.contains_key("ExecInput"));
    }
}
