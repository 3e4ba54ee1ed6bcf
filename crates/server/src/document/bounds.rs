//! What fields may be, where their types say less: the checks are beside the types' readers, and this is how they
//! are told. A tool that makes requests from the description (or a person) finds no others refused.

use serde_json::{Map, Value, json};

/// Longest time, in seconds: a year. See `request::time_limit`.
const TIME_MAX_S: u64 = 366 * 86_400;
/// Names of templates, and of sandboxes, moments and contexts.
const TEMPLATE: &str = "^[a-z0-9][a-z0-9_.-]{0,63}$";
const BUILD: &str = "^[A-Za-z0-9_.-]+$";
const NAME: &str = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$";
/// RFC 4648 §4.
const BASE64: &str =
    "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$";
/// Text without a NUL.
const NO_NUL: &str = "^[^\\u0000]*$";
/// The base64 of bytes without a NUL: no octet of four characters, or of what they end in, is zero.
const BASE64_NO_NUL: &str = "^((?!A[A-P])(?!.[AQgw][A-D])(?!..[AEIMQUYcgkosw048]A)[A-Za-z0-9+/]{4})*((?!A[A-P])[A-Za-z0-9+/][AQgw]==|\
                             (?!A[A-P])(?!.[AQgw][A-D])[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$";
/// In place of `Octets`: words of a command, and what files are called.
const WORD: &str = "Word";
const PATH: &str = "Path";

/// Puts them into a description.
pub fn put(document: &mut Value) {
    let schemas = document.pointer_mut("/components/schemas");
    if let Some(schemas) = schemas.and_then(Value::as_object_mut) {
        for (name, schema) in schemas.iter_mut() {
            put_into(name, schema);
        }
        let word = "Bytes without a NUL: a string, or base64 of those that are not UTF-8.";
        schemas.insert(WORD.to_owned(), octets(word, 0));
        let path = "A path in a sandbox: a string, or base64 of one that is not UTF-8.";
        schemas.insert(PATH.to_owned(), octets(path, 1));
    }
    optional_bodies(document);
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    for (path, operations) in paths.into_iter().flatten() {
        let operations = operations.as_object_mut().into_iter().flatten();
        for parameter in operations.flat_map(|(_, operation)| parameters(operation)) {
            let name = parameter["name"].as_str().unwrap_or_default().to_owned();
            of_parameter(path, &name, &mut parameter["schema"]);
        }
    }
    unsigned(document);
    octet_streams(document);
}

/// `Octets` with no NUL among them, and so many at least.
fn octets(description: &str, least: u8) -> Value {
    let base64 = json!({"type": "string", "pattern": BASE64_NO_NUL, "minLength": 4 * least, "contentEncoding": "base64"});
    json!({
        "description": description,
        "oneOf": [
            {"type": "string", "pattern": NO_NUL, "minLength": least},
            {"type": "object", "required": ["base64"], "properties": {"base64": base64}},
        ],
    })
}

/// Has it refer to another schema than `Octets`.
fn refer(schema: &mut Value, to: &str) {
    match schema {
        Value::String(text) if text == "#/components/schemas/Octets" => {
            *text = format!("#/components/schemas/{to}");
        }
        Value::Array(parts) => parts.iter_mut().for_each(|part| refer(part, to)),
        Value::Object(parts) => parts.values_mut().for_each(|part| refer(part, to)),
        _ => {}
    }
}

fn parameters(operation: &mut Value) -> impl Iterator<Item = &mut Value> {
    let list = operation
        .get_mut("parameters")
        .and_then(Value::as_array_mut);
    list.into_iter().flatten()
}

/// Where all that is asked may be left out, so may the body.
fn optional_bodies(document: &mut Value) {
    let schemas = document["components"]["schemas"].clone();
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    let operations = paths.into_iter().flatten();
    for operation in operations.flat_map(|(_, all)| all.as_object_mut().into_iter().flatten()) {
        let Some(body) = operation.1.get_mut("requestBody") else {
            continue;
        };
        let asked = &body["content"]["application/json"]["schema"]["$ref"];
        let asked = asked.as_str().and_then(|asked| asked.rsplit('/').next());
        let asked = asked.and_then(|asked| schemas.get(asked));
        if asked.is_some_and(|it| it.get("required").is_none() && it.get("oneOf").is_none()) {
            body["required"] = json!(false);
        }
    }
}

