//! What fields may be, where their types say less: the checks are beside the types' readers, and this is how they
//! are told. A tool that makes requests from the description (or a person) finds no others refused.

use serde_json::{Map, Value, json};

/// Longest time, in seconds: a year. See `local::time_limit`.
const TIME_MAX_S: u64 = 366 * 86_400;
/// Names of templates, and of sandboxes, moments and contexts.
const TEMPLATE: &str = "^[a-z0-9][a-z0-9_.-]{0,63}$";
const NAME: &str = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$";
/// RFC 4648 §4.
const BASE64: &str =
    "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?$";
/// Text without a NUL.
const NO_NUL: &str = "^[^\\u0000]*$";

/// Puts them into a description.
pub fn put(document: &mut Value) {
    let schemas = document.pointer_mut("/components/schemas");
    for (name, schema) in schemas.and_then(Value::as_object_mut).into_iter().flatten() {
        put_into(name, schema);
    }
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    for (path, operations) in paths.into_iter().flatten() {
        let operations = operations.as_object_mut().into_iter().flatten();
        for parameter in operations.flat_map(|(_, operation)| parameters(operation)) {
            let name = parameter["name"].as_str().unwrap_or_default().to_owned();
            of_parameter(path, &name, &mut parameter["schema"]);
        }
    }
    unsigned(document);
}

fn parameters(operation: &mut Value) -> impl Iterator<Item = &mut Value> {
    let list = operation
        .get_mut("parameters")
        .and_then(Value::as_array_mut);
    list.into_iter().flatten()
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
        // 64 bits without a sign, of which JSON's numbers are not all sure.
        "from" | "after" | "offset" | "length" if schema["type"] != json!("string") => {
            set(schema, json!({"minimum": 0, "maximum": i64::MAX}));
        }
        // What is no name is nobody's.
        "name" if path == "/v1/sandboxes" => {}
        "idempotency-key" => set(
            schema,
            json!({"minLength": 1, "maxLength": 255, "pattern": "^[!-~]*$"}),
        ),
        "name" | "context" => set(schema, json!({"pattern": NAME})),
        "process" => set(schema, json!({"minimum": 1, "maximum": u32::MAX})),
        "limit" => set(schema, json!({"minimum": 0, "maximum": 1000})),
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
        "ExecRequest" => exactly_one(schema),
        "BatchRequest" => {
            let items = schema.pointer_mut("/properties/executions");
            items.into_iter().for_each(|items| {
                set(items, json!({"minItems": 1, "maxItems": 1000}));
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
        "language" if of == "ExecRequest" => json!({"enum": ["python", null]}),
        "template" | "recipe" | "build" if is_request => json!({"pattern": TEMPLATE}),
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
