//! Holds answers of the API against the API's own description, more strictly than the description says: a key
//! that is not described fails the test.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use serde_json::{Value, json};

/// The description, as the API serves it.
pub struct Described(Value);

impl Described {
    pub fn new(document: Value) -> Self {
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{document}");
        Self(document)
    }

    pub fn document(&self) -> &Value {
        &self.0
    }

    /// Every operation: path, method.
    pub fn operations(&self) -> Vec<(String, String)> {
        let paths = self.0["paths"].as_object().unwrap().iter();
        let methods = |(path, item): (&String, &Value)| {
            let methods: Vec<_> = item.as_object().unwrap().keys().cloned().collect();
            methods.into_iter().map(|method| (path.clone(), method)).collect::<Vec<_>>()
        };
        paths.flat_map(methods).collect()
    }

    /// An answer must be described: its route, its status, and each of its keys. What is not there at all, and
    /// methods that are not allowed, are errors as all errors are.
    pub fn check(&self, method: &str, path: &str, status: u16, body: &str) {
        let answer = format!("{method} {path}: {status}: {body}");
        let value: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{answer}: {e}"));
        let operation = self.operation(method, path);
        let schema = match operation {
            None => {
                assert!(matches!(status, 404 | 405), "{answer}: no such route is described");
                json!({"$ref": "#/components/schemas/ErrorDocument"})
            }
            // A path that means nothing to the router.
            Some(operation) => {
                let described = &operation["responses"][status.to_string()];
                assert!(described.is_object(), "{answer}: no such status is described");
                described["content"]["application/json"]["schema"].clone()
            }
        };
        self.hold(&schema, &value, &answer);
    }

    /// A document must have the form that is described under this name.
    pub fn check_named(&self, schema: &str, body: &str) {
        let value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{body}: {e}"));
        self.hold(&json!({"$ref": format!("#/components/schemas/{schema}")}), &value, body);
    }

    fn hold(&self, schema: &Value, value: &Value, answer: &str) {
        assert!(schema.is_object(), "{answer}: its body is not described");
        let mut root = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "allOf": [schema],
            "components": self.0["components"],
        });
        close(&mut root["components"]);
        let validator = jsonschema::validator_for(&root).unwrap();
        let faults: Vec<_> =
            validator.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert!(faults.is_empty(), "{answer}: not as described: {faults:#?}");
    }

    fn operation(&self, method: &str, path: &str) -> Option<&Value> {
        let path = path.split('?').next().unwrap_or_default();
        let paths = self.0["paths"].as_object().unwrap();
        let (_, item) = paths.iter().find(|(template, _)| matches(template, path))?;
        item.get(method.to_lowercase())
    }
}

/// True if a path is one of a template: `/v1/vms/{name}` fits `/v1/vms/web1`.
fn matches(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    let fits =
        |(template, part): (&&str, &&str)| template == part || template.starts_with('{') && !part.is_empty();
    template.len() == path.len() && template.iter().zip(&path).all(fits)
}

/// Lets no object have keys that are not described.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(keys) => {
            keys.values_mut().for_each(close);
            if keys.get("properties").is_some_and(|properties| properties.get("properties").is_none()) {
                keys.entry("additionalProperties").or_insert(false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}