/// Bytes that are no JSON are no list of numbers, which `Vec<u8>` is in a description.
fn octet_streams(value: &mut Value) {
    for (kind, content) in value.as_object_mut().into_iter().flatten() {
        if ["application/octet-stream", "application/x-tar"].contains(&&kind[..]) {
            content["schema"] = json!({"type": "string", "format": "binary"});
        } else {
            octet_streams(content);
        }
    }
}

/// 64 bits without a sign are more than `int64` says.
fn unsigned(value: &mut Value) {
    if value.get("format") == Some(&json!("int64")) && value.get("minimum") == Some(&json!(0)) {
        value.as_object_mut().map(|schema| schema.remove("format"));
    }
    match value {
        Value::Array(parts) => parts.iter_mut().for_each(unsigned),
        Value::Object(parts) => parts.values_mut().for_each(unsigned),
        _ => {}
    }
}

fn of_parameter(path: &str, name: &str, schema: &mut Value) {
    match name {
        "name" if path.starts_with("/v1/templates") => set(schema, json!({"pattern": TEMPLATE})),
        "path" => set(schema, json!({"minLength": 1, "pattern": NO_NUL})),
        "path_base64" => set(schema, json!({"minLength": 4, "pattern": BASE64})),
        "user" => set(schema, json!({"pattern": NO_NUL})),
        "from" | "after" | "offset" | "length" if schema["type"] != json!("string") => {
            set(schema, json!({"minimum": 0, "maximum": u64::MAX}));
        }
        // What is no name is nobody's.
        "name" if path == "/v1/sandboxes" => {}
        "idempotency-key" => set(
            schema,
            json!({"minLength": 1, "maxLength": 255, "pattern": "^[!-~]*$"}),
        ),
        "name" | "context" => set(schema, json!({"pattern": NAME})),
        "process" => set(schema, json!({"minimum": 1, "maximum": u32::MAX})),
        "limit" => set(schema, json!({"minimum": 1, "maximum": 1000})),
        "state" => set(schema, json!({"enum": states()})),
        "depth" => set(schema, json!({"minimum": 1, "maximum": u32::MAX})),
        "mode" => set(schema, json!({"pattern": "^[0-7]{1,4}$"})),
        "timeout_seconds" => set(schema, json!({"minimum": 0, "maximum": TIME_MAX_S})),
        _ => {}
    }
}

fn states() -> [&'static str; 6] {
    ["making", "running", "paused", "ending", "ended", "all"]
}

fn put_into(name: &str, schema: &mut Value) {
    match name {
        "ExecRequest" => {
            exactly_one(schema);
            set(schema, json!({"not": both("stdin", "stdin_stream")}));
        }
        "ProcessRequest" => {
            let both = [
                both("stdin", "stdin_stream"),
                both("detach", "kill_on_disconnect"),
            ];
            set(schema, json!({"not": {"anyOf": both}}));
        }
        // Its variants have no other fields, either.
        "FileAction" => {
            let ways = schema.get_mut("oneOf").and_then(Value::as_array_mut);
            let ways = ways.into_iter().flatten();
            ways.for_each(|way| set(way, json!({"additionalProperties": false})));
        }
        "BatchRequest" => {
            let items = schema.pointer_mut("/properties/executions");
            items.into_iter().for_each(|items| {
                set(items, json!({"minItems": 1, "maxItems": 1000}));
                // No lines follow in a batch.
                let lines = ["stdin_stream", "files_stream"];
                let lines = lines.map(
                    |field| json!({"required": [field], "properties": {field: {"const": true}}}),
                );
                set(&mut items["items"], json!({"not": {"anyOf": lines}}));
            });
        }
        _ => {}
    }
    bound_fields(name, schema);
}

fn bound_fields(name: &str, schema: &mut Value) {
    // Alternatives, and what is put together, have fields deeper down.
    for part in ["oneOf", "anyOf", "allOf"] {
        let parts = schema.get_mut(part).and_then(Value::as_array_mut);
        let parts = parts.into_iter().flatten();
        parts.for_each(|part| bound_fields(name, part));
    }
    let fields = schema.get_mut("properties").and_then(Value::as_object_mut);
    for (field, schema) in fields.into_iter().flatten() {
        of_field(name, field, schema);
    }
}

