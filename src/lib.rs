//! vmflow.
