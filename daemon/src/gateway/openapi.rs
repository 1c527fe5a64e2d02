//! `GET /openapi.json`: the routes of the table, with the fields of [`dsd_proto::fields`].

use axum::{body::Body, http::Response};
use dsd_proto::fields::{self, Treatment};
use serde_json::{Map, Value, json};

use super::{
    error::Dialect,
    routes::{self, ROUTES, Route, Verb},
};

pub(super) async fn show() -> Response<Body> {
    routes::json(&document())
}

fn document() -> Value {
    let mut paths = Map::new();
    for route in &ROUTES {
        let verb = match route.verb {
            Verb::Get => "get",
            Verb::Post => "post",
        };
        paths.insert(route.label.to_owned(), json!({verb: operation(route)}));
    }
    let error = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let detail = json!({
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
    });
    let of_anthropic = json!({
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    });
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "dsd",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "ErrorDetail": detail,
                "Error": {"type": "object", "required": ["error"], "properties": {"error": error("ErrorDetail")}},
                "AnthropicError": of_anthropic,
            },
        },
    })
}

fn operation(route: &Route) -> Value {
    let error = match Dialect::of_path(route.label) {
        Dialect::OpenAi => "#/components/schemas/Error",
        Dialect::Anthropic => "#/components/schemas/AnthropicError",
    };
    let mut operation = json!({
        "summary": route.about,
        "responses": {
            "200": {"description": "The answer."},
            "default": {"description": "Why not.", "content": {"application/json": {"schema": {"$ref": error}}}},
        },
    });
    if !route.is_open {
        // Nodes without keys let everybody in.
        operation["security"] = json!([{"key": []}, {}]);
    }
    if let Some((_, name)) = route.label.split_once('{') {
        let name = name.trim_end_matches('}');
        operation["parameters"] =
            json!([{"name": name, "in": "path", "required": true, "schema": {"type": "string"}}]);
    }
    if route.verb == Verb::Post {
        operation["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": body(route)}}});
    }
    operation
}

/// Names and notes only: what a value may be is told by the error that refuses it.
fn body(route: &Route) -> Value {
    let quoted = format!("`{}`", route.label);
    let api = fields::APIS.iter().find(|api| api.title.contains(&quoted));
    let Some(api) = api else {
        return json!({"type": "object"});
    };
    let property = |field: &fields::Field| {
        let note = match field.treatment {
            Treatment::Obeyed => field.note.to_owned(),
            Treatment::Refused => format!("refused: {}", field.note),
            Treatment::Ignored => format!("ignored: {}", field.note),
        };
        (field.name.to_owned(), json!({"description": note}))
    };
    let properties: Map<String, Value> = api.fields.iter().map(property).collect();
    json!({"type": "object", "properties": properties})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_once_with_its_fields() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(paths.len(), ROUTES.len());
        for api in fields::APIS {
            let n = paths
                .values()
                .filter_map(|path| path["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"].as_object())
                .filter(|properties| properties.len() == api.fields.len())
                .count();
            assert_eq!(n, 2, "{}", api.title);
        }
        let embedded = document.to_string();
        assert!(embedded.contains("#/components/schemas/AnthropicError"));
    }
}