fn of_field(of: &str, field: &str, schema: &mut Value) {
    match (of, field) {
        ("ProcessRequest", "command") => refer(schema, WORD),
        ("FileAction", "path" | "to" | "target") => refer(schema, PATH),
        _ => {}
    }
    let is_request = of.ends_with("Request") || of.ends_with("Change") || of == "MomentPolicy";
    let bounds = match field {
        "ttl_seconds" | "idle_seconds" | "timeout_seconds" | "every_seconds" => {
            json!({"minimum": 0, "maximum": TIME_MAX_S})
        }
        "freeze_seconds" => json!({"minimum": 0, "maximum": 600}),
        "signal" => json!({"minimum": 1, "maximum": 64}),
        "rows" | "columns" => json!({"minimum": 0, "maximum": u16::MAX}),
        "mode" | "depth" => json!({"minimum": 0, "maximum": u32::MAX}),
        "keep" => json!({"minimum": 1, "maximum": 64}),
        "count" if of == "BranchRequest" => json!({"minimum": 1, "maximum": 1000}),
        "vcpus" | "replicas" => json!({"minimum": 1, "maximum": u8::MAX}),
        "language" if of == "ContextRequest" => json!({"enum": ["", "python"]}),
        "build" if is_request => json!({"pattern": BUILD}),
        "template" | "recipe" if is_request => json!({"pattern": TEMPLATE}),
        "name" | "context" if is_request => json!({"pattern": NAME}),
        "cwd" | "user" if is_request => json!({"pattern": NO_NUL}),
        "env" if is_request && schema.get("type") == Some(&json!("object")) => json!({
            "propertyNames": {"pattern": "^[^=\\u0000]+$"},
            "additionalProperties": {"type": "string", "pattern": NO_NUL},
        }),
        "command" if of == "ProcessRequest" => json!({"minItems": 1}),
        "base64" => json!({"pattern": BASE64, "contentEncoding": "base64"}),
        _ => return,
    };
    set(schema, bounds);
}

/// Whether two are said of which one is enough.
fn both(one: &str, other: &str) -> Value {
    let is_said = json!({"not": {"enum": [null, false]}});
    json!({"required": [one, other], "properties": {one: is_said, other: is_said}})
}

/// What is to be run is said in one way.
fn exactly_one(schema: &mut Value) {
    let other = ["code", "file", "command"];
    let without = |said: &str| {
        let rest = other.iter().filter(|field| **field != said);
        let mut none: Map<String, Value> = rest
            .map(|field| ((*field).to_owned(), json!({"type": "null"})))
            .collect();
        if said != "program_from_stdin" {
            none.insert("program_from_stdin".to_owned(), json!({"const": false}));
        }
        none
    };
    let mut ways = Vec::new();
    for said in other {
        let mut fields = without(said);
        fields.insert(said.to_owned(), json!({"not": {"type": "null"}}));
        if said == "command" {
            fields.insert(said.to_owned(), json!({"type": "array", "minItems": 1}));
            fields.insert("args".to_owned(), json!({"maxItems": 0}));
        }
        ways.push(json!({"required": [said], "properties": fields}));
    }
    let mut fields = without("program_from_stdin");
    fields.insert("program_from_stdin".to_owned(), json!({"const": true}));
    ways.push(json!({"required": ["program_from_stdin"], "properties": fields}));
    set(schema, json!({ "oneOf": ways }));
}

/// Of text, numbers and lists, where it may be absent too.
fn set(schema: &mut Value, bounds: Value) {
    let (Some(schema), Value::Object(bounds)) = (schema.as_object_mut(), bounds) else {
        return;
    };
    schema.extend(bounds);
}

#[cfg(test)]
mod tests {
    use super::super::document;
    use serde_json::json;

    #[test]
    fn what_is_told_is_what_is_checked() {
        let document = document();
        let field =
            |of: &str, field: &str| &document["components"]["schemas"][of]["properties"][field];
        assert_eq!(
            field("ExecRequest", "timeout_seconds")["maximum"],
            json!(31_622_400)
        );
        assert_eq!(field("SignalRequest", "signal")["maximum"], json!(64));
        assert_eq!(
            field("SandboxRequest", "name")["pattern"],
            json!(super::NAME)
        );
        let ways = document["components"]["schemas"]["ExecRequest"]["oneOf"].as_array();
        assert_eq!(ways.map(Vec::len), Some(4));
        let parameters = &document["paths"]["/v1/sandboxes"]["get"]["parameters"];
        let state = parameters
            .as_array()
            .unwrap()
            .iter()
            .find(|p| p["name"] == "state");
        assert!(
            state.unwrap()["schema"]["enum"]
                .as_array()
                .unwrap()
                .contains(&json!("paused"))
        );
    }
}
