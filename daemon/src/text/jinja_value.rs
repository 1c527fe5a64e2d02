//! JSON values to Jinja values and back.

use minijinja::{Error, ErrorKind, Value as JinjaValue, value::ValueKind};
use serde_json::{Map, Value};

/// Deepest nesting that comes back out of a template; JSON goes in with at most 128 levels.
const DEPTH_MAX: usize = 160;

/// A JSON value for a template; objects keep their order.
pub(super) fn from_json(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(v) => JinjaValue::from(*v),
        Value::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(v), _) => JinjaValue::from(v),
            (None, Some(v)) => JinjaValue::from(v),
            (None, None) => JinjaValue::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => JinjaValue::from(text.as_str()),
        Value::Array(values) => values.iter().map(from_json).collect(),
        Value::Object(map) => {
            JinjaValue::from_pairs(map.iter().map(|(k, v)| (k.as_str(), from_json(v))))
        }
    }
}

/// A template's value as JSON, for `tojson`.
///
/// # Errors
/// When it has no JSON form or is nested too deeply.
pub(super) fn to_json(value: &JinjaValue) -> Result<Value, Error> {
    convert(value, 0)
}

fn convert(value: &JinjaValue, depth: usize) -> Result<Value, Error> {
    let refuse = |what: String| Error::new(ErrorKind::BadSerialization, what);
    if DEPTH_MAX < depth {
        return Err(refuse("the value is nested too deeply for JSON".to_owned()));
    }
    match value.kind() {
        ValueKind::None => Ok(Value::Null),
        ValueKind::Bool => Ok(Value::Bool(value.is_true())),
        ValueKind::Number if value.is_integer() => {
            if let Ok(v) = u64::try_from(value.clone()) {
                return Ok(v.into());
            }
            i64::try_from(value.clone()).map(Value::from)
        }
        ValueKind::Number => f64::try_from(value.clone()).map(Value::from),
        ValueKind::String => Ok(Value::from(value.as_str().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|item| convert(&item, depth + 1))
            .collect(),
        ValueKind::Map => {
            let mut map = Map::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                map.insert(key.to_string(), convert(&item, depth + 1)?);
            }
            Ok(Value::Object(map))
        }
        other => Err(refuse(format!("{other} has no JSON form"))),
    }
}
